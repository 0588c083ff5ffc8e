"""The training runs that the predictor learns from, as declared in a JSON file."""

import json
import os
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass
class RunSpec:
    """
    One training run to record.

    Args:
        name (`str`): name of the run and of its file.
        model (`str`): Hub id or folder of the model that is fine-tuned, or the model type to train from scratch.
        data (`str`):
            `"glue/TASK"`, `"cifar10"`, `"fashion_mnist"`, or the Hub id of a data set with the columns of one of
            these.
        from_scratch (`bool`): whether the model starts from random weights.
        config (`dict`): changes to the model's configuration.
        pretraining (`dict`):
            For a pretrained start: fields of a first run that differ from this one. It is not recorded; this run
            starts from its backbone.
        train_rows (`int`): number of training rows, drawn with the seed.
        epochs (`int`): number of epochs.
        batch_size (`int`): rows per step.
        learning_rate (`float`): peak learning rate.
        schedule (`str`): `lr_scheduler_type` of [`~transformers.TrainingArguments`].
        warmup (`float`): fraction of the run, or number of steps.
        weight_decay (`float`): weight decay of the optimizer.
        optimizer (`str`): `optim` of [`~transformers.TrainingArguments`], such as `"adamw_torch"` or `"sgd"`.
        max_length (`int`): maximum number of tokens per row.
        image_size (`int`): height and width that images are resized to.
        seed (`int`): seed of the choice and order of the rows, of new weights and of dropout.

    Raises:
        TypeError: `pretraining` has an unknown key.
    """

    name: str
    model: str
    data: str
    from_scratch: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    pretraining: dict[str, Any] = field(default_factory=dict)
    train_rows: int = 2400
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 5e-5
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    optimizer: str = "adamw_torch"
    max_length: int = 64
    image_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        known = [f.name for f in fields(self)]
        unknown = sorted(set(self.pretraining) - set(known))
        if unknown:
            raise TypeError(f"unknown key in `pretraining`: {', '.join(unknown)}; the keys are {', '.join(known)}")

    @property
    def regime(self) -> str:
        """Origin of the weights at the start: `"fine-tuning"`, `"from scratch"` or `"after DATA"`."""
        if not self.from_scratch:
            return "fine-tuning"
        return f"after {self.pretraining.get('data', self.data)}" if self.pretraining else "from scratch"


def read_specs(path: str | os.PathLike) -> list[RunSpec]:
    """
    Read a list of runs from JSON.

    Raises:
        ValueError: it is no list of runs, two runs share a name, or a run has an unknown key or lacks one.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} must hold a list of runs, each of them an object with the fields of `RunSpec`.")
    try:
        specs = [RunSpec(**entry) for entry in entries]
    except TypeError as error:
        raise ValueError(f"{path}: a run has an unknown key or lacks a required one: {error}") from error
    repeated = [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]
    if repeated:
        raise ValueError(f"{path}: two runs share a name: {', '.join(repeated)}. Give each one a name of its own.")
    return specs
