"""A fixed prefix, frozen from the start: what people do by hand."""

from ..config import share_of
from .base import Decision, Observation, Policy


class StaticPolicy(Policy):
    """
    Freezes a fixed number of units before the first step.

    Args:
        depth (`float`): units to freeze: a fraction of all units below 1, a count from 1 on.

    Raises:
        ValueError: on `decide`, a count beyond the number of units.
    """

    decides_once = True

    def __init__(self, depth: float):
        self.depth = depth

    def decide(self, observation: Observation) -> Decision:
        """Freeze to the fixed depth."""
        depth = self.most(observation.units)
        if depth > observation.units:
            raise ValueError(
                f"`static_depth` is {depth}, but the model has {observation.units} units (the stem and "
                f"{observation.units - 1} blocks); it must be at most {observation.units}."
            )
        return Decision(max(depth, observation.depth), "static")

    def most(self, units: int, progress: float = 1.0) -> int:
        """The fixed depth."""
        return share_of(self.depth, units) if self.depth < 1 else int(self.depth)
