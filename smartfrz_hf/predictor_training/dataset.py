"""From recorded runs to the rows that a predictor is trained on."""

from collections.abc import Sequence
from copy import copy

import torch
from torch.utils.data import Dataset

from ..predictor import SmartFRZPredictor, SmartFRZPredictorConfig
from ..predictor.features import CONTEXT, EPSILON, contexts, probe_features
from ..signals.schedule import LearningRates
from .labels import LABELS, TARGETS
from .table import RecordedRun

FIRST_DECISION = 0.05
UNPROBED = 0.1  # share of training rows that know nothing of the front probe
INPUTS = ("features", "usable", "context", "active")


class FreezingStages(Dataset):
    """
    One row a freezing stage: what the predictor would have seen of all units there, and which may freeze.

    Units that a model does not have are filled up to the largest one's number, and not `active`.

    Args:
        runs (`Sequence[RecordedRun]`): the runs.
        config ([`SmartFRZPredictorConfig`]): form, window and weights_per_unit of the predictor.
        label (`str`): one of `LABELS`.
        spacings (`Sequence[int]`): recorded snapshots from one of a window to the next; a stage gives a row for each.
        target (`str`): what is learned, one of `TARGETS`.

    Attributes:
        columns (`dict[str, torch.Tensor]`): `features` `(rows, units, window, input_size)`, `usable`
            `(rows, units, window)`, `context` `(rows, units, context_size)`, `active`, `labels`, which say what has
            converged, and `targets`, which are learned, `(rows, units)`, `run`, `step`, `progress`, the step as a fraction
            of the run, and `spacing`, `(rows,)`; and for rules, not for the predictor, `weight_change`, the update against
            the weights' own norm, `self_cka`, the CKA of each unit's output to what it was some probes before, and
            `gradient_change`, by which share the norm of its gradients has changed since the last probe (AutoFreeze, arXiv
            2102.01386), `(rows, units)`.
    """

    def __init__(
        self,
        runs: Sequence[RecordedRun],
        config: SmartFRZPredictorConfig,
        label: str,
        spacings: Sequence[int] = (1,),
        target: str = "kept",
    ):
        self.runs, self.as_in_use = list(runs), False
        units = max(len(run.units) for run in runs)
        parts = [
            _rows(run, index, spacing, label, target, config, units)
            for index, run in enumerate(runs)
            for spacing in spacings
        ]
        self.columns = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def select(self, rows: torch.Tensor, as_in_use: bool = False) -> "FreezingStages":
        """
        Some of the rows.

        Args:
            rows (`torch.Tensor` of shape `(rows,)`, `bool`): which.
            as_in_use (`bool`): whether, each time a row is taken, some units in front are left out at random, as if
                they were frozen, and now and then nothing is known of the front probe.
        """
        part = copy(self)
        part.columns, part.as_in_use = {key: value[rows] for key, value in self.columns.items()}, as_in_use
        return part

    def __len__(self) -> int:
        return len(self.columns["run"])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.__getitems__([row]).items()}

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """A batch at once: rows are small, and so many that fetching them one by one would take most of the time."""
        batch = {key: self.columns[key][rows] for key in INPUTS} | {"labels": self.columns["targets"][rows]}
        if self.as_in_use:
            present = batch["active"].sum(1)
            front = (torch.rand(len(rows)) * present).long() * (torch.rand(len(rows)) < 0.5)
            batch["active"] = batch["active"] & (torch.arange(batch["active"].shape[1]) >= front.unsqueeze(1))
            batch["context"][torch.rand(len(rows)) < UNPROBED, :, CONTEXT:] = 0
        return batch


def _rows(
    run: RecordedRun, index: int, spacing: int, label: str, target: str, config: SmartFRZPredictorConfig, most: int
) -> dict[str, torch.Tensor]:
    weights, steps = run.tensors["weights"][..., : config.weights_per_unit], run.tensors["steps"]
    rates = LearningRates(run.tensors["learning_rates"].tolist())
    units, last, window = weights.shape[1], int(steps[-1]), config.window
    gradients, predictor = run.tensors["gradient_norms"], SmartFRZPredictor(config)
    labels = LABELS[label](run.tensors)
    rows: dict[str, list[torch.Tensor]] = {}
    targets = TARGETS[target](run.tensors, labels)
    for probe, step in enumerate(run.tensors["probe_steps"].tolist()):
        now = int((steps <= step).sum()) - 1
        seen = torch.arange(now % spacing, now + 1, spacing)[-window:]
        if not FIRST_DECISION * last <= step < last or len(seen) < 2:
            continue
        mask = torch.arange(window) >= window - len(seen)
        snapshots = torch.zeros(units, window, weights.shape[-1])
        snapshots[:, mask] = weights[seen].transpose(0, 1)
        spent = torch.zeros(window)
        spent[mask] = rates.spent[seen]
        features, usable = predictor.read(snapshots, weights[0], mask, spent)
        context = contexts(units, step / last, rates.relative[now], rates.spent[now])
        if config.front_probe:
            changes = run.tensors["front_changes"][probe].unflatten(-1, (-1, 2))
            context = torch.cat([context, probe_features(changes)], dim=-1)
        row = {
            "features": features,
            "usable": usable,
            "context": context,
            "active": torch.ones(units, dtype=torch.bool),
            "labels": labels[probe].float(),
            "targets": targets[probe],
            "weight_change": (weights[seen[-1]] - weights[seen[-2]]).norm(dim=-1) / weights[now].norm(dim=-1),
            "self_cka": run.tensors["self_cka"][probe],
            "gradient_change": (
                (gradients[probe] - gradients[probe - 1]) / gradients[probe - 1].clamp(min=EPSILON)
            ).abs(),
        }
        for key, value in row.items():
            filled = value.new_zeros(most, *value.shape[1:])
            filled[:units] = value
            rows.setdefault(key, []).append(filled)
        for key, number in (("run", index), ("step", step), ("progress", step / last), ("spacing", spacing)):
            rows.setdefault(key, []).append(torch.tensor(number))
    return {key: torch.stack(values) for key, values in rows.items()}
