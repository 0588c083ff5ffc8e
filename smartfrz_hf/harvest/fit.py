"""Fitting a predictor to recorded runs, and judging it on the runs that were held out."""

import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

from ..predictor import SmartFRZPredictor, SmartFRZPredictorConfig
from .card import write_card
from .dataset import HistoryRows, split
from .evaluate import evaluate
from .record import PROBE_ROWS
from .table import read_runs


def fit(
    rows: HistoryRows,
    config: SmartFRZPredictorConfig,
    epochs: int = 30,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: bool = True,
) -> SmartFRZPredictor:
    """
    Train a predictor with the Hugging Face Trainer.

    Args:
        rows ([`HistoryRows`]): what it learns from.
        config ([`SmartFRZPredictorConfig`]): form and sizes.
        epochs (`int`): passes over the rows.
        batch_size (`int`): rows a step.
        learning_rate (`float`): peak of a cosine schedule.
        seed (`int`): of the initial weights and the order of the rows.
        progress (`bool`): whether to show a progress bar.

    Returns:
        [`SmartFRZPredictor`], in evaluation mode.
    """
    set_seed(seed)
    predictor = SmartFRZPredictor(config)
    if config.form == "dynamics":
        _standardize(predictor, rows)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.01,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=not progress,
            use_cpu=not torch.cuda.is_available(),
        )
        Trainer(predictor, args, train_dataset=rows).train()
    return predictor.cpu().eval()


@torch.no_grad()
def _standardize(predictor: SmartFRZPredictor, rows: HistoryRows) -> None:
    """Set the mean and deviation of each quantity over the training rows' usable snapshots."""
    features = []
    for begin in range(0, len(rows), 512):
        part = {key: rows.columns[key][begin : begin + 512] for key in ("snapshots", "start", "mask")}
        usable = predictor.usable(part["mask"])
        features.append(predictor.encode(part["snapshots"], part["start"], usable)[usable])
    std, mean = torch.std_mean(torch.cat(features), dim=0)
    predictor.feature_mean.copy_(mean)
    predictor.feature_std.copy_(std.clamp(min=1e-3))


def fit_and_judge(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    families: set[str],
    tasks: set[str],
    cka: float,
    change_left: float,
    form: str,
    window: int,
    epochs: int,
    seed: int,
) -> dict[str, Any]:
    """
    Fit to the runs of a harvest but for those held out, and write predictor and model card.

    Args:
        folder (`str`): the harvest.
        out (`str`): folder that gets `config.json`, `model.safetensors` and `README.md`.
        families (`set[str]`): model families held out.
        tasks (`set[str]`): data sets held out.
        cka (`float`): similarity from which a unit has settled in any case.
        change_left (`float`): share of its change that a settled unit may still have to come.
        form (`str`): of the predictor.
        window (`int`): snapshots in a history.
        epochs (`int`): passes over the rows.
        seed (`int`): of the fit.

    Returns:
        `dict`: what was measured, as plain JSON.

    Raises:
        ValueError: nothing is left to train on, or nothing is held out.
        FileNotFoundError: the folder holds no run.
    """
    runs = read_runs(folder)
    train, held_out = split(runs, lambda run: run.family in families or run.task in tasks)
    if not train or not held_out:
        known = ", ".join(sorted({run.family for run in runs} | {run.task for run in runs}))
        raise ValueError(
            f"Of {len(runs)} runs, {len(held_out)} are held out: hold out some, but not all. There are {known}."
        )
    held_out_names = {run.name for run in held_out}
    train_rows, held_out_rows = (
        HistoryRows(train, window, cka, change_left),
        HistoryRows(held_out, window, cka, change_left),
    )
    config = SmartFRZPredictorConfig(form=form, window=window, samples=train_rows.columns["start"].shape[-1])
    predictor = fit(train_rows, config, epochs=epochs, seed=seed)
    summary = {
        "config": {key: getattr(config, key) for key in ("form", "window", "samples")},
        "parameters": predictor.num_parameters(),
        "cka": cka,
        "change_left": change_left,
        "probe_rows": PROBE_ROWS,
        "epochs": epochs,
        "seed": seed,
        "held_out_rule": "Held out were " + " and ".join(sorted(f"all runs of {x}" for x in families | tasks)) + ".",
        "training": evaluate(predictor, train_rows),
        "held_out": evaluate(predictor, held_out_rows),
        "runs": [
            {
                "name": run.name,
                "family": run.family,
                "data": run.task,
                "from_scratch": run.provenance["regime"] != "fine-tuning",
                "steps": int(run.tensors["steps"][-1]),
                "units": len(run.units),
                "used_for": "held out" if run.name in held_out_names else "training",
            }
            for run in runs
        ],
        "versions": {name: version(name) for name in ("torch", "transformers", "scikit-learn")},
        "machine": platform.machine(),
    }
    predictor.save_pretrained(out)
    (Path(out) / "README.md").write_text(write_card(Path(out).name, summary))
    return summary
