"""Fitting a predictor to freezing stages with the Hugging Face Trainer."""

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from ..predictor import SmartFRZPredictor, SmartFRZPredictorConfig
from .dataset import FreezingStages


@dataclass
class FitOptions:
    """
    How a predictor is trained.

    Args:
        epochs (`int`): passes over the stages.
        batch_size (`int`): stages a step.
        learning_rate (`float`): peak of a cosine schedule.
        weight_decay (`float`): of AdamW.
        seed (`int`): of the initial weights and the order of the stages.
        progress (`bool`): whether to show a progress bar.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1.0
    seed: int = 0
    progress: bool = False


def fit(
    stages: FreezingStages, config: SmartFRZPredictorConfig, options: FitOptions | None = None
) -> SmartFRZPredictor:
    """
    Train a predictor.

    Args:
        stages ([`FreezingStages`]): what it learns from, made for the same `config`.
        config ([`SmartFRZPredictorConfig`]): form and sizes.
        options ([`FitOptions`], *optional*): how.

    Returns:
        [`SmartFRZPredictor`], on the CPU, in evaluation mode.
    """
    options = options or FitOptions()
    set_seed(options.seed)
    predictor = SmartFRZPredictor(config)
    if config.form == "dynamics":
        _standardize(predictor, stages)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=options.weight_decay,
            seed=options.seed,
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=not options.progress,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(predictor, args, train_dataset=stages, data_collator=_as_it_is)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return predictor.cpu().eval()


def _as_it_is(batch: Any) -> Any:
    return batch


@torch.no_grad()
def _standardize(predictor: SmartFRZPredictor, stages: FreezingStages) -> None:
    """Set the mean and deviation of each quantity over the usable snapshots."""
    std, mean = torch.std_mean(stages.columns["features"][stages.columns["usable"]], dim=0)
    predictor.feature_mean.copy_(mean)
    predictor.feature_std.copy_(std.clamp(min=1e-3))
