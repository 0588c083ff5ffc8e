"""What the predictor is told: how sampled weights move, and where each unit stands, in terms that transfer to any model."""

import torch

DYNAMICS = 10
CONTEXT = 4
PROBE_FEATURES = 7
EPSILON = 1e-12
MIN_RATIO, MAX_RATIO = 1e-6, 1e3  # a ratio outside says no more than one at the bound


def log_ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Decimal logarithm of `a / b`, bounded."""
    return (a / b.clamp(min=EPSILON)).clamp(MIN_RATIO, MAX_RATIO).log10()


def dynamics(snapshots: torch.Tensor, start: torch.Tensor, mask: torch.Tensor, spent: torch.Tensor) -> torch.Tensor:
    r"""
    How the sampled weights move, in quantities that know neither their scale, their order nor their number.

    With \\(w_t\\) the snapshot, \\(w_0\\) the one at the start of the run, \\(w_T\\) the last one,
    \\(u_t = w_t - w_{t-1}\\), \\(b_t\\) the share of the run's summed learning rate spent before the snapshot and
    \\(\Delta b_t = b_t - b_{t-1}\\), the ten quantities of a snapshot are

    1. \\(\log_{10} \|u_t\| / \|w_T - w_0\|\\), the update against the whole way so far;
    2. \\(\log_{10} \|u_t\| / \overline{\|u\|}\\), the update against the window's mean;
    3. \\(\log_{10} \left(\|u_t\| / \Delta b_t\right) / \left(\sum \|u\| / \sum \Delta b\right)\\), the same for each
       unit of learning rate;
    4. \\(\cos(u_t, u_{t-1})\\), whether updates agree;
    5. \\(\cos(u_t, w_T - w_0)\\), whether the update goes the way of the whole run;
    6. \\(\log_{10} \|w_t - w_0\| / \|w_T - w_0\|\\), the displacement from the start against the whole way;
    7. \\(\log_{10} \|w_T - w_{t-1}\| / \|w_T - w_0\|\\), the way since then against the whole way;
    8. \\(\|w_T - w_{t-1}\| / \sum_{s \ge t} \|u_s\|\\), the straightness of the path since then;
    9. \\(\log_{10} \left(\|w_T - w_{t-1}\| / (b_T - b_{t-1})\right) (1 - b_T) / \|w_T - w_0\|\\), the way to come if it
       goes on as it did since then, against the way come so far;
    10. the snapshot's age, as a fraction of the window.

    Lengths are measured by the way that the run has come, and not by the weights' own norm: a pretrained model probe_features by a
    small part of that, and what a network learns of it on models trained from scratch misleads it there.

    Args:
        snapshots (`torch.Tensor` of shape `(units, window, weights_per_unit)`): oldest first.
        start (`torch.Tensor` of shape `(units, weights_per_unit)`): the snapshot at the start of the run.
        mask (`torch.Tensor` of shape `(window,)`, `bool`): which snapshots have a real one before them.
        spent (`torch.Tensor` of shape `(window,)`): share of the summed learning rate spent before each snapshot.

    Returns:
        `torch.Tensor` of shape `(units, window, 10)`; zero where the mask is off.
    """
    real, window = mask.to(snapshots.dtype), len(mask)
    update = torch.zeros_like(snapshots)
    torch.sub(snapshots[:, 1:], snapshots[:, :-1], out=update[:, 1:])
    update *= real.unsqueeze(-1)
    whole = snapshots[:, -1] - start
    # All lengths and angles follow from the products of updates with each other and with the whole way. Sums of many
    # are taken in double precision, for what they leave can be small.
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
    """At each place of a dimension, the sum from there to its end."""
    return values.flip(dim).cumsum(dim).flip(dim)


def contexts(units: int, progress: float, rate: torch.Tensor, spent: torch.Tensor) -> torch.Tensor:
    """
    Where each unit stands.

    Args:
        units (`int`): of the whole model.
        progress (`float`): fraction of the run that is done.
        rate (`torch.Tensor` of shape `()`): learning rate as a fraction of its peak.
        spent (`torch.Tensor` of shape `()`): share of the summed learning rate that is spent.

    Returns:
        `torch.Tensor` of shape `(units, 4)`, relative depth, progress, rate, and share of the rate still to come.
    """
    depth = torch.arange(units) / max(1, units - 1)
    now = torch.stack([torch.tensor(progress), rate, 1 - spent])
    return torch.cat([depth.unsqueeze(1), now.expand(units, -1)], dim=1)


def probe_features(changes: torch.Tensor) -> torch.Tensor:
    r"""
    How the front probe probe_features, in quantities that know nothing of the size of what models put out.

    With \\(h_l\\) the mean squared distance of what leaves the unit from what left it at an earlier look \\(l\\),
    \\(y_l\\) that of what the model says, and \\(l = 0\\) the look at the start of the run, they are, for each earlier
    look but that, decimal logarithms of \\(h_l / h_0\\) and of \\(y_l / y_0\\), and last a one: all are zero where
    nothing is known.

    Args:
        changes (`torch.Tensor` of shape `(units, looks, 2)`): \\(h\\) and \\(y\\) of each unit, the start last.

    Returns:
        `torch.Tensor` of shape `(units, 7)`.
    """
    hidden, output = changes.double().unbind(-1)
    parts = [log_ratio(part[:, :-1], part[:, -1:]) for part in (hidden, output)]
    return torch.cat([*parts, torch.ones_like(output[:, :1])], dim=-1).float()
