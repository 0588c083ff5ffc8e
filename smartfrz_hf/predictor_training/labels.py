"""Labels of recorded runs: when a unit counts as converged, and the cost of freezing the front."""

from collections.abc import Callable
from functools import partial

import torch

EPSILON = 1e-6


def settled(cka: torch.Tensor, cka_threshold: float = 0.9998, change_left: float = 0.01) -> torch.Tensor:
    r"""
    Whether each unit's output is close to its output at the end of the run, and remains so.

    With \\(c_t\\) the linear CKA of the output at probe \\(t\\) to the output at the end, a unit has settled where
    \\(1 - c_t \le \max(1 - \text{threshold},\; \text{change left} \cdot (1 - c_0))\\) from \\(t\\) on. The bound is
    relative to the change over the run, because fine-tuning changes the output of the first blocks of a pretrained
    model by a percent or two only, and with a fixed similarity they would count as converged from the start.

    Args:
        cka (`torch.Tensor` of shape `(probes, units)`): from the start of the run to its end.
        cka_threshold (`float`, *optional*, defaults to `0.9998`):
            Similarity from which an output always counts as final.
        change_left (`float`, *optional*, defaults to `0.01`):
            Fraction of the run's whole change in similarity that may be left.

    Returns:
        `torch.Tensor` of shape `(probes, units)`, `bool`.
    """
    left = 1 - cka
    max_left = left.flip(0).cummax(0).values.flip(0)
    return max_left <= (change_left * left[0]).clamp(min=1 - cka_threshold)


def similar(cka: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    Whether each unit's CKA to its output at the end of the run has reached a threshold, and stays there: the label of
    SmartFRZ (arXiv 2401.16720).

    Args:
        cka (`torch.Tensor` of shape `(probes, units)`): from the start of the run to its end.
        threshold (`float`): such as 0.98, 0.99 or 0.995.

    Returns:
        `torch.Tensor` of shape `(probes, units)`, `bool`.
    """
    return cka.flip(0).cummin(0).values.flip(0) >= threshold


def rewind_cost(losses: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """
    Loss added by resetting the front, as a fraction of what training reduced the loss by.

    Args:
        losses (`torch.Tensor` of shape `(moments, units)`): loss with the units up to this one reset to each moment.
        start (`float`): loss before training.
        end (`float`): loss after training.

    Returns:
        `torch.Tensor` of shape `(moments, units)`: 0 where the loss is as after training, 1 where it is as before.
    """
    return (losses - end) / max(start - end, EPSILON)


def at_probes(values: torch.Tensor, moments: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
    """
    Interpolate linearly between values measured at some moments of a run, which are zero at its end.

    Args:
        values (`torch.Tensor` of shape `(moments, units)`): the measured values.
        moments (`torch.Tensor` of shape `(moments,)`): increasing steps, from the first probe on.
        probes (`torch.Tensor` of shape `(probes,)`): increasing steps, up to the end of the run.

    Returns:
        `torch.Tensor` of shape `(probes, units)`.
    """
    values = torch.cat([values, torch.zeros_like(values[:1])])
    moments = torch.cat([moments, probes[-1:]]).double()
    after = torch.searchsorted(moments, probes.double(), right=True).clamp(1, len(moments) - 1)
    share = ((probes - moments[after - 1]) / (moments[after] - moments[after - 1])).unsqueeze(1).to(values.dtype)
    return values[after - 1] * (1 - share) + values[after] * share


def rewind_shifts(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    Mean squared change of the logits of the finished model if the front is reset to each probe, as a fraction of their
    change over the whole run.

    Args:
        tensors (`dict[str, torch.Tensor]`): a recorded run, see [`RecordingCallback.result`].

    Returns:
        `torch.Tensor` of shape `(probes, units)`; entry `[p, u]` is for units 0 to u.
    """
    return at_probes(tensors["rewind_shifts"], tensors["rewind_steps"], tensors["probe_steps"])


def _low_rewind_cost(tensors: dict[str, torch.Tensor], threshold: float) -> torch.Tensor:
    cost = rewind_cost(tensors["rewind_losses"], *tensors["rewind_range"].tolist())
    return at_probes(cost, tensors["rewind_steps"], tensors["probe_steps"]) <= threshold


def _low_rewind_shift(tensors: dict[str, torch.Tensor], threshold: float) -> torch.Tensor:
    return rewind_shifts(tensors) <= threshold


def _similar(tensors: dict[str, torch.Tensor], key: str, threshold: float) -> torch.Tensor:
    return similar(tensors[key], threshold)


def _kept(tensors: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """
    Fraction of the run's change of the logits that is kept if the front is reset to each probe, from 0 to 1. A
    predictor that learns it predicts the mean cost, so that rare but expensive mistakes count for more.
    """
    return 1 - rewind_shifts(tensors).clamp(0, 1).float()


# By name: from a recorded run ([`RecordingCallback.result`]) to whether each unit has converged at each probe.
LABELS: dict[str, Callable[[dict[str, torch.Tensor]], torch.Tensor]] = {
    **{f"cka-{x}": partial(_similar, key="cka", threshold=x) for x in (0.98, 0.99, 0.995)},
    **{f"token-cka-{x}": partial(_similar, key="token_cka", threshold=x) for x in (0.98, 0.99, 0.995)},
    "settled": lambda tensors: settled(tensors["cka"]),
    **{f"rewind-cost-{x}": partial(_low_rewind_cost, threshold=x) for x in (0.02, 0.05)},
    **{f"rewind-shift-{x}": partial(_low_rewind_shift, threshold=x) for x in (0.01, 0.03)},
}
# By name: from a recorded run and its labels to what the predictor learns.
TARGETS: dict[str, Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "kept": _kept,
    "label": lambda tensors, labels: labels.float(),
}
