"""Fitting the start predictor to runs that were frozen from their first step on, and judging it on others."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch

from ..config import share_of
from ..predictor import SmartFRZPredictor, SmartFRZPredictorConfig, StartPredictor
from ..predictor.configuration import DEFAULT_LIMITS
from ..signals.pilot_signals import PilotSignals
from .start_pairs import StartPair

Rule = Callable[[StartPair], torch.Tensor]  # from a pair to `(units,)` scores

QUANTILE = 0.7  # of the points lost that is predicted: more than the median, as a loss that was not foreseen is worse
FIT_STEPS = 300  # of Adam
# Mean points lost on held-out tasks and on held-out families, as measured, that the choice of a tolerance allows.
ALLOWED = {"conservative": 0.1, "balanced": 0.3, "aggressive": 1.0}
GRID = [round(0.05 * step, 2) for step in range(1, 41)]


def fit_start(pairs: Sequence[StartPair]) -> StartPredictor:
    """
    Fit a start predictor. Each pair counts as much as any other.

    Args:
        pairs (`Sequence[StartPair]`): what it learns from.

    Returns:
        [`StartPredictor`]
    """
    pairs = [pair for pair in pairs if may_freeze(pair.pilot)]  # what never freezes teaches nothing about cost
    model = StartPredictor()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(FIT_STEPS):  # each over all pairs
        loss = torch.zeros(())
        for pair in pairs:
            missing = squashed(pair.points_lost) - squashed(model.predict(pair.pilot)[pair.depths - 1])
            loss = loss + torch.where(missing > 0, QUANTILE * missing, (QUANTILE - 1) * missing).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def squashed(points: torch.Tensor) -> torch.Tensor:
    """Linear for a few points and logarithmic for many: a tenth of a point matters where little is lost only."""
    return torch.asinh(points)


def may_freeze(pilot: PilotSignals) -> int:
    """Units that the policy may freeze from the start: none that are not pretrained, none where the pilot objects."""
    return 0 if pilot.objection else pilot.pretrained


def judge(
    rule: Rule, pairs: Sequence[StartPair], points: float, share: float = 1.0, blocks: float = 1.0
) -> dict[str, float]:
    """
    What a rule comes to that freezes the deepest front within some limits, among the depths that were run.
    Nothing freezes where the policy would freeze nothing.

    Args:
        rule (`Callable`): from a pair to `(units,)` scores, points lost for instance.
        pairs (`Sequence[StartPair]`): not those that it learned from.
        points (`float`): highest score that freezes.
        share (`float`, *optional*, defaults to `1.0`): largest share of a front in the contributions of all units.
        blocks (`float`, *optional*, defaults to `1.0`): largest fraction of the blocks that freezes.

    Returns:
        `dict`: `saved` (mean share of the compute), `points_lost` (mean, from points and loss), `worst` (most points lost),
        `points` and `loss` (means as measured).
    """
    columns = []
    for pair in pairs:
        allowed = (rule(pair) <= points) & (pair.pilot.front_shares <= share)
        deepest = min(may_freeze(pair.pilot), 1 + share_of(blocks, len(allowed) - 1))
        fit = [run for run, d in enumerate(pair.depths.tolist()) if allowed[d - 1] and d <= deepest]
        columns.append(
            [
                float(pair.saved[pair.depths[fit[-1]]]),
                *(float(c[fit[-1]]) for c in (pair.points_lost, pair.points, pair.loss)),
            ]
            if fit
            else [0.0] * 4
        )
    table = torch.tensor(columns)
    saved, lost, measured, loss = table.mean(0).tolist()
    return {"saved": saved, "points_lost": lost, "worst": float(table[:, 1].max()), "points": measured, "loss": loss}


def cross_validate(pairs: Sequence[StartPair], group: str) -> Rule:
    """
    A rule that says of each pair what a predictor says that was fitted to the pairs of other groups.

    Args:
        pairs (`Sequence[StartPair]`): all of them, of two groups or more.
        group (`str`): `"family"` or `"task"`: what is held out together.
    """
    said: dict[str, torch.Tensor] = {}
    for held_out in sorted({getattr(pair, group) for pair in pairs}):
        model = fit_start([pair for pair in pairs if getattr(pair, group) != held_out])
        with torch.no_grad():
            said |= {pair.name: model.predict(pair.pilot) for pair in pairs if getattr(pair, group) == held_out}
    return lambda pair: said[pair.name]


def fixed(share: float) -> Rule:
    """Freeze a fixed share of the blocks: scores of 0 up to there, and infinite behind."""

    def score(pair: StartPair) -> torch.Tensor:
        units = len(pair.pilot.parameters) - 1
        return torch.where(torch.arange(units) / (units - 1) <= share + 1e-6, 0.0, torch.inf)

    return score


def choose_limits(rules: Sequence[Rule], pairs: Sequence[StartPair]) -> dict[str, dict[str, float]]:
    """
    The default limits, with as many predicted points for each operating point as let held-out pairs lose no more than is
    allowed, where less would do no harm either.

    Args:
        rules (`Sequence[Callable]`): what predictors say of pairs that they have not seen, for each way to hold pairs out.
        pairs (`Sequence[StartPair]`): all of them.
    """
    chosen = {point: limits | {"points": 0.0} for point, limits in DEFAULT_LIMITS.items()}
    for point, allowed in ALLOWED.items():
        for points in GRID:
            limits = chosen[point] | {"points": points}
            if any(judge(rule, pairs, **limits)["points"] > allowed for rule in rules):
                break
            chosen[point] = limits
    return chosen


def evaluate_start(pairs: Sequence[StartPair]) -> dict[str, Any]:
    """
    Judge the predictor and simple rules on pairs of families, and of tasks, that they have not seen.

    Args:
        pairs (`Sequence[StartPair]`): all of them.

    Returns:
        `dict`: `pairs` and `runs` (counts), `limits` (by operating point), and by `"family"` and `"task"`:
        `"operating points"`, and for each rule and tolerance what [`judge`] gives.
    """
    held_out = {group: cross_validate(pairs, group) for group in ("family", "task")}
    limits = choose_limits(list(held_out.values()), pairs)
    results: dict[str, Any] = {
        "pairs": len(pairs),
        "runs": sum(len(pair.depths) for pair in pairs),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "limits": limits,
    }
    for group, said in held_out.items():
        results[group] = {
            "operating points": {point: judge(said, pairs, **limits[point]) for point in limits},
            "predictor": {str(t): judge(said, pairs, t) for t in (0.1, 0.2, 0.3, 0.5, 1.0, 2.0)},
            "share": {
                str(t): judge(lambda pair: pair.pilot.front_shares, pairs, t) for t in (0.1, 0.2, 0.3, 0.5, 0.7)
            },
            **{f"fixed {share:.2f}": {"-": judge(fixed(share), pairs, 0.0)} for share in (1 / 3, 1 / 2, 2 / 3, 5 / 6)},
        }
    return results


def add_start(
    predictor: SmartFRZPredictor, pairs: Sequence[StartPair], evaluation: dict[str, Any]
) -> SmartFRZPredictor:
    """
    A predictor with a start predictor that was fitted to all pairs.

    Args:
        predictor ([`SmartFRZPredictor`]): its other weights are kept.
        pairs (`Sequence[StartPair]`): what the start predictor learns from.
        evaluation (`dict`): of [`evaluate_start`], which has chosen the limits.
    """
    limits = {"start_limits": evaluation["limits"]}
    config = SmartFRZPredictorConfig.from_dict(predictor.config.to_dict() | {"start_stage": True} | limits)
    joined = SmartFRZPredictor(config)
    kept = {name: value for name, value in predictor.state_dict().items() if not name.startswith("start.")}
    start = {f"start.{name}": value for name, value in fit_start(pairs).state_dict().items()}
    joined.load_state_dict(kept | start)
    return joined.eval()
