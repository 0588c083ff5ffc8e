"""Runs for a report, read from the files that a Trainer and SmartFRZ have written. Imports no torch."""

import json
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cost.stages import freeze_steps, frozen_spans

STATE_FILE = "smartfrz_state.json"
FORMAT = 2
TRAINER_FILE = "trainer_state.json"
# What the Trainer logs beside losses and metrics.
NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


@dataclass(frozen=True)
class Attention:
    """
    What the predictor attended to when it froze one unit.

    Attributes:
        unit (`str`): its name.
        step (`int`): optimizer steps done when it froze.
        steps (`list[int]`): the steps of the snapshots in the weight history, oldest first.
        weights (`list[float]`): the attention to each of them; their sum is 1.
    """

    unit: str
    step: int
    steps: list[int]
    weights: list[float]


@dataclass
class SavedRun:
    """
    One run, as its files tell of it.

    Attributes:
        folder (`Path`): that was given.
        logs (`list[dict]`): the Trainer's `log_history`.
        trainer (`dict`): the Trainer's state.
        state (`dict`, *optional*): the state of SmartFRZ, without tensors; `None` for a run without it.
        versions (`dict[str, str]`): of smartfrz_hf and other libraries that wrote it.
    """

    folder: Path
    logs: list[dict[str, Any]]
    trainer: dict[str, Any]
    state: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def ledger(self) -> dict[str, Any]:
        """The state of the ledger; empty for a run without SmartFRZ."""
        return {} if self.state is None else self.state["ledger"]

    @property
    def steps(self) -> int:
        """Optimizer steps that the logs or the ledger know of."""
        return max([1, self.trainer.get("global_step", 0), *(log.get("step", 0) for log in self.logs)])

    @property
    def seconds(self) -> float | None:
        """Wall-clock time of training, where it is known."""
        logged = [log["train_runtime"] for log in self.logs if "train_runtime" in log]
        return logged[-1] if logged else self.ledger.get("seconds")

    def time_at(self, step: float) -> float | None:
        """Seconds from the start to a step: between two freezing stages, steps take the same time."""
        records = self.ledger.get("records") or []
        points = [(record["step"], record["seconds"]) for record in records]
        if self.seconds is not None and (not points or points[-1][0] < self.steps):
            points.append((self.steps, max([self.seconds, *(seconds for _, seconds in points)])))
        points = [(0, 0.0), *(point for point in points if point[0] > 0)]
        if len(points) < 2:
            return None
        index = min(max(1, bisect_right([at for at, _ in points], step)), len(points) - 1)
        (left, begin), (right, end) = points[index - 1 : index + 1]
        return begin + (end - begin) * (step - left) / (right - left)

    def curve(self, key: str) -> list[tuple[float, float]]:
        """Step and value of one key of the logs."""
        return [(log["step"], float(log[key])) for log in self.logs if isinstance(log.get(key), int | float)]

    @property
    def metrics(self) -> list[str]:
        """Keys of the evaluations, the loss first."""
        keys = dict.fromkeys(key for log in self.logs for key in log if key.startswith("eval_"))
        found = [key for key in keys if not key.endswith(NO_METRICS) and self.curve(key)]
        return sorted(found, key=lambda key: key != "eval_loss")

    @property
    def attentions(self) -> list[Attention]:
        """For each unit that the predictor froze, what it attended to."""
        return [
            Attention(unit, stage["step"], stage["snapshot_steps"], weights)
            for stage in self.ledger.get("stages", ())
            for unit, weights in zip(stage["units"], stage.get("attentions") or (), strict=False)
        ]

    @property
    def freeze_steps(self) -> dict[str, int]:
        """The step at which each unit that is frozen at the end froze."""
        return freeze_steps(self.ledger.get("stages", ()))

    @property
    def frozen_spans(self) -> dict[str, list[tuple[int, int]]]:
        """From which step to which each unit was frozen."""
        return frozen_spans(self.ledger.get("stages", ()), self.steps)


def read_run(folder: Path) -> SavedRun:
    """
    Read a run.

    Args:
        folder (`Path`): output folder of a Trainer, whose last checkpoint is read, or one checkpoint.

    Raises:
        ValueError: it holds neither a Trainer's state nor one of SmartFRZ, or one is damaged.
    """
    checkpoints = sorted(
        (path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    trainer = [_read(path / TRAINER_FILE) for path in (*checkpoints, folder) if (path / TRAINER_FILE).is_file()]
    states = [path / STATE_FILE for path in (*checkpoints, folder) if (path / STATE_FILE).is_file()]
    if not trainer and not states:
        raise ValueError(
            f"{folder} holds no run: there is no {TRAINER_FILE} and no {STATE_FILE} in it or in a checkpoint below it. Give "
            'the output folder of a Trainer that saves checkpoints, or one checkpoint; `save_strategy="no"` saves none.'
        )
    # Of two with the same step, the one in the output folder, which `save_state` wrote when the run had ended.
    latest: dict[str, Any] = max(reversed(trainer), key=lambda state: state.get("global_step", 0), default={})
    run = SavedRun(folder, latest.get("log_history", []), latest)
    if states:
        content = _read(states[-1])
        try:
            if content["format"] != FORMAT:
                raise ValueError(
                    f"{states[-1]} was written by version {content['version']} of smartfrz_hf, in format {content['format']}; "
                    f"this version reads format {FORMAT} only. Install that version."
                )
            run.versions = {"smartfrz_hf": content["version"], **content["libraries"]}
            run.state = state = content["state"]
            for part in (state["units"], state["config"].items(), state["ledger"]["stages"]):
                iter(part)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{states[-1]} is damaged ({type(error).__name__}: {error}). Give another checkpoint."
            ) from error
    return run


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds {str(content)[:40]!r}, not an object")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Give another checkpoint.") from error
    return content
