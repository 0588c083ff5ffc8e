"""Rows of a data set, ready for a model, from local folders."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from benchmarks.tasks import DEVICE, NOT_SCORED, Pair, Row, Task

MAX_HELD_OUT = 1000
# For short rows in bf16 on a CPU, eager attention is a quarter faster than the fused one.
ATTENTION = {"attn_implementation": "eager"} if DEVICE == "cpu" else {}


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
    makers = {"language": _language_task, "tags": _tagging_task}
    if pair.objective in makers:
        return makers[pair.objective](pair, model, folder, data)
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
        return Task(loaded, train, held_out, probe or held_out[:spare], _pad, labels, vocabulary=vocabulary)
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
    return Task(loaded, train, held_out, held_out[:32], _next_tokens, 0, "language")


def _tagging_task(pair: Pair, model: dict[str, Any], folder: Path, data: Path) -> Task:
    """The first token of each word has the word's tag as its label, the others none."""
    parts = read_rows(data, pair.seed, pair.rows, 32)
    names = sorted({tag for part in parts for row in part for tag in row["tags"]})
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenize(part: list[Row]) -> list[Row]:
        words = [row["words"] for row in part]
        tokens = tokenizer(words, is_split_into_words=True, truncation=True, max_length=pair.max_length)
        found = []
        for i, row in enumerate(part):
            places = tokens.word_ids(i)
            starts = [place != before for place, before in zip(places, [None, *places], strict=False)]
            tags = [
                names.index(row["tags"][place]) if start and place is not None else NOT_SCORED
                for place, start in zip(places, starts, strict=True)
            ]
            found.append({k: v[i] for k, v in tokens.items()} | {"label": tags})
        return found

    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    config = AutoConfig.from_pretrained(folder, **labels, **model.get("config", {}))
    loading = {"config": config, "dtype": torch.float32} | ATTENTION
    loaded = _load(AutoModelForTokenClassification, folder, loading, scratch=False)
    train, probe, held_out = (tokenize(part) for part in parts)
    vocabulary = _trim_vocabulary(loaded, [*train, *probe, *held_out], tokenizer.pad_token_id)
    return Task(loaded, train, held_out, probe, _pad, len(names), "tags", vocabulary)


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
    labels = [row["label"] for row in rows]
    if isinstance(labels[0], list):
        labels = [some + [NOT_SCORED] * (longest - len(some)) for some in labels]
    return batch | {"labels": torch.tensor(labels)}


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
