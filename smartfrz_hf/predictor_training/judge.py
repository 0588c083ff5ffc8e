"""Judging a way to make predictors on runs held out, and making the predictor that is shared."""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..policies import Observation, SmartFRZPolicy
from ..predictor import SmartFRZPredictor, SmartFRZPredictorConfig
from ..signals.schedule import LearningRates
from ..signals.weights import WeightHistory
from .card import write_card
from .charts import draw_charts
from .dataset import FreezingStages
from .evaluate import operating_points, summarize
from .fit import FitOptions, fit
from .held_out import cross_validate
from .labels import LABELS, TARGETS
from .table import RecordedRun, read_runs

SPACINGS = (1, 2)
GROUPS: dict[str, Callable[[RecordedRun], str]] = {
    "leave_one_family_out": lambda run: run.family,
    "leave_one_task_out": lambda run: run.task,
}
CONFIG_KEYS = (
    "form",
    "window",
    "weights_per_unit",
    "encoder_size",
    "attention_size",
    "unit_size",
    "unit_attention",
    "front_sum",
    "front_probe",
    "head_size",
)


def decision_ms(predictor: SmartFRZPredictor, blocks: int = 32, repeats: int = 50) -> float:
    """Median time of one decision for all units of a model, in milliseconds on one CPU thread."""
    history = WeightHistory(blocks + 1, predictor.config.window, predictor.config.weights_per_unit)
    history._ring.normal_()
    history.start.normal_()
    history.steps = list(range(100 - predictor.config.window, 100))
    observation = Observation(99, 200, 0, [True] * (blocks + 1), LearningRates([1.0] * 201), history)
    policy, threads = SmartFRZPolicy(predictor, 0.5), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            policy.decide(observation)
            times.append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
    return 1000 * median(times)


def judge(
    folder: str | os.PathLike, label: str, target: str, config: SmartFRZPredictorConfig, options: FitOptions
) -> dict[str, Any]:
    """
    Fit predictors to all runs of a harvest but one model family's, or one data set's, and judge them there.

    Args:
        folder (`str`): the harvest.
        label (`str`): one of [`LABELS`], by which they are judged.
        target (`str`): one of [`TARGETS`], which they learn.
        config ([`SmartFRZPredictorConfig`]): form and sizes.
        options ([`FitOptions`]): how predictors are fitted.

    Returns:
        `dict`: what was measured, as plain JSON.

    Raises:
        ValueError: the label or target is unknown, or there is nothing to hold out.
        FileNotFoundError: the folder holds no run.
    """
    for what, name, known in (("label", label, LABELS), ("target", target, TARGETS)):
        if name not in known:
            raise ValueError(f"The {what} is {name!r}; it must be one of {', '.join(known)}.")
    runs = read_runs(folder)
    stages = FreezingStages(runs, config, label, SPACINGS, target)
    held_out = {name: cross_validate(stages, config, key, options, name) for name, key in GROUPS.items()}
    by_family = held_out["leave_one_family_out"]
    everything = by_family.folds == by_family.folds
    predictor = SmartFRZPredictor(config)
    return {
        "label": label,
        "target": target,
        "config": {key: getattr(config, key) for key in CONFIG_KEYS},
        "fit": asdict(options) | {"spacings": SPACINGS},
        **{name: summarize(part) for name, part in held_out.items()},
        "calibration": by_family.calibration(everything),
        "operating_points": operating_points(by_family),
        "decision_ms_32_blocks": round(decision_ms(predictor), 2),
        "parameters": predictor.num_parameters(),
        "runs": [
            {
                "name": run.name,
                "family": run.family,
                "data": run.task,
                "regime": run.provenance["regime"],
                **{key: json.loads(run.provenance["spec"])[key] for key in ("schedule", "optimizer", "learning_rate")},
                "steps": int(run.tensors["steps"][-1]),
                "units": len(run.units),
            }
            for run in runs
        ],
        "versions": {name: version(name) for name in ("torch", "transformers", "scikit-learn")},
        "machine": platform.machine(),
    }


def make(folder: str | os.PathLike, evaluation: dict[str, Any], out: str | os.PathLike) -> SmartFRZPredictor:
    """
    Fit a predictor to all runs of a harvest, in the way that was judged, and write it with its model card.

    Args:
        folder (`str`): the harvest.
        evaluation (`dict`): what [`judge`] gave for it.
        out (`str`): folder that gets `config.json`, `model.safetensors`, `README.md` and charts.

    Raises:
        ValueError: the harvest holds other runs than were judged.
        FileNotFoundError: the folder holds no run.
    """
    runs = read_runs(folder)
    judged = {run["name"] for run in evaluation["runs"]}
    if {run.name for run in runs} != judged:
        raise ValueError(
            f"{folder} holds {len(runs)} runs, but {len(judged)} were judged, or others: run `smartfrz evaluate` again."
        )
    points = {name: point["threshold"] for name, point in evaluation["operating_points"].items()}
    config = SmartFRZPredictorConfig(**evaluation["config"], operating_points=points)
    how = {key: value for key, value in evaluation["fit"].items() if key != "spacings"}
    stages = FreezingStages(runs, config, evaluation["label"], evaluation["fit"]["spacings"], evaluation["target"])
    everything = torch.ones(len(stages), dtype=torch.bool)
    predictor = fit(stages.select(everything, as_in_use=True), config, FitOptions(**how))
    predictor.offset.fill_(evaluation["calibration"]["offset"])
    predictor.temperature.fill_(evaluation["calibration"]["temperature"])
    predictor.save_pretrained(out)
    draw_charts(evaluation, out)
    (Path(out) / "README.md").write_text(write_card(Path(out).name, evaluation))
    return predictor
