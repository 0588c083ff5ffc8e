"""The inputs of the predictor, in training and in use: how sampled weights move, and where each unit stands."""

from typing import NamedTuple

import torch

from .configuration import PROBE_SIZE, SmartFRZPredictorConfig

EPSILON = 1e-12
MIN_RATIO, MAX_RATIO = 1e-6, 1e3


class PredictorInputs(NamedTuple):
    """
    The inputs of [`SmartFRZPredictor`] at one freezing stage.

    Attributes:
        features (`torch.Tensor` of shape `(units, window, input_size)`):
            The history of each unit, oldest snapshot first.
        usable (`torch.Tensor` of shape `(units, window)`, `bool`): which snapshots have features.
        context (`torch.Tensor` of shape `(units, 4)`, or `(units, 11)` with a front probe):
            Where each unit stands in the model and in the run, and how its outputs on the front probe move.
    """

    features: torch.Tensor
    usable: torch.Tensor
    context: torch.Tensor


def build_inputs(
    config: SmartFRZPredictorConfig,
    snapshots: torch.Tensor,
    start: torch.Tensor,
    spent: torch.Tensor,
    relative_rate: torch.Tensor,
    progress: float,
    probe_changes: torch.Tensor | None = None,
    depth: int = 0,
) -> PredictorInputs:
    """
    Build the inputs of the predictor from what was recorded of a run, in training and in use.

    Args:
        config ([`SmartFRZPredictorConfig`]): form and sizes of the predictor.
        snapshots (`torch.Tensor` of shape `(units, snapshots, weights_per_unit)`):
            The sampled weights of the active units, oldest first: from 2 snapshots up to `config.window`.
        start (`torch.Tensor` of shape `(units, weights_per_unit)`): the snapshot at the start of the run.
        spent (`torch.Tensor` of shape `(snapshots,)`):
            Share of the run's summed learning rate spent before each snapshot.
        relative_rate (`torch.Tensor` of shape `()`): learning rate now, as a fraction of its peak.
        progress (`float`): fraction of the run that is done.
        probe_changes (`torch.Tensor` of shape `(depth + units, 4, 2)`, *optional*):
            What the front probe measured, as in [`ProbeHistory`], for all units. Its features are zero if it is not
            given.
        depth (`int`, *optional*, defaults to `0`): number of frozen units in front of the active ones.

    Returns:
        [`PredictorInputs`] of the active units.
    """
    units, filled = snapshots.shape[:2]
    missing = config.window - filled
    if missing:
        snapshots = torch.cat([snapshots.new_zeros(units, missing, snapshots.shape[-1]), snapshots], dim=1)
        spent = torch.cat([spent.new_zeros(missing), spent])
    position = torch.arange(config.window, device=snapshots.device)
    if config.form == "weights":
        features, usable = snapshots, position >= missing
    else:
        usable = position > missing  # features compare a snapshot with the one before it
        features = dynamics(snapshots, start, usable, spent)
    context = unit_context(depth + units, progress, relative_rate, spent[-1])
    if config.front_probe:
        unknown = torch.zeros(depth + units, PROBE_SIZE, device="cpu")
        context = torch.cat([context, unknown if probe_changes is None else probe_features(probe_changes)], dim=-1)
    return PredictorInputs(features, usable.expand(units, -1), context[depth:].to(snapshots))


