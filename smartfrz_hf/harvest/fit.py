"""Fitting a predictor to recorded runs."""

import tempfile

import torch
from transformers import Trainer, TrainingArguments, set_seed

from ..predictor import SmartFRZPredictor, SmartFRZPredictorConfig
from .dataset import HistoryRows


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
