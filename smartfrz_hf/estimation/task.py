"""A Trainer for a model and a task that are given by name, for `smartfrz estimate`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
BUILDERS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet", "txt": "text"}
SAMPLED = 64  # steps: rows of so many are prepared, or all if there are fewer
LABELS, IMAGES = ("label", "labels"), ("image", "img", "pixel_values")


def task_trainer(
    model: str,
    task: str,
    data_dir: Path | None = None,
    from_scratch: bool = False,
    train_rows: int | None = None,
    max_length: int = 128,
    **arguments: Any,
) -> tuple[Trainer, int]:
    """
    A Trainer for the first rows of a task.

    Texts with labels are classified, or scored if the labels are floats; images with labels are classified; texts without
    labels train a causal language model.

    Args:
        model (`str`): name on the Hub, or folder.
        task (`str`): GLUE task, data set on the Hub, or file or folder of parquet, csv, json, jsonl or txt files.
        data_dir (`Path`, *optional*): folder of local copies, in which the task is a folder, as in `DATA_DIR/mrpc`.
        from_scratch (`bool`, *optional*, defaults to `False`): whether only the model's configuration is used.
        train_rows (`int`, *optional*): rows of the run. All rows of the task by default.
        max_length (`int`, *optional*, defaults to `128`): most tokens of a text.
        arguments: of [`~transformers.TrainingArguments`].

    Returns:
        `tuple[Trainer, int]`: the Trainer, and the rows of the run.

    Raises:
        OSError: the model or the data is not found. The model is looked for first.
        ImportError: the package `datasets` is missing.
        ValueError: the data cannot be used; the message says why.
    """
    _check_model(model)
    args = TrainingArguments(**arguments)
    args.dataloader_pin_memory = args.device.type != "cpu"
    data = _load(task, data_dir)
    rows = min(len(data), train_rows or len(data))
    data = data.shuffle(seed=0).select(range(min(rows, SAMPLED * args.train_batch_size)))
    columns = data.column_names
    label = next((name for name in LABELS if name in columns), None)
    image = next((name for name in IMAGES if name in columns), None)
    texts = [name for name, kind in data.features.items() if name != label and _is_text(kind)][:2]
    _check_complete(data, task, [*(texts if image is None else []), *([label] if label else [])])
    if image is not None:
        args.remove_unused_columns = False  # the collator reads them
        network, prepared, collator = _images(model, task, data, image, label, from_scratch)
    else:
        network, prepared, collator = _texts(model, task, data, texts, label, from_scratch, max_length)
    network.accepts_loss_kwargs = False  # heads that ignore `num_items_in_batch` would get a wrong loss
    return Trainer(network, args, train_dataset=prepared, data_collator=collator), rows


def _check_model(model: str) -> None:
    """Refuse a folder that cannot hold a model, before any data is read."""
    if not Path(model).is_dir():
        if not _may_be_on_the_hub(model):
            raise OSError(
                f"There is no folder {model} with a model. Give a folder, or the name of a model on the Hub."
            )
    elif not (Path(model) / "config.json").is_file():
        raise OSError(f"The folder {model} holds no model: it has no config.json, which `save_pretrained` writes.")


def _may_be_on_the_hub(name: str) -> bool:
    """Whether the Hub allows such a name. Most paths are none."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _load(task: str, data_dir: Path | None) -> Any:
    """The training split, from a file or a folder, or from the Hub."""
    try:
        from datasets import disable_progress_bars, load_dataset
    except ImportError as error:
        raise ImportError(
            "`smartfrz estimate` reads its data with `datasets`: pip install 'smartfrz_hf[estimate]'"
        ) from error
    disable_progress_bars()
    name = task.removeprefix("glue/")
    places = [Path(task)] if data_dir is None else [data_dir / task, data_dir / "glue" / name, data_dir / name]
    place = next((place for place in places if place.exists()), None)
    if place is None and data_dir is not None:
        tried = dict.fromkeys(map(str, places))  # without those that are the same
        raise ValueError(f"There is no {task} in {data_dir}: not found: {', '.join(tried)}.")
    if place is None and (Path(task).suffix[1:] in BUILDERS or not _may_be_on_the_hub(task)):
        raise OSError(f"There is no file or folder {task}. Give one, a GLUE task, or a data set on the Hub.")
    if place is None:
        try:
            return load_dataset(*(("nyu-mll/glue", name) if name in GLUE else (task,)), split="train")
        except (OSError, ValueError) as error:
            raise OSError(
                f"The data {task} cannot be loaded from the Hub: {_quoted(error)}. Check the name and the connection, or give a local "
                "file or folder as `--task`, or the folder that holds it as `--data_dir`."
            ) from error
    return _load_files(place)


