"""Labels: when a unit counts as converged, and what freezing the front would cost."""

from collections.abc import Callable
from functools import partial

import torch


def settled(cka: torch.Tensor, cka_threshold: float = 0.9998, change_left: float = 0.01) -> torch.Tensor:
    r"""
    Whether each unit's output is, and from then on stays, what it will be at the end of the run.

    With \\(c_t\\) the linear CKA of the output at probe \\(t\\) to the output at the end, a unit has settled where
    \\(1 - c_t \le \max(1 - \text{threshold},\; \text{change left} \cdot (1 - c_0))\\) from \\(t\\) on. A fixed similarity
    alone would say of the first blocks of a pretrained model that they never have anything to learn, since fine-tuning
    changes what they put out by a percent or two, and that is where freezing early costs accuracy.

    Args:
        cka (`torch.Tensor` of shape `(probes, units)`): from the start of the run to its end.
        cka_threshold (`float`, *optional*, defaults to `0.9998`): similarity from which an output is final in any case.
        change_left (`float`, *optional*, defaults to `0.01`): share of the run's whole change in similarity that may
            still be to come.

    Returns:
        `torch.Tensor` of shape `(probes, units)`, `bool`.
    """
    left = 1 - cka
    most_to_come = left.flip(0).cummax(0).values.flip(0)
    return most_to_come <= (change_left * left[0]).clamp(min=1 - cka_threshold)


def similar(cka: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    The label of the paper: whether each unit's CKA to its own end has reached a threshold, and stays there.

    Args:
        cka (`torch.Tensor` of shape `(probes, units)`): from the start of the run to its end.
        threshold (`float`): such as 0.98, 0.99 or 0.995.

    Returns:
        `torch.Tensor` of shape `(probes, units)`, `bool`.
    """
    return cka.flip(0).cummin(0).values.flip(0) >= threshold


def rewind_cost(losses: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """
    What going back costs, as a share of what training gained.

    Args:
        losses (`torch.Tensor` of shape `(moments, units)`): with the front up to each unit put back to each moment.
        start (`float`): loss before training.
        end (`float`): loss after it.

    Returns:
        `torch.Tensor` of shape `(moments, units)`: `0` where nothing is lost, `1` where all that was gained is.
    """
    return (losses - end) / max(start - end, 1e-6)


def at_probes(values: torch.Tensor, moments: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
    """
    What was measured at some moments, and is zero at the end of the run, read off at all probes on straight lines.

    Args:
        values (`torch.Tensor` of shape `(moments, units)`): what was measured.
        moments (`torch.Tensor` of shape `(moments,)`): steps, rising, from the first probe on.
        probes (`torch.Tensor` of shape `(probes,)`): steps, rising, up to the end of the run.

    Returns:
        `torch.Tensor` of shape `(probes, units)`.
    """
    values = torch.cat([values, torch.zeros_like(values[:1])])
    moments = torch.cat([moments, probes[-1:]]).double()
    after = torch.searchsorted(moments, probes.double(), right=True).clamp(1, len(moments) - 1)
    share = ((probes - moments[after - 1]) / (moments[after] - moments[after - 1])).unsqueeze(1).to(values.dtype)
    return values[after - 1] * (1 - share) + values[after] * share


def cheap_to_rewind(tensors: dict[str, torch.Tensor], threshold: float) -> torch.Tensor:
    """Whether the finished model, with its front up to each unit put back to each probe, loses little of its gain."""
    cost = rewind_cost(tensors["rewind_losses"], *tensors["rewind_range"].tolist())
    return at_probes(cost, tensors["rewind_steps"], tensors["probe_steps"]) <= threshold


def same_to_rewind(tensors: dict[str, torch.Tensor], threshold: float) -> torch.Tensor:
    """Whether the finished model, with its front up to each unit put back to each probe, says much the same."""
    return at_probes(tensors["rewind_shifts"], tensors["rewind_steps"], tensors["probe_steps"]) <= threshold


def kept(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    What is left of the run's way if the front up to each unit is put back to each probe, from 0 to 1: learned with
    cross-entropy, it makes a predictor say what freezing there costs on average, so that a rare but dear mistake counts.

    Returns:
        `torch.Tensor` of shape `(probes, units)`.
    """
    shifts = at_probes(tensors["rewind_shifts"], tensors["rewind_steps"], tensors["probe_steps"])
    return 1 - shifts.clamp(0, 1).float()


def _similar(tensors: dict[str, torch.Tensor], key: str, threshold: float) -> torch.Tensor:
    return similar(tensors[key], threshold)


# By name, from what [`RecordingCallback.result`] gives to whether each unit has converged at each probe.
LABELS: dict[str, Callable[[dict[str, torch.Tensor]], torch.Tensor]] = {
    **{f"cka-{x}": partial(_similar, key="cka", threshold=x) for x in (0.98, 0.99, 0.995)},
    **{f"token-cka-{x}": partial(_similar, key="token_cka", threshold=x) for x in (0.98, 0.99, 0.995)},
    "settled": lambda tensors: settled(tensors["cka"]),
    **{f"rewind-cost-{x}": partial(cheap_to_rewind, threshold=x) for x in (0.02, 0.05)},
    **{f"rewind-shift-{x}": partial(same_to_rewind, threshold=x) for x in (0.01, 0.03)},
}
# By name, what a predictor learns, from the same and the label.
TARGETS: dict[str, Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "kept": lambda tensors, label: kept(tensors),
    "label": lambda tensors, label: label.float(),
}
