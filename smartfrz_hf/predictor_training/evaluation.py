"""Evaluating a way to train predictors on held-out runs, and training the predictor that is published."""

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from inspect import signature
from statistics import median
from typing import Any

import numpy as np
import torch

from ..choices import one_of
from ..policies import Observation, SmartFRZPolicy
from ..predictor import SmartFRZPredictor, SmartFRZPredictorConfig
from ..signals.schedule import LearningRates
from ..signals.weights import WeightHistory, WeightSampler
from .card import write_card
from .cross_validation import cross_validate
from .dataset import FreezingStages
from .fit import FitOptions, fit
from .labels import LABELS, TARGETS
from .metrics import operating_points, summarize
from .table import RecordedRun, read_runs

SPACINGS = (1, 2)
UNITS, DECISIONS = 33, 50  # of a model, and how many are timed
GROUPS: dict[str, Callable[[RecordedRun], str]] = {
    "leave_one_family_out": lambda run: run.family,
    "leave_one_task_out": lambda run: run.task,
}
# What is written out in the configuration's signature, except for what the evaluation itself finds.
CONFIG_KEYS = [
    name
    for name, parameter in signature(SmartFRZPredictorConfig.__init__).parameters.items()
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name not in ("self", "operating_points")
]


class _RandomWeights(WeightSampler):
    """Weights of a model that does not exist."""

    def __init__(self, weights_per_unit: int):
        self.weights_per_unit = weights_per_unit

    def read(self, units: Sequence[int]) -> torch.Tensor:
        return torch.randn(len(units), self.weights_per_unit)


def decision_ms(predictor: SmartFRZPredictor) -> float:
    """Median time of one decision for all units of a model of 32 blocks, in milliseconds on one CPU thread."""
    config = predictor.config
    history = WeightHistory(UNITS, config.window, config.weights_per_unit)
    for step in range(100 - config.window, 100):
        history.record(_RandomWeights(config.weights_per_unit), step)
    observation = Observation(99, 200, 0, [True] * UNITS, LearningRates([1.0] * 201), history)
    policy, threads = SmartFRZPolicy(predictor, 0.5), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(DECISIONS):
            start = time.perf_counter()
            policy.decide(observation)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 1000 * median(times)


def evaluate(
    folder: str | os.PathLike, label: str, target: str, config: SmartFRZPredictorConfig, options: FitOptions
) -> dict[str, Any]:
    """
    Hold out each model family, and each data set, once: fit predictors to the other runs, and evaluate them there.

    Args:
        folder (`str`): folder of the recorded runs.
        label (`str`): what counts as converged, one of [`LABELS`].
        target (`str`): what the predictors learn, one of [`TARGETS`].
        config ([`SmartFRZPredictorConfig`]): form and sizes of the predictors.
        options ([`FitOptions`]): training options of the predictors.

    Returns:
        `dict`: the evaluation, as JSON values.

    Raises:
        ValueError: the label or target is unknown, or there is nothing to hold out.
        FileNotFoundError: the folder holds no recorded run.
    """
    for kind, name, known in (("label", label, LABELS), ("target", target, TARGETS)):
        if name not in known:
            raise ValueError(f"The {kind} is {name!r}; it must be {one_of(name, known)}")
    runs = read_runs(folder)
    stages = FreezingStages(runs, config, label, SPACINGS, target)
    held_out = {name: cross_validate(stages, config, key, options, name) for name, key in GROUPS.items()}
    by_family = held_out["leave_one_family_out"]
    predictor = SmartFRZPredictor(config)
    return {
        "label": label,
        "target": target,
        "config": {key: getattr(config, key) for key in CONFIG_KEYS},
        "fit": asdict(options) | {"spacings": SPACINGS},
        **{name: summarize(part) for name, part in held_out.items()},
        "calibration": by_family.calibration(np.ones(len(by_family.folds), dtype=bool)),
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


def fit_evaluated(folder: str | os.PathLike, evaluation: dict[str, Any], out: str | os.PathLike) -> SmartFRZPredictor:
    """
    Fit a predictor to all runs, in the way that was evaluated, and save it with its model card.

    Args:
        folder (`str`): folder of the recorded runs.
        evaluation (`dict`): what [`evaluate`] returned for these runs.
        out (`str`): folder for `config.json`, `model.safetensors`, `README.md` and charts.

    Returns:
        [`SmartFRZPredictor`]

    Raises:
        ValueError: the folder holds other runs than those that were evaluated.
        FileNotFoundError: the folder holds no recorded run.
    """
    runs = read_runs(folder)
    evaluated = {run["name"] for run in evaluation["runs"]}
    if different := {run.name for run in runs} ^ evaluated:
        raise ValueError(
            f"The runs in {folder} are not those that were evaluated, they differ in "
            f"{', '.join(sorted(different))}: run `smartfrz evaluate` again."
        )
    points = {name: point["threshold"] for name, point in evaluation["operating_points"].items()}
    config = SmartFRZPredictorConfig(**evaluation["config"], operating_points=points)
    options = FitOptions(**{option.name: evaluation["fit"][option.name] for option in fields(FitOptions)})
    stages = FreezingStages(runs, config, evaluation["label"], evaluation["fit"]["spacings"], evaluation["target"])
    all_rows = torch.ones(len(stages), dtype=torch.bool)
    predictor = fit(stages.select(all_rows, augment=True), config, options)
    predictor.offset.fill_(evaluation["calibration"]["offset"])
    predictor.temperature.fill_(evaluation["calibration"]["temperature"])
    predictor.save_pretrained(out)
    write_card(evaluation, out)
    return predictor