def _load_files(place: Path) -> Any:
    """The training rows in a file or a folder."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    files = [place] if place.is_file() else [file for file in sorted(place.rglob("*")) if file.is_file()]
    files = [file for file in files if file.suffix[1:] in BUILDERS]
    train = [file for file in files if file.stem.startswith("train")] or files
    if not train:
        raise ValueError(f"{place} holds no file of training data. Files end in {', '.join(BUILDERS)}.")
    kind = train[0].suffix[1:]
    options = {"sep": "\t"} if kind == "tsv" else {}
    same = [file for file in train if file.suffix == train[0].suffix]
    names = ", ".join(map(str, same))
    full = [str(file) for file in same if file.stat().st_size]
    if not full:
        raise ValueError(f"The data in {names} is empty.")
    try:
        return load_dataset(BUILDERS[kind], data_files=full, split="train", **options)
    except (DatasetsError, OSError, StopIteration, ValueError) as error:
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            raise ValueError(f"The data in {names} has no rows.") from error
        raise ValueError(
            f"The data in {names} cannot be read: {_quoted(error.__cause__ or error)}. Mend the file, or leave it out."
        ) from error


def _quoted(error: BaseException) -> str:
    """What another library says, to be followed by a full stop."""
    return str(error).strip().rstrip(".!")


def _make(auto: Any, name: str, from_scratch: bool, **options: Any) -> Any:
    config = AutoConfig.from_pretrained(name, **options)
    if from_scratch:
        return auto.from_config(config)
    return auto.from_pretrained(name, config=config, ignore_mismatched_sizes=True)


def _numbered(data: Any, task: str, label: str) -> tuple[list[int], int]:
    """Labels as numbers from 0 on, and how many there are."""
    feature, values = data.features[label], list(data[label])
    count = getattr(feature, "num_classes", None)
    if count is None:
        numbers = {value: number for number, value in enumerate(sorted(set(values)))}
        values, count = [numbers[value] for value in values], len(numbers)
    if count < 2:  # one output would be a regression
        raise ValueError(f"The {len(data)} rows of {task} have only one class in column `{label}`.")
    return values, count


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _check_complete(data: Any, task: str, columns: list[str]) -> None:
    """Refuse rows without a text or a label."""
    for name in columns:
        missing = sum(value is None or value != value for value in data[name])
        if missing:
            raise ValueError(f"{missing} of {len(data)} rows of {task} have no `{name}`. Remove them from the file.")


def _texts(
    model: str, task: str, data: Any, texts: list[str], label: str | None, from_scratch: bool, max_length: int
) -> tuple:
    if not texts:
        raise ValueError(
            f"{task} has no column of texts or images, but {', '.join(data.column_names)}. Call `estimate(trainer)` with a "
            "Trainer of your own."
        )
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def tokenize(rows: Any) -> Any:
        return tokenizer(*(rows[name] for name in texts), truncation=True, max_length=max_length)

    prepared = data.map(tokenize, batched=True, remove_columns=data.column_names)
    if label is None:
        network = _make(AutoModelForCausalLM, model, from_scratch)
        return network, prepared, DataCollatorForLanguageModeling(tokenizer, mlm=False)
    if data.features[label].dtype.startswith("float"):
        labels, count = list(data[label]), 1
    else:
        labels, count = _numbered(data, task, label)
    network = _make(AutoModelForSequenceClassification, model, from_scratch, num_labels=count)
    if network.config.pad_token_id is None:
        network.config.pad_token_id = tokenizer.pad_token_id
    return network, prepared.add_column("labels", labels), DataCollatorWithPadding(tokenizer)


def _images(model: str, task: str, data: Any, image: str, label: str | None, from_scratch: bool) -> tuple:
    if label is None:
        raise ValueError(f"The images have no column {' or '.join(LABELS)}, but {', '.join(data.column_names)}.")
    labels, count = _numbered(data, task, label)
    network = _make(AutoModelForImageClassification, model, from_scratch, num_labels=count)
    processor = AutoImageProcessor.from_pretrained(model)
    rows = [{"picture": number, "labels": value} for number, value in enumerate(labels)]

    def collate(batch: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        pictures = [data[row["picture"]][image].convert("RGB") for row in batch]
        pixels = processor(pictures, return_tensors="np")["pixel_values"]
        return {
            "pixel_values": torch.from_numpy(np.asarray(pixels, dtype=np.float32)),
            "labels": torch.tensor([row["labels"] for row in batch]),
        }

    return network, rows, collate
