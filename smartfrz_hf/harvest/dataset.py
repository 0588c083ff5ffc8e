"""From recorded runs to the rows that a predictor is trained on."""

from collections.abc import Callable

import torch
from torch.utils.data import Dataset

from ..policies import rate_and_rest
from .labels import settled
from .table import RecordedRun

FIRST_DECISION = 0.05
INPUTS = ("snapshots", "start", "mask", "context")


class HistoryRows(Dataset):
    """
    One row a run, freezing stage and unit: what the predictor would have seen there, and whether the unit had settled.

    Args:
        runs (`list[RecordedRun]`): the runs.
        window (`int`): snapshots in a history.
        cka_threshold (`float`), change_left (`float`): as for [`~harvest.labels.settled`].

    Attributes:
        columns (`dict[str, torch.Tensor]`): `snapshots` `(rows, window, samples)`, `start` `(rows, samples)`, `mask`
            `(rows, window)`, `context` `(rows, 4)`, `labels` `(rows,)`, `run`, `unit` and `step` `(rows,)`.
    """

    def __init__(self, runs: list[RecordedRun], window: int, cka_threshold: float = 0.9998, change_left: float = 0.01):
        self.runs = runs
        rows: dict[str, list[torch.Tensor]] = {}
        for index, run in enumerate(runs):
            for key, value in _rows(run, window, settled(run.tensors["cka"], cka_threshold, change_left)).items():
                rows.setdefault(key, []).append(value)
            rows.setdefault("run", []).append(torch.full_like(rows["unit"][-1], index))
        self.columns = {key: torch.cat(parts) for key, parts in rows.items()}

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {key: self.columns[key][row] for key in (*INPUTS, "labels")}


def _rows(run: RecordedRun, window: int, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    weights, steps = run.tensors["weights"], run.tensors["steps"]
    rates = run.tensors["learning_rates"].tolist()
    units, last = weights.shape[1], int(steps[-1])
    padded = torch.cat([torch.zeros(window, *weights.shape[1:]), weights])
    parts: dict[str, list[torch.Tensor]] = {key: [] for key in (*INPUTS, "labels", "unit", "step")}
    for probe, step in enumerate(run.tensors["probe_steps"].tolist()):
        if not FIRST_DECISION * last <= step < last:
            continue
        now = int((steps <= step).sum()) - 1
        filled = min(window, now + 1)
        rate, rest = rate_and_rest(rates, now)
        depth = torch.arange(units) / max(1, units - 1)
        parts["snapshots"].append(padded[now + 1 : now + 1 + window].transpose(0, 1))
        parts["start"].append(weights[0])
        parts["mask"].append((torch.arange(window) >= window - filled).expand(units, -1))
        parts["context"].append(torch.stack([depth, *(torch.full((units,), x) for x in (step / last, rate, rest))], 1))
        parts["labels"].append(labels[probe].float())
        parts["unit"].append(torch.arange(units))
        parts["step"].append(torch.full((units,), step))
    return {key: torch.cat(values) for key, values in parts.items()}


def split(runs: list[RecordedRun], held_out: Callable[[RecordedRun], bool]) -> tuple[list, list]:
    """The runs to train on, and those held out."""
    return [run for run in runs if not held_out(run)], [run for run in runs if held_out(run)]
