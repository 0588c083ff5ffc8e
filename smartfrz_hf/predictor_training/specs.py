"""The runs that the predictor learns from, as they are declared in JSON."""

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass
class RunSpec:
    """
    One training run to record.

    Args:
        name (`str`): names the run's folder.
        model (`str`): Hub id or folder of the model that is fine-tuned, or the model type to train from scratch.
        data (`str`): `"glue/TASK"`, `"cifar10"`, `"fashion_mnist"`, or the Hub id of a set with the columns of one of these.
        from_scratch (`bool`): whether the model starts from random weights.
        config (`dict`): overrides of the model's configuration.
        pretraining (`dict`): what is different in a run that comes first, and whose backbone this one starts from; it
            is not recorded.
        train_rows (`int`): rows of the training set, drawn with the seed.
        epochs (`int`): passes over them.
        batch_size (`int`): rows a step.
        learning_rate (`float`): its peak.
        schedule (`str`): `lr_scheduler_type` of [`~transformers.TrainingArguments`].
        warmup (`float`): fraction of the run, or steps.
        weight_decay (`float`): of the optimizer.
        optimizer (`str`): `optim` of [`~transformers.TrainingArguments`], such as `"adamw_torch"` or `"sgd"`.
        max_length (`int`): most tokens a row.
        image_size (`int`): height and width that images are brought to.
        seed (`int`): of the rows drawn, their order, new weights and dropout.
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
        unknown = set(self.pretraining) - {f.name for f in fields(self)}
        if unknown:
            raise TypeError(f"unknown key in `pretraining`: {', '.join(sorted(unknown))}")

    @property
    def regime(self) -> str:
        """Where the weights come from at the start."""
        if not self.from_scratch:
            return "fine-tuning"
        return f"after {self.pretraining['data']}" if self.pretraining else "from scratch"


def read_specs(path: str | os.PathLike) -> list[RunSpec]:
    """
    Read a list of runs from JSON.

    Raises:
        ValueError: two runs share a name, or a run has an unknown key.
    """
    entries = json.loads(Path(path).read_text())
    try:
        specs = [RunSpec(**entry) for entry in entries]
    except TypeError as error:
        raise ValueError(f"{path}: a run has a key that is unknown or lacks one that is needed: {error}") from error
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two runs share a name: {sorted(n for n in set(names) if names.count(n) > 1)}")
    return specs
