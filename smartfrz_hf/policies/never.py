"""Nothing ever freezes: plain training, for comparison."""

from .base import Decision, Observation, Policy


class NeverPolicy(Policy):
    """Keeps the depth as it is."""

    def decide(self, observation: Observation) -> Decision:
        """Keep the depth."""
        return Decision(observation.depth, "never")

    def most(self, units: int, progress: float = 1.0) -> int:
        """None."""
        return 0