def log_ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Decimal logarithm of `a / b`, within -6 and 3."""
    return (a / b.clamp(min=EPSILON)).clamp(MIN_RATIO, MAX_RATIO).log10()


def dynamics(snapshots: torch.Tensor, start: torch.Tensor, usable: torch.Tensor, spent: torch.Tensor) -> torch.Tensor:
    r"""
    How the sampled weights move, in ten quantities that do not depend on their scale, order or number.

    With \\(w_t\\) the snapshot, \\(w_0\\) the one at the start of the run, \\(w_T\\) the last one,
    \\(u_t = w_t - w_{t-1}\\), \\(b_t\\) the share of the run's summed learning rate spent before the snapshot and
    \\(\Delta b_t = b_t - b_{t-1}\\), the ten quantities of a snapshot are

    1. \\(\log_{10} \|u_t\| / \|w_T - w_0\|\\), the update against the displacement over the whole run so far;
    2. \\(\log_{10} \|u_t\| / \overline{\|u\|}\\), the update against the window's mean;
    3. \\(\log_{10} \left(\|u_t\| / \Delta b_t\right) / \left(\sum \|u\| / \sum \Delta b\right)\\), the same per
       learning rate spent;
    4. \\(\cos(u_t, u_{t-1})\\), the agreement of successive updates;
    5. \\(\cos(u_t, w_T - w_0)\\), the agreement of the update with the whole displacement;
    6. \\(\log_{10} \|w_t - w_0\| / \|w_T - w_0\|\\), the displacement from the start;
    7. \\(\log_{10} \|w_T - w_{t-1}\| / \|w_T - w_0\|\\), the displacement since the previous snapshot;
    8. \\(\|w_T - w_{t-1}\| / \sum_{s \ge t} \|u_s\|\\), the straightness of the path since then;
    9. \\(\log_{10} \left(\|w_T - w_{t-1}\| / (b_T - b_{t-1})\right) (1 - b_T) / \|w_T - w_0\|\\), the displacement
       expected in the rest of the run, if it continues as it has since then;
    10. the age of the snapshot, as a fraction of the window.

    Lengths are relative to the displacement so far, not to the norm of the weights: a pretrained model moves by a
    small fraction of that norm, and a model trained from scratch by a large one.

    Args:
        snapshots (`torch.Tensor` of shape `(units, window, weights_per_unit)`): oldest first.
        start (`torch.Tensor` of shape `(units, weights_per_unit)`): the snapshot at the start of the run.
        usable (`torch.Tensor` of shape `(window,)`, `bool`): which snapshots have a recorded one before them.
        spent (`torch.Tensor` of shape `(window,)`): share of the summed learning rate spent before each snapshot.

    Returns:
        `torch.Tensor` of shape `(units, window, 10)`; zero where a snapshot is not usable.
    """
    real, window = usable.to(snapshots.dtype), len(usable)
    update = torch.zeros_like(snapshots)
    torch.sub(snapshots[:, 1:], snapshots[:, :-1], out=update[:, 1:])
    update *= real.unsqueeze(-1)
    whole = snapshots[:, -1] - start
    # All lengths and angles follow from the inner products of the updates and the whole displacement. They are summed
    # in double precision, since large terms can cancel.
    products = torch.cat([update, whole.unsqueeze(1)], dim=1)
    products = (products @ products.transpose(1, 2)).double()
    inner, along, whole_squared = products[:, :-1, :-1], products[:, :-1, -1], products[:, -1:, -1]
    size, whole_size = inner.diagonal(dim1=1, dim2=2).sqrt(), whole_squared.sqrt()
    since_squared = _sums_from(_sums_from(inner, 1), 2).diagonal(dim1=1, dim2=2)
    since, path = since_squared.clamp(min=0).sqrt(), _sums_from(size, 1)
    after = torch.cat([since_squared[:, 1:], torch.zeros_like(whole_squared)], dim=1)
    displaced = (whole_squared - 2 * (_sums_from(along, 1) - along) + after).clamp(min=0).sqrt()
    before = torch.cat([torch.zeros_like(whole_size), size[:, :-1]], dim=1)
    with_before = torch.cat([torch.zeros_like(whole_size), inner.diagonal(-1, 1, 2)], dim=1)
    budget = ((spent - spent.roll(1)) * real).double()
    to_come = since / _sums_from(budget, 0).clamp(min=EPSILON) * (1 - spent[-1])
    age = torch.arange(window - 1, -1, -1, device=snapshots.device, dtype=torch.float64) / window
    features = torch.stack(
        [
            log_ratio(size, whole_size),
            log_ratio(size, size.sum(1, keepdim=True) / real.sum().clamp(min=1)),
            log_ratio(size / budget.clamp(min=EPSILON), size.sum(1, keepdim=True) / budget.sum().clamp(min=EPSILON)),
            with_before / (size * before).clamp(min=EPSILON),
            along / (size * whole_size).clamp(min=EPSILON),
            log_ratio(displaced, whole_size),
            log_ratio(since, whole_size),
            since / path.clamp(min=EPSILON),
            log_ratio(to_come, whole_size),
            age.expand_as(size),
        ],
        dim=-1,
    )
    return features.to(snapshots.dtype) * real.unsqueeze(-1)


def _sums_from(values: torch.Tensor, dim: int) -> torch.Tensor:
    """At each position of a dimension, the sum from there to the end."""
    return values.flip(dim).cumsum(dim).flip(dim)


def unit_context(units: int, progress: float, relative_rate: torch.Tensor, spent: torch.Tensor) -> torch.Tensor:
    """
    Where each unit stands in the model and in the run.

    Args:
        units (`int`): number of units of the whole model.
        progress (`float`): fraction of the run that is done.
        relative_rate (`torch.Tensor` of shape `()`): learning rate as a fraction of its peak.
        spent (`torch.Tensor` of shape `()`): share of the summed learning rate that is spent.

    Returns:
        `torch.Tensor` of shape `(units, 4)`: relative depth, progress, relative learning rate, and the share of the
        summed learning rate that is left.
    """
    depth = torch.arange(units, dtype=torch.float32, device="cpu") / max(1, units - 1)
    now = torch.stack([depth.new_tensor(progress), relative_rate.cpu(), 1 - spent.cpu()])
    return torch.cat([depth.unsqueeze(1), now.expand(units, -1)], dim=1)


def probe_features(changes: torch.Tensor) -> torch.Tensor:
    r"""
    How the outputs on the front probe move, in quantities that do not depend on the size of the outputs.

    With \\(h_l\\) the mean squared change of the unit's output since an earlier snapshot \\(l\\) of the probe,
    \\(y_l\\) that of the model's output, and \\(l = 0\\) the snapshot at the start of the run, the features are
    \\(\log_{10} h_l / h_0\\) for each earlier snapshot but the first, \\(\log_{10} y_l / y_0\\) likewise, and a 1.

    Args:
        changes (`torch.Tensor` of shape `(units, snapshots, 2)`):
            \\(h_l\\) and \\(y_l\\) of each unit; the start of the run comes last.

    Returns:
        `torch.Tensor` of shape `(units, 7)`.
    """
    hidden, output = changes.double().unbind(-1)
    parts = [log_ratio(part[:, :-1], part[:, -1:]) for part in (hidden, output)]
    return torch.cat([*parts, torch.ones_like(output[:, :1])], dim=-1).float()
