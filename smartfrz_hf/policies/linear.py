"""A prefix that grows evenly over the run, after MosaicML Composer's layer freezing."""

from ..config import share_of
from .base import Decision, Observation, Policy


class LinearPolicy(Policy):
    """
    Grows the depth linearly from nothing at `start` to `level` of all units at the end of the run.

    Composer (`algorithms/layer_freezing`) freezes `freeze_level` of the layers depth-first, growing linearly from
    `freeze_start` to the end of training.

    Args:
        start (`float`): fraction of the run at which freezing starts.
        level (`float`): fraction of the units frozen at the end.
    """

    def __init__(self, start: float, level: float):
        self.start, self.level = start, level

    def decide(self, observation: Observation) -> Decision:
        """Freeze to the depth that the schedule has reached."""
        depth = self.most(observation.units, observation.progress)
        return Decision(max(depth, observation.depth), f"schedule at {observation.progress:.0%} of the run")

    def most(self, units: int, progress: float = 1.0) -> int:
        """The depth that the schedule has reached."""
        reached = max(0.0, (progress - self.start) / (1 - self.start))
        return share_of(reached * self.level, units)
