"""A front that grows at random times: shows what the choice of times is worth at the same ratio of freezing."""

import random

from .base import Decision, Observation, Policy, require


class RandomPolicy(Policy):
    """
    Freezes the front at random times, so that a given fraction of all unit-steps is frozen.

    One time a unit is drawn evenly over the run, the earliest for the stem. A common power of them makes the mean frozen
    fraction of the units over the run equal to `ratio`, up to the time between two freezing stages.

    Args:
        ratio (`float`, *optional*, defaults to `0.5`): mean fraction of the units that is frozen, in `[0, 1)`.
        seed (`int`, *optional*, defaults to `0`): of the times.
    """

    def __init__(self, ratio: float = 0.5, seed: int = 0):
        require("ratio", ratio, 0 <= ratio < 1, "at least 0 and below 1")
        self.ratio, self.seed = ratio, seed

    def freeze_times(self, units: int) -> list[float]:
        """The fraction of the run at which each of the units freezes."""
        if not self.ratio:
            return [float("inf")] * units
        generator = random.Random(self.seed)
        drawn = sorted(generator.random() for _ in range(units))
        low, high = 0.0, 1e3
        for _ in range(100):  # the mean time falls as the power grows
            power = (low + high) / 2
            low, high = (power, high) if sum(t**power for t in drawn) / units > 1 - self.ratio else (low, power)
        return [time**power for time in drawn]

    def decide(self, observation: Observation) -> Decision:
        """Freeze the units whose time has come."""
        due = self.most(observation.units, observation.progress)
        return Decision(max(due, observation.depth), f"random times, at {observation.progress:.0%} of the run")

    def most(self, units: int, progress: float = 1.0) -> int:
        """The units whose time has come."""
        return sum(progress >= time for time in self.freeze_times(units))
