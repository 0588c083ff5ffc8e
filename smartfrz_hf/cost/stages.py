"""What a ledger keeps of each freezing stage."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

NEVER = sys.maxsize  # a step


@dataclass
class Stage:
    """
    One freezing stage that changed what is frozen.

    Attributes:
        step (`int`): optimizer steps done.
        depth (`int`): frozen units of the front from then on.
        units (`list[str]`): names of the units that froze; or, where fewer are frozen than before, that train again.
        reason (`str`): why, in the policy's words.
        apart (`list[str]`): names of the units that are frozen behind units that train from then on.
        attentions (`list[list[float]]`, *optional*):
            For each unit that froze, the predictor's attention to each snapshot of the weight history, oldest first.
        snapshot_steps (`list[int]`, *optional*): the optimizer steps at which these snapshots were taken.
    """

    step: int
    depth: int
    units: list[str]
    reason: str
    apart: list[str] = field(default_factory=list)
    attentions: list[list[float]] | None = None
    snapshot_steps: list[int] | None = None


@dataclass
class StageRecord:
    """
    One freezing stage, whether it changed the depth or not.

    Attributes:
        step (`int`): optimizer steps done.
        seconds (`float`): wall-clock time of the run until then, without what was lost when it was interrupted.
        depth (`int`): frozen units of the front before it, so the first unit that was judged.
        probabilities (`list[float]`, *optional*): of each unit from there on, from a policy that has them; 1 for units that
            were frozen already.
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
            return f"froze {self.depth} unit{'' if self.depth == 1 else 's'} ({self.reason}{rate})"
        if self.points_lost is not None and len(self.points_lost) > 1:
            return f"froze nothing (no front is within the limits; the first unit alone is predicted to cost {self.points_lost[1]:.1f} points)"
        return f"froze nothing ({self.reason})"


def frozen_spans(stages: Iterable[Mapping[str, Any]], end: int) -> dict[str, list[tuple[int, int]]]:
    """
    From which step to which each unit was, or is to be, frozen. Units that never were are left out.

    Args:
        stages (`Iterable[Mapping]`): [`Stage`]s as dictionaries, in order.
        end (`int`): the last step of the run.
    """
    spans: dict[str, list[tuple[int, int]]] = {}
    before = 0
    for stage in stages:
        frozen = stage["depth"] + len(stage["apart"])
        for unit in stage["units"]:
            if frozen > before:
                spans.setdefault(unit, []).append((stage["step"], end))
            else:
                spans[unit][-1] = (spans[unit][-1][0], stage["step"])
        before = frozen
    return spans


def freeze_steps(stages: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """
    The step at which each unit froze that is frozen after some stages.

    Args:
        stages (`Iterable[Mapping]`): as for [`frozen_spans`].
    """
    return {unit: spans[-1][0] for unit, spans in frozen_spans(stages, NEVER).items() if spans[-1][1] == NEVER}
