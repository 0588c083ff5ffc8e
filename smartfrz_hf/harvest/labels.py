"""Labels: when a unit counts as converged."""

import torch


def settled(cka: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    Whether each unit's output is, and from then on stays, as similar to its own end as `threshold` says.

    Args:
        cka (`torch.Tensor` of shape `(probes, units)`): linear CKA to the end of the run.
        threshold (`float`): CKA from which a representation counts as final.

    Returns:
        `torch.Tensor` of shape `(probes, units)`, `bool`.
    """
    lowest_to_come = cka.flip(0).cummin(0).values.flip(0)
    return lowest_to_come >= threshold
