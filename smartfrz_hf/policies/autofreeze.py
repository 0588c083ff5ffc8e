"""AutoFreeze (Liu, Agarwal, Venkataraman, 2021, arXiv 2102.01386): blocks whose gradients change little freeze."""

from typing import Any

import numpy as np
import torch

from ..signals.steps import BeforeUpdate, l1_norm
from .base import Decision, Observation, Policy, require


class AutoFreezePolicy(Policy):
    r"""
    Freezes the blocks in front of the first one whose gradient norm still changes much.

    At the end of interval $T$, block $l$ has the accumulated gradient $\Delta_{T,l}$ (the sum of its gradients over the
    interval) and changes by
    $\eta_l = |\, \|\Delta_{T-1,l}\|_1 - \|\Delta_{T,l}\|_1 \,| \,/\, \|\Delta_{T-1,l}\|_1$.
    The active blocks in front of the first one with $\eta_l$ at or above the `percentile` of the active blocks' $\eta$ freeze.
    The paper's code measures the encoder blocks only; the stem freezes together with the first block.

    An interval is the time between two freezing stages. The paper's code divides a run into 10 intervals by default and
    into 20 in its README, which is `SmartFRZConfig`'s default (`decide_every=0.05`). The paper rebuilds the optimizer when
    blocks freeze and so loses its state; here the active blocks keep theirs.

    The sums take as much memory as the gradients of the active blocks. They are part of a checkpoint, except under FSDP2,
    where the interval in which a run resumes starts anew.

    Args:
        percentile (`float`, *optional*, defaults to `50.0`): 50 is the median, as published.
    """

    def __init__(self, percentile: float = 50.0):
        require("percentile", percentile, 0 <= percentile <= 100, "from 0 to 100")
        self.percentile = percentile
        self.reset()

    def reset(self) -> None:
        """Forget all gradients."""
        self._sums: dict[str, torch.Tensor] = {}
        self._units: dict[str, int] = {}
        self._norms: list[float] | None = None

    def before_update(self, now: BeforeUpdate) -> None:
        """Add the gradients of the active blocks to the sums of the interval."""
        for unit in range(max(1, now.depth), now.units):
            for name, gradient in now.gradients(unit).items():
                total = self._sums.get(name)
                self._units[name] = unit
                self._sums[name] = (
                    gradient.float().clone() if total is None else total.to(gradient.device).add_(gradient)
                )

    def decide(self, observation: Observation) -> Decision:
        """Compare the interval that ends now with the one before."""
        if not self._sums:
            return Decision(observation.depth, "no gradients yet")
        norms = [0.0] * observation.units
        for name, total in self._sums.items():
            norms[self._units[name]] += l1_norm(total)
        before, self._norms = self._norms, norms
        self._sums, self._units = {}, {}
        if before is None:
            return Decision(observation.depth, "the first interval")
        active = range(max(1, observation.depth), observation.units)
        changes = [abs(before[u] - norms[u]) / before[u] if before[u] else 0.0 for u in active]
        limit = float(np.percentile(changes, self.percentile)) if changes else float("nan")
        kept = next(
            (unit for unit, change in zip(active, changes, strict=True) if not change < limit), observation.depth
        )
        depth = kept if kept > 1 else 0  # the first block stays active, and so does the stem
        return Decision(
            max(depth, observation.depth), f"gradient norms change by {_listed(changes)}, limit {limit:.3g}"
        )

    def state_dict(self) -> dict[str, Any]:
        """`"norms"` of the last interval by unit, or `None`, and `"sums"`: `{"unit": int, "sum": torch.Tensor}` by name."""
        whole = not any(hasattr(total, "to_local") for total in self._sums.values())
        kept = self._sums if whole else {}
        sums = {name: {"unit": self._units[name], "sum": total.clone()} for name, total in kept.items()}
        return {"norms": self._norms, "sums": sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._norms = state["norms"]
        self._sums = {name: entry["sum"].clone() for name, entry in state["sums"].items()}
        self._units = {name: entry["unit"] for name, entry in state["sums"].items()}


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
