"""Fitting the start predictor to runs that were frozen from their first step on, and judging it on others."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from ..predictor import StartPredictor, start_features
from ..signals.pilot import EPSILON, WEIGHTS_PER_UNIT, PilotSignals

# Loss that is added counts as so many points lost: over the harvest, a change of the held-out loss by 0.1 goes with one of about
# 4 points. The mean of both is less noisy than the points of a thousand rows.
POINTS_PER_LOSS = 40.0
MOST_POINTS = 30.0  # at which labels are cut off: how bad a very bad front is does not matter


@dataclass(frozen=True)
class StartPair:
    """
    A model and a task: one full run and several with a front that was frozen from the first step on.

    Attributes:
        name (`str`), family (`str`), task (`str`): of the pair, its model and its data set.
        features (`torch.Tensor` of shape `(units, 8)`): as [`start_features`] gives them.
        depths (`torch.Tensor` of shape `(runs,)`, `int`): frozen units of each run.
        points_lost (`torch.Tensor` of shape `(runs,)`): what each run lost against the full one, from points and loss.
        points, loss (`torch.Tensor` of shape `(runs,)`): lost points and added held-out loss, as measured.
        saved (`torch.Tensor` of shape `(units + 1,)`): share of the compute that each depth saves.
    """

    name: str
    family: str
    task: str
    features: torch.Tensor
    depths: torch.Tensor
    points_lost: torch.Tensor
    points: torch.Tensor
    loss: torch.Tensor
    saved: torch.Tensor


def read_pairs(folder: Path, moment: str = "0.05") -> list[StartPair]:
    """
    Read the results of `benchmarks/predictor/start/harvest.py`.

    Args:
        folder (`Path`): one JSON file a run.
        moment (`str`, *optional*, defaults to `"0.05"`): which moment of the full runs stands for the end of the pilot.

    Returns:
        `list[StartPair]`: those with a full run and at least one frozen one.

    Raises:
        FileNotFoundError: the folder has no results.
    """
    runs: dict[str, dict[int | None, Any]] = {}
    for file in sorted(Path(folder).glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        runs.setdefault(result["pair"]["name"], {})[result["frozen_blocks"]] = result
    pairs = [_pair(name, found, moment) for name, found in runs.items() if None in found and len(found) > 1]
    if not pairs:
        raise FileNotFoundError(f"{folder} holds no pair of a full run and one with a frozen front.")
    return pairs


def pilot_signals(signals: dict[str, Any], moment: str) -> PilotSignals:
    """
    What the pilot of a full run would have shown, from its recorded signals.

    Args:
        signals (`dict`): of the full run.
        moment (`str`): when the pilot is over, or the earliest later moment that was recorded.
    """
    known = signals["moments"]
    seen = known.get(moment) or known[min(known, key=float)]
    squares = torch.tensor([*seen["sampled_gradient_square_norm"], 0.0]) / WEIGHTS_PER_UNIT
    head = seen.get("head_loss_change", 0.0) / max(1, signals["head_parameters"])
    return PilotSignals(
        seen["step"] + 1,
        torch.tensor([*signals["unit_parameters"], signals["head_parameters"]], dtype=torch.float64),
        torch.tensor([*seen["sampled_mean_gradient_square_norm"], 0.0])
        / WEIGHTS_PER_UNIT
        / squares.clamp(min=EPSILON),
        squares.sqrt(),
        torch.tensor([*(change / WEIGHTS_PER_UNIT for change in seen["sampled_loss_change"]), head]),
        torch.zeros(len(squares)),
        torch.tensor([*seen["sampled_displacement"], 0.0]) / WEIGHTS_PER_UNIT**0.5,
    )


def _pair(name: str, runs: dict[int | None, Any], moment: str) -> StartPair:
    full = runs.pop(None)
    signals = full["signals"]
    pilot = pilot_signals(signals, moment)
    spent = spent_share(pilot.steps - 1, full["steps"], full["pair"]["warmup"])
    depths = sorted(blocks for blocks in runs if blocks is not None)
    before = full["evaluations"][-1]
    points = torch.tensor([before["points"] - runs[blocks]["evaluations"][-1]["points"] for blocks in depths])
    loss = torch.tensor([runs[blocks]["evaluations"][-1]["loss"] - before["loss"] for blocks in depths])
    both = points if signals["classes"] == 1 else (points + POINTS_PER_LOSS * loss) / 2
    units = len(signals["unit_names"])
    return StartPair(
        name,
        full["pair"]["model"].split("-")[0],
        full["pair"]["task"],
        start_features(pilot, full["steps"], spent),
        torch.tensor(depths) + 1,
        both.clamp(max=MOST_POINTS),
        points,
        loss,
        compute_saved(units),
    )


def spent_share(step: int, steps: int, warmup: float) -> float:
    """Share of the summed learning rate before a step, of a schedule with a linear warm-up and a linear decay."""
    up = max(1, round(steps * warmup))
    rates = [min((s + 1) / up, (steps - s) / max(1, steps - up)) for s in range(steps)]
    return sum(rates[:step]) / sum(rates)


def compute_saved(units: int) -> torch.Tensor:
    """
    Share of the compute that freezing so many units saves, `(units + 1,)`: blocks of equal cost, a stem of none, and a backward
    pass that costs twice the forward pass.
    """
    return torch.tensor([0.0, *(2 / 3 * block / (units - 1) for block in range(units))])


def fit_start(
    pairs: Sequence[StartPair], size: int = 16, epochs: int = 400, weight_decay: float = 0.1, seed: int = 0
) -> StartPredictor:
    """
    Fit a start predictor.

    Args:
        pairs (`Sequence[StartPair]`): what it learns from.
        size (`int`, *optional*, defaults to `16`): its width.
        epochs (`int`, *optional*, defaults to `400`): steps of AdamW, each over all pairs.
        weight_decay (`float`, *optional*, defaults to `0.1`): of AdamW.
        seed (`int`, *optional*, defaults to `0`): of the first weights.

    Returns:
        [`StartPredictor`] in evaluation mode.
    """
    set_seed(seed)
    model = StartPredictor(size)
    rows = torch.cat([pair.features for pair in pairs])
    model.mean.copy_(rows.mean(0))
    model.std.copy_(rows.std(0).clamp(min=1e-3))
    most = max(len(pair.features) for pair in pairs)
    features = torch.stack([nn.functional.pad(p.features, (0, 0, 0, most - len(p.features))) for p in pairs])
    active = torch.stack([torch.arange(most) < len(pair.features) for pair in pairs])
    where = [(i, int(depth) - 1) for i, pair in enumerate(pairs) for depth in pair.depths]
    at = tuple(torch.tensor(column) for column in zip(*where, strict=True))
    wanted = squashed(torch.cat([pair.points_lost for pair in pairs]))
    # Each pair counts as much as any other.
    share = torch.cat([torch.full((len(pair.depths),), 1 / len(pair.depths)) for pair in pairs])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        errors = nn.functional.smooth_l1_loss(
            squashed(model(features, active)[at]), wanted, reduction="none", beta=0.5
        )
        loss = (errors * share).sum() / share.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def squashed(points: torch.Tensor) -> torch.Tensor:
    """Linear for a few points and logarithmic for many: a tenth of a point matters where little is lost only."""
    return torch.asinh(points)


Rule = Callable[[StartPair], torch.Tensor]


def judge(rule: Rule, pairs: Sequence[StartPair], tolerance: float) -> dict[str, float]:
    """
    What a rule comes to that freezes the deepest front for which it gives at most a tolerance, among the depths that were run.

    Args:
        rule (`Callable`): from a pair to `(units,)` scores, which are compared with the tolerance.
        pairs (`Sequence[StartPair]`): not those that it learned from.
        tolerance (`float`): highest score that freezes.

    Returns:
        `dict`: `saved` (mean share of the compute), `points_lost` (mean, from points and loss), `worst` (most points lost),
        `points` and `loss` (means as measured).
    """
    saved, lost, points, loss = [], [], [], []
    for pair in pairs:
        scores = rule(pair)
        fit = [i for i, depth in enumerate(pair.depths.tolist()) if scores[depth - 1] <= tolerance]
        chosen = fit[-1] if fit else None
        saved.append(float(pair.saved[pair.depths[chosen]]) if chosen is not None else 0.0)
        lost.append(float(pair.points_lost[chosen]) if chosen is not None else 0.0)
        points.append(float(pair.points[chosen]) if chosen is not None else 0.0)
        loss.append(float(pair.loss[chosen]) if chosen is not None else 0.0)
    count = len(pairs)
    return {
        "saved": sum(saved) / count,
        "points_lost": sum(lost) / count,
        "worst": max(lost),
        "points": sum(points) / count,
        "loss": sum(loss) / count,
    }


def cross_validate(pairs: Sequence[StartPair], group: str, seeds: int = 3) -> dict[str, torch.Tensor]:
    """
    What predictors say of each pair that were fitted to the pairs of other groups.

    Args:
        pairs (`Sequence[StartPair]`): all of them.
        group (`str`): `"family"` or `"task"`: what is held out together.
        seeds (`int`, *optional*, defaults to `3`): predictors whose mean is taken.

    Returns:
        `dict[str, torch.Tensor]`: by name of the pair, points lost of shape `(units,)`.
    """
    said: dict[str, torch.Tensor] = {}
    for held_out in sorted({getattr(pair, group) for pair in pairs}):
        others = [pair for pair in pairs if getattr(pair, group) != held_out]
        models = [fit_start(others, seed=seed) for seed in range(seeds)] if others else []
        with torch.no_grad():
            for pair in pairs:
                if models and getattr(pair, group) == held_out:
                    said[pair.name] = torch.stack([model(pair.features) for model in models]).mean(0)
    return said


def fixed(share: float) -> Rule:
    """Freeze a fixed share of the blocks: scores of 0 up to there, and infinite behind."""

    def score(pair: StartPair) -> torch.Tensor:
        place = torch.arange(len(pair.features)) / (len(pair.features) - 1)
        return torch.where(place <= share + 1e-6, 0.0, torch.inf)

    return score


def _said(said: dict[str, torch.Tensor], pair: StartPair) -> torch.Tensor:
    return said[pair.name]


def front_share(pair: StartPair) -> torch.Tensor:
    """The share of the front in the change of the loss during the pilot, as a rule of its own."""
    return 10 ** pair.features[:, 2]


def evaluate_start(pairs: Sequence[StartPair]) -> dict[str, Any]:
    """
    Judge the predictor and simple rules on pairs of families, and of tasks, that they have not seen.

    Args:
        pairs (`Sequence[StartPair]`): all of them.

    Returns:
        `dict`: by `"family"` and `"task"`: for each rule and tolerance what [`judge`] gives; the predictor's tolerances are in
        points.
    """
    results: dict[str, Any] = {"pairs": len(pairs), "runs": sum(len(pair.depths) for pair in pairs)}
    for group in ("family", "task"):
        said = cross_validate(pairs, group)
        seen = [pair for pair in pairs if pair.name in said]
        results[group] = {
            "predictor": {str(t): judge(partial(_said, said), seen, t) for t in (0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)},
            "share of the loss change": {str(t): judge(front_share, seen, t) for t in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)},
            **{f"fixed {share:.2f}": {"-": judge(fixed(share), seen, 0.0)} for share in (1 / 3, 1 / 2, 2 / 3, 5 / 6)},
        }
    return results
