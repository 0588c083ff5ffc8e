"""Egeria (Wang et al., EuroSys 2023, arXiv 2201.06227): the front block freezes when its plasticity stops falling."""

from typing import Any

import torch

from .base import Decision, Observation, Policy, require

ROUNDING = 1 + 1e-6  # a schedule that divides the rate by ten may give a little more than a tenth
TINY = 1e-30


class EgeriaPolicy(Policy):
    r"""
    Freezes the front block once its plasticity has become steady, then looks at the next one; trains all again when the
    learning rate has dropped.

    The plasticity of unit $l$ is the similarity-preserving loss (arXiv 1907.09682, equation 4) between its outputs $A$
    for some rows and those of a reference, $B$: $P_l = \|G_A - G_B\|_F^2 / b^2$, where $G$ holds the scalar products
    of the $b$ rows, each row of $G$ scaled to length 1. It is smoothed by a moving average over `window` freezing stages.
    The front active unit freezes when the slope of a straight line through the last `window` values has been at most
    `tolerance` times its steepest slope so far.

    When sudden falls have brought the learning rate to `drop` of what it was at the last freeze, everything trains again, and
    the window is halved from then on. A fall is sudden if one step brings it to the square root of `drop` or less; a schedule
    that glides down to zero has none.

    What differs from the paper: the rows are always the same (the front probe's), so the reference is a snapshot of outputs
    instead of a quantized copy of the model; units are blocks, and the stem freezes with the first one. No public code was
    found and the paper's text could not be read for this: `window`, `tolerance`, `drop` and `renew_every` are ours.

    Args:
        window (`int`, *optional*, defaults to `5`): freezing stages in a moving average and in a slope.
        tolerance (`float`, *optional*, defaults to `0.2`): slope of a steady unit, relative to its steepest one.
        renew_every (`int`, *optional*, defaults to `5`): freezing stages after which the reference is taken anew.
        drop (`float`, *optional*, defaults to `0.1`): sudden fall of the learning rate at which everything trains again.
    """

    front_probe = True
    min_probe_examples = 4

    def __init__(self, window: int = 5, tolerance: float = 0.2, renew_every: int = 5, drop: float = 0.1):
        require("window", window, window >= 2, "at least 2")
        require("tolerance", tolerance, tolerance >= 0, "at least 0")
        require("renew_every", renew_every, renew_every >= 1, "at least 1")
        require("drop", drop, 0 < drop < 1, "between 0 and 1")
        self.window, self.tolerance, self.renew_every, self.drop = window, tolerance, renew_every, drop
        self.reset()

    def reset(self) -> None:
        """Forget all outputs."""
        self._window = self.window  # halved by each drop
        self._reference: list[torch.Tensor] = []
        self._plasticity: list[list[float]] = []
        self._steepest: list[float] = []
        self._stages = 0
        self._froze_at: int | None = None

    def decide(self, observation: Observation) -> Decision:
        """Judge the front active unit, unless the learning rate has dropped."""
        probe, depth = observation.probe, observation.depth
        if probe is None or probe.last is None:
            return Decision(depth, "no outputs yet")
        grams = [normalized_gram(hidden).cpu() for hidden in probe.last.hidden]
        if not self._reference:
            first = probe.first or probe.last
            self._reference = [normalized_gram(hidden).cpu() for hidden in first.hidden]
            self._plasticity = [[] for _ in grams]
            self._steepest = [0.0] * len(grams)
        for unit, (gram, reference) in enumerate(zip(grams, self._reference, strict=True)):
            self._plasticity[unit].append(similarity_loss(gram, reference))
        self._stages += 1
        if self._stages % self.renew_every == 0:
            self._reference = grams
        rates = observation.rates.relative[self._froze_at : observation.step + 1]
        if depth and self._froze_at is not None and self._left(rates) <= self.drop * ROUNDING:
            self._froze_at, self._window = None, max(2, self._window // 2)
            return Decision(0, f"the learning rate has fallen to {rates[-1]:.2g} of its peak", unfreeze=True)
        front = max(1, depth)
        if front == observation.units:
            return Decision(depth, "all blocks are frozen")
        smooth = [self._smooth(values) for values in self._plasticity]
        for unit in range(front, observation.units):
            if len(smooth[unit]) >= self._window:
                self._steepest[unit] = max(self._steepest[unit], abs(slope(smooth[unit][-self._window :])))
        if len(smooth[front]) < 2 * self._window:
            return Decision(depth, "not enough plasticity values yet")
        steep, limit = abs(slope(smooth[front][-self._window :])), self.tolerance * self._steepest[front]
        if not steep <= limit:
            return Decision(depth, f"slope of the plasticity {steep:.3g}, limit {limit:.3g}")
        self._froze_at = observation.step
        return Decision(front + 1, f"slope of the plasticity {steep:.3g}, limit {limit:.3g}")

    def _smooth(self, values: list[float]) -> list[float]:
        parts = (values[max(0, end - self._window) : end] for end in range(1, len(values) + 1))
        return [sum(part) / len(part) for part in parts]

    def _left(self, rates: torch.Tensor) -> float:
        """What sudden falls have left of the first of some learning rates."""
        ratios = rates[1:] / rates[:-1].clamp(min=TINY)
        sudden = (ratios <= self.drop**0.5 * ROUNDING) & (rates[1:] > 0)
        return float(ratios[sudden].prod())

    def state_dict(self) -> dict[str, Any]:
        """
        JSON values and tensors: `"reference"` (`list[torch.Tensor]`), `"plasticity"` (by unit, one number a stage),
        `"steepest"`, `"stages"`, `"window"` and `"froze_at"` (the step of the last freeze, or `None`).
        """
        return {
            "reference": list(self._reference),
            "plasticity": [list(values) for values in self._plasticity],
            "steepest": list(self._steepest),
            "stages": self._stages,
            "window": self._window,
            "froze_at": self._froze_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._reference, self._plasticity = list(state["reference"]), [list(v) for v in state["plasticity"]]
        self._steepest, self._stages = list(state["steepest"]), state["stages"]
        self._window, self._froze_at = state["window"], state["froze_at"]


def normalized_gram(hidden: torch.Tensor) -> torch.Tensor:
    """Scalar products of the rows of `(rows, values)`, as `(rows, rows)`, each row scaled to length 1."""
    return torch.nn.functional.normalize(hidden.float() @ hidden.float().T, dim=1)


def similarity_loss(gram: torch.Tensor, reference: torch.Tensor) -> float:
    """The similarity-preserving loss of two normalized Gram matrices `(rows, rows)`: their mean squared difference."""
    return float((gram - reference).pow(2).mean())


def slope(values: list[float]) -> float:
    """Slope of the straight line that fits values at steps of one best, by least squares."""
    middle = (len(values) - 1) / 2
    spread = sum((i - middle) ** 2 for i in range(len(values)))
    return sum((i - middle) * value for i, value in enumerate(values)) / spread if spread else 0.0
