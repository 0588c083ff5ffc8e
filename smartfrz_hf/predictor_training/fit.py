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
    Training options of a predictor.

    Args:
        epochs (`int`, *optional*, defaults to `20`): number of epochs.
        batch_size (`int`, *optional*, defaults to `64`): freezing stages per step.
        learning_rate (`float`, *optional*, defaults to `3e-3`): peak of the cosine schedule.
        weight_decay (`float`, *optional*, defaults to `1.0`): weight decay of AdamW.
        seed (`int`, *optional*, defaults to `0`): seed of the initial weights and the order of the stages.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1.0
    seed: int = 0


def fit(
    stages: FreezingStages, config: SmartFRZPredictorConfig, options: FitOptions | None = None
) -> SmartFRZPredictor:
    """
    Train a predictor.

    Args:
        stages ([`FreezingStages`]): training data, built for the same `config`.
        config ([`SmartFRZPredictorConfig`]): form and sizes of the predictor.
        options ([`FitOptions`], *optional*): training options.

    Returns:
        [`SmartFRZPredictor`] on the CPU, in evaluation mode.
    """
    options = options or FitOptions()
    set_seed(options.seed)
    predictor = SmartFRZPredictor(config)
    if config.form == "dynamics":
        std, mean = torch.std_mean(stages.columns["features"][stages.columns["usable"]], dim=0)
        predictor.feature_mean.copy_(mean)
        predictor.feature_std.copy_(std.clamp(min=1e-3))
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
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(predictor, args, train_dataset=stages, data_collator=_as_batch)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return predictor.cpu().eval()


def _as_batch(batch: Any) -> Any:
    """No collation: [`FreezingStages`] gives whole batches."""
    return batch
