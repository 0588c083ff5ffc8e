"""FreezeOut (Brock et al., 2017, arXiv 1706.04983): learning rates fall to zero unit by unit, and then the unit freezes."""

import math

from .base import Decision, Observation, Policy, require


class FreezeOutPolicy(Policy):
    r"""
    Anneals the learning rate of each unit to zero on a fixed schedule, from the front on, and freezes it then.

    Unit $i$ of $L$ freezes at the fraction $t_i = (t_0 + (1 - t_0)\, i / L)^p$ of the run; the head counts as unit $L$.
    Its rate at the fraction $t$ is $\alpha_i(t) = \tfrac{1}{2}\, \alpha\, (1 + \cos(\pi t / t_i))$, divided by $t_i$ with
    `scaled` (equations 1 and 2, with the factor 1/2 that the author's README adds). Published: `cubic`, scaled, $t_0 = 0.8$.

    The head keeps the rate that the run's own schedule gives it, and each unit gets that rate times
    $\alpha_i(t) / \alpha_L(t)$. With a cosine schedule without warm-up (`lr_scheduler_type="cosine"`), that is the paper's
    method exactly; with another schedule, it is that schedule, bent in the same way.

    Freezing happens at freezing stages; from $t_i$ up to the next one, a unit trains on with a rate of zero.

    Args:
        start (`float`, *optional*, defaults to `0.8`): $t_0$, in `(0, 1]`.
        power (`int`, *optional*, defaults to `3`): $p$; 1 is `linear` and 3 is `cubic`.
        scaled (`bool`, *optional*, defaults to `True`): whether rates are divided by $t_i$, so that all units move equally far.
    """

    def __init__(self, start: float = 0.8, power: int = 3, scaled: bool = True):
        require("start", start, 0 < start <= 1, "above 0 and at most 1")
        require("power", power, power > 0, "above 0")
        self.start, self.power, self.scaled = start, power, scaled

    def freeze_times(self, units: int) -> list[float]:
        """The fraction of the run at which each of the units freezes."""
        return [(self.start + (1 - self.start) * unit / units) ** self.power for unit in range(units)]

    def rate_factors(self, progress: float, units: int) -> list[float]:
        """What the learning rate of each unit is multiplied with in the next step."""
        head = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        factors = []
        for time in self.freeze_times(units):
            annealed = (1 + math.cos(math.pi * progress / time)) / 2 if progress < time else 0.0
            factors.append(annealed / head / (time if self.scaled else 1.0) if annealed else 0.0)
        return factors

    def decide(self, observation: Observation) -> Decision:
        """Freeze the units whose time has come."""
        due = self.most(observation.units, observation.progress)
        return Decision(max(due, observation.depth), f"schedule at {observation.progress:.0%} of the run")

    def most(self, units: int, progress: float = 1.0) -> int:
        """The units whose time has come."""
        return sum(progress >= time for time in self.freeze_times(units))
