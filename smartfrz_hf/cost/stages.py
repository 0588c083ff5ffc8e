"""What a ledger keeps of each freezing stage."""

from dataclasses import dataclass


@dataclass
class Stage:
    """
    One freezing stage that changed the depth.

    Attributes:
        step (`int`): optimizer steps done.
        depth (`int`): frozen units from then on.
        units (`list[str]`): names of the units that froze; or, where the depth has fallen, that train again.
        reason (`str`): why, in the policy's words.
        attentions (`list[list[float]]`, *optional*):
            For each unit that froze, the predictor's attention to each snapshot of the weight history, oldest first.
        snapshot_steps (`list[int]`, *optional*): the optimizer steps at which these snapshots were taken.
    """

    step: int
    depth: int
    units: list[str]
    reason: str
    attentions: list[list[float]] | None = None
    snapshot_steps: list[int] | None = None


@dataclass
class StageRecord:
    """
    One freezing stage, whether it changed the depth or not.

    Attributes:
        step (`int`): optimizer steps done.
        seconds (`float`): wall-clock time of the run until then, without what was lost when it was interrupted.
        depth (`int`): frozen units before it, so the first unit that was judged.
        probabilities (`list[float]`, *optional*): of each unit from there on, from a policy that has them.
    """

    step: int
    seconds: float
    depth: int
    probabilities: list[float] | None = None


@dataclass
class StartStage:
    """
    What was decided at the end of the pilot.

    Attributes:
        step (`int`): optimizer steps done.
        depth (`int`): frozen units from then on.
        reason (`str`): why, in the policy's words.
        rate_factor (`float`): what the learning rate of the rest is multiplied with.
        savings (`list[float]`): by depth from 0 on, the share of a step's FLOPs that freezing so many units saves without a cache.
        points_lost (`list[float]`, *optional*): by depth, the points that it was predicted to cost.
    """

    step: int
    depth: int
    reason: str
    rate_factor: float
    savings: list[float]
    points_lost: list[float] | None = None

    def __str__(self) -> str:
        if self.depth:
            rate = f"; the rest trains at {self.rate_factor:.2f} times the learning rate"
            return f"froze {self.depth} units ({self.reason}{rate})"
        if self.points_lost is not None and len(self.points_lost) > 1:
            return f"froze nothing (no front is within the limits; the first unit alone is predicted to cost {self.points_lost[1]:.1f} points)"
        return f"froze nothing ({self.reason})"
