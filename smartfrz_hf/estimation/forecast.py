"""From what was measured to what a run is expected to take, save and cost."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..config import share_of
from ..policies.smartfrz import LOWERED_SHARE, MUCH_RAISED
from ..signals.pilot import MIN_STEPS
from .measured import Profile
from .text import summary

PAYS = 0.03  # share of the time that has to be saved
LEAST_COMPUTE = 0.01  # share of the FLOPs of the run
# When the blocks with the lowered threshold freeze: at 66 to 90 % of 27 runs, at 74 % on average (`benchmarks/quality/compare`).
LATER = 0.75
FEW_TRAINED = 0.05  # share of the parameters, as with LoRA


@dataclass
class DepthForecast:
    """
    What the run costs with so many units frozen from the end of the pilot on.

    Attributes:
        depth (`int`): frozen units, counted from the front; 0 is plain training.
        step_seconds (`float`): of an optimizer step, with its data, without an activation cache.
        cached_step_seconds (`float`, *optional*): where the cache serves all rows that it has room for.
        seconds, cached_seconds (`float`): of the whole run, without and with the cache. Evaluations are left out.
        memory (`int`):
            Bytes at the start of the backward pass: weights, gradients, optimizer state, and activations of one batch.
        cache_bytes (`int`): that the cache needs to keep all training rows; 0 without a cache.
        compute_saved (`float`): share of the FLOPs of the run, without the cache.
        points_lost (`float`, *optional*): points of accuracy that this is predicted to cost; `None` without a prediction.
    """

    depth: int
    step_seconds: float
    cached_step_seconds: float | None
    seconds: float
    cached_seconds: float
    memory: int
    cache_bytes: int
    compute_saved: float
    points_lost: float | None


@dataclass
class PointForecast:
    """
    What an operating point is expected to do at the start of the run. Later in the run more may freeze.

    Attributes:
        name (`str`): of the operating point, or the saving that was asked for.
        depth (`int`): units that freeze at the end of the pilot.
        compute_saved, time_saved, memory_saved (`float`): shares, time with the activation cache where it helps.
        later_saved (`float`):
            Share of the time, if the first five sixths of the blocks freeze at three quarters of the run, as they usually do where
            the learning rate has risen by a quarter or more. `time_saved` elsewhere.
        points_lost (`float`, *optional*): predicted points of accuracy.
        rate_factor (`float`): what the learning rate of the rest is multiplied with.
        reason (`str`): of the decision.
        least, most (`int`):
            The fewest and the most units that would freeze if the pilot ended earlier, at any time in its last third. The wider
            this range, the less certain is `depth`.
    """

    name: str
    depth: int
    compute_saved: float
    time_saved: float
    later_saved: float
    memory_saved: float
    points_lost: float | None
    rate_factor: float
    reason: str
    least: int = 0
    most: int = 0

    @property
    def sure(self) -> bool:
        """Whether the decision was the same throughout the last third of the pilot."""
        return self.least == self.most


@dataclass
class Estimate:
    """
    What SmartFRZ is expected to save in a training, and what that costs. `print` shows it as tables.

    Attributes:
        pays (`bool`): whether freezing from the start is expected to save time.
        verdict (`str`): why, in a sentence or two.
        depths (`list[DepthForecast]`): by depth, plain training first.
        points (`list[PointForecast]`): the operating points, or the saving that was asked for.
        chosen ([`PointForecast`], *optional*): the one that the configuration asks for; `None` without a pilot.
        profile ([`Profile`]): what was measured.
        cache_room (`int`): bytes that the cache may use.
        measured (`list[int]`): the depths at which steps were timed; the others lie in between.
    """

    pays: bool
    verdict: str
    depths: list[DepthForecast]
    points: list[PointForecast]
    chosen: PointForecast | None
    profile: Profile
    cache_room: int = 0
    measured: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        return summary(self)

    def to_dict(self) -> dict[str, Any]:
        """The forecasts as plain JSON values."""
        profile = self.profile
        run = {name: getattr(profile, name) for name in ("model", "device", "total_steps", "rows", "rows_per_step")}
        return {
            "pays": self.pays,
            "verdict": self.verdict,
            "run": run | {"units": profile.units, "seconds_to_measure": profile.seconds},
            "depths": [asdict(depth) for depth in self.depths],
            "points": [asdict(point) for point in self.points],
            "chosen": None if self.chosen is None else self.chosen.name,
        }


def forecast(
    profile: Profile, points_lost: list[float] | None, cache_room: int, chosen: str, cap: int, rate: bool, later: bool
) -> Estimate:
    """
    Put together what was measured.

    Args:
        profile ([`Profile`]): what was measured.
        points_lost (`list[float]`, *optional*): predicted points of accuracy, by depth from 1 on.
        cache_room (`int`): bytes that the activation cache may use.
        chosen (`str`): name of the decision that the configuration asks for.
        cap (`int`): most units that may freeze.
        rate (`bool`): whether the learning rate of the rest rises.
        later (`bool`): whether the threshold is lower once a front has frozen from the start.
    """
    depths = [_depth(profile, depth, points_lost, cache_room) for depth in range(profile.deepest + 1)]
    plain, pilot = depths[0], None if profile.observation is None else profile.observation.pilot
    points = []
    for name, decision in profile.decisions.items():
        depth, *earlier = (min(d, cap, profile.deepest) for d in (decision.depth, *profile.earlier_depths[name]))
        at = depths[depth]
        factor = pilot.rate_factor(at.depth) if pilot is not None and rate and at.depth else 1.0
        late = depths[max(depth, min(1 + share_of(LOWERED_SHARE, len(profile.units) - 1), cap, profile.deepest))]
        more = 0.0
        if later and factor >= MUCH_RAISED:
            more = (1 - LATER) * profile.total_steps * max(0.0, at.step_seconds - late.step_seconds)
        seconds = min(at.seconds, at.cached_seconds)
        points.append(
            PointForecast(
                name=name,
                depth=at.depth,
                compute_saved=at.compute_saved,
                time_saved=1 - seconds / plain.seconds,
                later_saved=1 - (seconds - more) / plain.seconds,
                memory_saved=1 - at.memory / plain.memory,
                points_lost=at.points_lost if at.depth else 0.0,
                rate_factor=factor,
                reason=decision.reason,
                least=min([depth, *earlier]),
                most=max([depth, *earlier]),
            )
        )
    point = next((point for point in points if point.name == chosen), None)
    pays, verdict = _verdict(profile, point, depths)
    return Estimate(
        pays, verdict, depths, points, point, profile, cache_room, measured=[cost.depth for cost in profile.costs]
    )


def _depth(profile: Profile, depth: int, points_lost: list[float] | None, cache_room: int) -> DepthForecast:
    costs = profile.costs
    at = [cost.depth for cost in costs]

    def between(values: list[float], known: list[int]) -> float:
        return float(np.interp(depth, known, values))

    load, steps = profile.load_seconds, profile.total_steps
    plain = costs[0].seconds + load
    frozen = min(plain, between([cost.seconds for cost in costs], at) + load)
    cached = [cost for cost in costs if cost.cached_seconds is not None]
    served = None
    cache_bytes = 0
    if depth and cached and depth >= cached[0].depth:
        known = [cost.depth for cost in cached]
        served = min(frozen, between([cost.cached_seconds or 0.0 for cost in cached], known) + load)
        cache_bytes = round(profile.rows * between([cost.cached_row_bytes or 0.0 for cost in cached], known))
    pilot = min(steps, profile.pilot_steps) if depth else steps
    rest = steps - pilot
    # Each row is computed once with the front frozen, and comes from the cache from then on, as far as there is room.
    again = max(0.0, rest - profile.steps_per_epoch) * (min(1.0, cache_room / cache_bytes) if cache_bytes else 0.0)
    seconds = pilot * plain + rest * frozen
    saved = profile.savings[depth] * rest / steps if depth else 0.0
    return DepthForecast(
        depth=depth,
        step_seconds=frozen if depth else plain,
        cached_step_seconds=served,
        seconds=seconds,
        cached_seconds=seconds - again * (frozen - (served or frozen)),
        memory=round(between([float(cost.memory) for cost in costs], at)),
        cache_bytes=cache_bytes,
        compute_saved=saved,
        points_lost=None if points_lost is None else (points_lost[depth - 1] if depth else 0.0),
    )


def _verdict(profile: Profile, point: PointForecast | None, depths: list[DepthForecast]) -> tuple[bool, str]:
    """Whether it pays, and why."""
    observation = profile.observation
    if profile.total_steps < 10 * MIN_STEPS:
        return False, (
            f"No: the run has only {profile.total_steps} optimizer steps. Below {10 * MIN_STEPS} there is too little to look "
            "at, and nothing freezes from the start."
        )
    if observation is None or observation.pilot is None or point is None:
        return False, (
            "No: the predictor decides nothing from the start of the run (`start_stage=False`, or it has no start stage), and "
            "what freezes later usually saves little."
        )
    pilot, doubt = observation.pilot, _doubt(profile, point)
    later = " Blocks may still freeze later in the run, which usually saves little." + doubt
    if not point.depth and not pilot.pretrained:
        return False, (
            "No: the model's blocks are as a library initializes them. Trained from scratch, they learn until the end of the "
            "run, so nothing freezes from the start." + later
        )
    if not point.depth and pilot.problem:
        return False, f"No: {pilot.problem}, the first {profile.steps_taken} steps. Check the learning rate." + later
    lora = profile.trainable < FEW_TRAINED * profile.parameters
    few = f" Only {profile.trainable / profile.parameters:.1%} of the parameters train, as with LoRA." if lora else ""
    if not point.depth:
        cost, why = depths[1].points_lost if len(depths) > 1 else None, f": {point.reason}"
        if point.reason.startswith("from the start"):  # what the policy says where all fronts cost too much
            why = "" if cost is None else f": the stem alone is predicted to cost {cost:.1f} points"
        return False, f"No: `{point.name}` freezes nothing from the start{why}." + few + later
    named = f"`{point.name}`" if not point.name.endswith("%") else f"A saving of {point.name}"
    what = f"{named} freezes {point.depth} of {len(profile.units)} units after the first {profile.pilot_steps} steps"
    if point.compute_saved < LEAST_COMPUTE:  # whatever a clock says on a busy machine
        return False, f"No: {what}, but that saves next to no compute." + few + later
    if point.time_saved < PAYS:
        saves = f"saves only {point.time_saved:.1%} of the time" if point.time_saved > 0 else "saves no time"
        return False, f"No: {what}, but that {saves}." + few + later
    lost = "" if point.points_lost is None else f", at a predicted cost of {point.points_lost:.1f} points"
    at = depths[point.depth]
    plain = depths[0].seconds
    times = f"{_minutes(plain)} to {_minutes(min(at.seconds, at.cached_seconds))}"
    more = ""
    if point.later_saved > point.time_saved:
        more = f" More usually freezes in the last third: about {_minutes((1 - point.later_saved) * plain)} then ({point.later_saved:.0%} less)."
    return (
        True,
        f"Yes: {what}, which is expected to bring the run from {times} ({point.time_saved:.0%} less){lost}.{more}{doubt}",
    )


def _doubt(profile: Profile, point: PointForecast) -> str:
    """What makes the decision uncertain, in a sentence or two; empty if nothing does."""
    parts = []
    if profile.steps_taken < profile.pilot_steps:
        parts.append(
            f"only {profile.steps_taken} of the {profile.pilot_steps} steps that the run looks at were taken here, for lack of time"
        )
    if not point.sure:
        parts.append(f"a shorter pilot gave {point.least} to {point.most} units")
    return f" The run may decide otherwise: {'; '.join(parts)}." if parts else ""


def _minutes(seconds: float) -> str:
    if seconds < 300:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
