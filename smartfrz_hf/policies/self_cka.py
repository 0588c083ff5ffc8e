"""Self-CKA, after SimFreeze (Li et al., 2024, arXiv 2401.16694): blocks whose similarity to their start is steady freeze."""

from typing import Any

import torch

from .base import Decision, Observation, Policy, require


class SelfCKAPolicy(Policy):
    r"""
    Freezes the front while the similarity of its outputs to those at the start of the run no longer moves.

    At each freezing stage $t$, unit $l$ gives the outputs $X_{t,l}$ for the rows of the front probe, one row of the matrix
    for each. $c_{t,l}$ is their linear CKA (Kornblith et al., 2019, equation 3) with the outputs $X_{0,l}$ before the first
    step. A unit is steady if $|c_{t,l} - c_{t-1,l}| \le$ `tolerance` $\cdot\, c_{t-1,l}$, and the steady units at the front
    freeze.

    SimFreeze freezes steady layers wherever they are, and unfreezes them when the data change; a run of one task has no
    such change. The text of the paper could not be read for this: the tolerance of 1 % is ours, and so is the number of
    rows (`probe_examples`).

    Args:
        tolerance (`float`, *optional*, defaults to `0.01`): largest relative change of a steady unit's similarity.
    """

    front_probe = True
    min_probe_examples = 4

    def __init__(self, tolerance: float = 0.01):
        require("tolerance", tolerance, tolerance >= 0, "at least 0")
        self.tolerance = tolerance
        self.reset()

    def reset(self) -> None:
        """Forget all outputs."""
        self._start: list[torch.Tensor] = []
        self._similarity: list[float] | None = None

    def decide(self, observation: Observation) -> Decision:
        """Freeze the units at the front whose similarity has kept steady since the last freezing stage."""
        probe = observation.probe
        if probe is None or probe.last is None:
            return Decision(observation.depth, "no outputs yet")
        if not self._start:
            first = probe.first or probe.last
            self._start = [centered_gram(hidden).cpu() for hidden in first.hidden]
            self._similarity = [1.0] * observation.units
        grams = [centered_gram(hidden).cpu() for hidden in probe.last.hidden]
        now = [linear_cka(gram, start) for gram, start in zip(grams, self._start, strict=True)]
        before, self._similarity = self._similarity or now, now
        reached = observation.depth
        while reached < observation.units and abs(now[reached] - before[reached]) <= self.tolerance * before[reached]:
            reached += 1
        listed = ", ".join(f"{value:.4f}" for value in now[observation.depth : reached + 1])
        return Decision(reached, f"similarity to the start {listed}")

    def state_dict(self) -> dict[str, Any]:
        """`"start"` (`list[torch.Tensor]` of shape `(rows, rows)`) and `"similarity"` (one number a unit, or `None`)."""
        return {"start": list(self._start), "similarity": self._similarity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._start, self._similarity = list(state["start"]), state["similarity"]


def centered_gram(hidden: torch.Tensor) -> torch.Tensor:
    """
    Scalar products of the rows, after the mean row is subtracted.

    Args:
        hidden (`torch.Tensor`): of shape `(rows, values)`.

    Returns:
        `torch.Tensor` of shape `(rows, rows)`, `float32`.
    """
    centered = hidden.float() - hidden.float().mean(0)
    return centered @ centered.T


def linear_cka(gram: torch.Tensor, other: torch.Tensor) -> float:
    """Linear CKA from two centered Gram matrices, in `[0, 1]`; 0 where the outputs of all rows are equal."""
    scale = float(gram.norm() * other.norm())
    return float((gram * other).sum()) / scale if scale else 0.0
