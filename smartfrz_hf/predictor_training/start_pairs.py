"""Runs that were frozen from their first step on, beside full runs of the same model and task: what the start predictor learns from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..signals.pilot import WEIGHTS_PER_UNIT
from ..signals.pilot_signals import PilotSignals

# Loss that is added counts as so many points lost: over the harvest, a change of the held-out loss by 0.1 goes with one of about
# 4 points. The mean of both is less noisy than the points of a thousand rows.
POINTS_PER_LOSS = 40.0
MOST_POINTS = 30.0  # at which labels are cut off: how bad a very bad front is does not matter
MOMENT = "0.05"  # of the full runs, which stands for the end of the pilot


@dataclass(frozen=True)
class StartPair:
    """
    A model and a task: one full run and several with a front that was frozen from the first step on.

    Attributes:
        name (`str`), family (`str`), task (`str`): of the pair, its model and its data set.
        pilot ([`PilotSignals`]): what the first steps of the full run have shown.
        depths (`torch.Tensor` of shape `(runs,)`, `int`): frozen units of each run.
        points_lost (`torch.Tensor` of shape `(runs,)`): what each run lost against the full one, from points and loss.
        points, loss (`torch.Tensor` of shape `(runs,)`): lost points and added held-out loss, as measured.
        saved (`torch.Tensor` of shape `(units + 1,)`): share of the compute that each depth saves.
    """

    name: str
    family: str
    task: str
    pilot: PilotSignals
    depths: torch.Tensor
    points_lost: torch.Tensor
    points: torch.Tensor
    loss: torch.Tensor
    saved: torch.Tensor


def read_pairs(folder: Path) -> list[StartPair]:
    """
    Read the results of `benchmarks/predictor/start/harvest.py`.

    Args:
        folder (`Path`): one JSON file a run.

    Returns:
        `list[StartPair]`: those with a full run and at least one frozen one.

    Raises:
        FileNotFoundError: the folder has no results.
    """
    runs: dict[str, dict[int | None, Any]] = {}
    for file in sorted(Path(folder).glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        runs.setdefault(result["pair"]["name"], {})[result["frozen_blocks"]] = result
    pairs = [_pair(name, found) for name, found in runs.items() if None in found and len(found) > 1]
    if not pairs:
        raise FileNotFoundError(
            f"{folder} holds no pair of a full run and one with a frozen front; benchmarks/predictor/start/harvest.py makes some."
        )
    return pairs


def pilot_signals(signals: dict[str, Any], moment: str, pretrained: bool = True) -> PilotSignals:
    """
    What the pilot of a full run would have shown, from its recorded signals.

    Args:
        signals (`dict`): of the full run.
        moment (`str`): when the pilot is over, or the earliest later moment that was recorded.
        pretrained (`bool`, *optional*, defaults to `True`): whether the model had learned something before.
    """
    known = signals["moments"]
    seen = known.get(moment) or known[min(known, key=float)]
    squares = torch.tensor([*seen["sampled_gradient_square_norm"], 0.0]) / WEIGHTS_PER_UNIT
    head = seen.get("head_loss_change", 0.0) / max(1, signals["head_parameters"])
    return PilotSignals(
        seen["step"] + 1,
        torch.tensor([*signals["unit_parameters"], signals["head_parameters"]], dtype=torch.float64),
        squares.sqrt(),
        torch.tensor([*(change / WEIGHTS_PER_UNIT for change in seen["sampled_loss_change"]), head]),
        torch.tensor([*seen["sampled_displacement"], 0.0]) / WEIGHTS_PER_UNIT**0.5,
        torch.full_like(squares, torch.inf),  # not recorded
        len(signals["unit_names"]) if pretrained else 0,
        regression=signals["classes"] == 1,
    )


def _pair(name: str, runs: dict[int | None, Any]) -> StartPair:
    full = runs.pop(None)
    signals = full["signals"]
    pilot = pilot_signals(signals, MOMENT, "scratch" not in full["pair"]["model"])
    depths = sorted(blocks for blocks in runs if blocks is not None)
    before = full["evaluations"][-1]
    points = torch.tensor([before["points"] - runs[blocks]["evaluations"][-1]["points"] for blocks in depths])
    loss = torch.tensor([runs[blocks]["evaluations"][-1]["loss"] - before["loss"] for blocks in depths])
    both = points if pilot.regression else (points + POINTS_PER_LOSS * loss) / 2
    units = len(signals["unit_names"])
    return StartPair(
        name,
        full["pair"]["model"].split("-")[0],
        full["pair"]["task"],
        pilot,
        torch.tensor(depths) + 1,
        both.clamp(max=MOST_POINTS),
        points,
        loss,
        compute_saved(units),
    )


def compute_saved(units: int) -> torch.Tensor:
    """
    Share of the compute that freezing so many units saves, `(units + 1,)`: blocks of equal cost, a stem of none, and a backward
    pass that costs twice the forward pass.
    """
    return torch.tensor([0.0, *(2 / 3 * block / (units - 1) for block in range(units))])
