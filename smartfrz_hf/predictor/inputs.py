"""What the predictor is told: how sampled weights move, and where each unit stands, in terms that transfer to any model."""

import torch

DYNAMICS = 10
CONTEXT = 4
EPSILON = 1e-12
LEAST, MOST = 1e-6, 1e3  # a ratio outside says no more than one at the bound


def log_ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Decimal logarithm of `a / b`, bounded."""
    return (a / b.clamp(min=EPSILON)).clamp(LEAST, MOST).log10()


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine over the last dimension; zero where a vector is."""
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=EPSILON)


def dynamics(snapshots: torch.Tensor, start: torch.Tensor, mask: torch.Tensor, spent: torch.Tensor) -> torch.Tensor:
    r"""
    How the sampled weights move, in quantities that know neither their scale, their order nor their number.

    With \\(w_t\\) the snapshot, \\(w_0\\) the one at the start of the run, \\(w_T\\) the last one,
    \\(u_t = w_t - w_{t-1}\\), \\(b_t\\) the share of the run's summed learning rate spent before the snapshot and
    \\(\Delta b_t = b_t - b_{t-1}\\), the ten quantities of a snapshot are

    1. \\(\log_{10} \|u_t\| / \|w_T\|\\), the relative size of the update;
    2. \\(\log_{10} \|u_t\| / \overline{\|u\|}\\), the update against the window's mean;
    3. \\(\log_{10} \left(\|u_t\| / \Delta b_t\right) / \left(\sum \|u\| / \sum \Delta b\right)\\), the same for each
       unit of learning rate;
    4. \\(\cos(u_t, u_{t-1})\\), whether updates agree;
    5. \\(\cos(u_t, w_T - w_0)\\), whether the update goes the way of the whole run;
    6. \\(\log_{10} \|w_t - w_0\| / \|w_T\|\\), the displacement from the start;
    7. \\(\log_{10} \|w_T - w_{t-1}\| / \|w_T\|\\), the way since then;
    8. \\(\|w_T - w_{t-1}\| / \sum_{s \ge t} \|u_s\|\\), the straightness of the path since then;
    9. \\(\log_{10} \left(\|w_T - w_{t-1}\| / (b_T - b_{t-1})\right) (1 - b_T) / \|w_T - w_0\|\\), the way to come if it
       goes on as it did since then, against the way come so far;
    10. the snapshot's age, as a fraction of the window.

    Args:
        snapshots (`torch.Tensor` of shape `(units, window, samples)`): oldest first.
        start (`torch.Tensor` of shape `(units, samples)`): the snapshot at the start of the run.
        mask (`torch.Tensor` of shape `(window,)`, `bool`): which snapshots have a real one before them.
        spent (`torch.Tensor` of shape `(window,)`): share of the summed learning rate spent before each snapshot.

    Returns:
        `torch.Tensor` of shape `(units, window, 10)`; zero where the mask is off.
    """
    real = mask.to(snapshots.dtype)
    last, before = snapshots[:, -1:], snapshots.roll(1, 1)
    update = (snapshots - before) * real.unsqueeze(-1)
    size, norm = update.norm(dim=-1), last.norm(dim=-1)
    since, whole = (last - before).norm(dim=-1), last - start.unsqueeze(1)
    path = size.flip(1).cumsum(1).flip(1)
    budget = (spent - spent.roll(1)) * real
    budget_since = budget.flip(0).cumsum(0).flip(0)
    speed = size / budget.clamp(min=EPSILON)
    mean_speed = size.sum(1, keepdim=True) / budget.sum().clamp(min=EPSILON)
    to_come = since / budget_since.clamp(min=EPSILON) * (1 - spent[-1])
    window = len(mask)
    age = torch.arange(window - 1, -1, -1, device=snapshots.device, dtype=snapshots.dtype) / window
    features = torch.stack(
        [
            log_ratio(size, norm),
            log_ratio(size, size.sum(1, keepdim=True) / real.sum().clamp(min=1)),
            log_ratio(speed, mean_speed),
            cosine(update, update.roll(1, 1) * real.roll(1).unsqueeze(-1)),
            cosine(update, whole),
            log_ratio((snapshots - start.unsqueeze(1)).norm(dim=-1), norm),
            log_ratio(since, norm),
            since / path.clamp(min=EPSILON),
            log_ratio(to_come, whole.norm(dim=-1)),
            age.expand_as(size),
        ],
        dim=-1,
    )
    return features * real.unsqueeze(-1)


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
