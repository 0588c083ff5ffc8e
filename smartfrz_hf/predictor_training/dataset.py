"""The data set that the predictor is trained on, built from recorded runs."""

from collections.abc import Iterator, Sequence
from copy import copy

import torch
from torch.utils.data import Dataset

from ..predictor import SmartFRZPredictorConfig, build_inputs
from ..predictor.configuration import CONTEXT_SIZE
from ..predictor.features import EPSILON
from ..signals.schedule import LearningRates
from .labels import LABELS, TARGETS
from .table import RecordedRun

FIRST_DECISION = 0.05  # fraction of a run before which there are no rows
DROP_FRONT, DROP_PROBE = 0.5, 0.1  # probabilities of the two changes that `augment` makes to a row
INPUTS = ("features", "usable", "context", "active")


class FreezingStages(Dataset):
    """
    One row per freezing stage: the inputs of the predictor for all units, and which units may freeze.

    Models with fewer units than the largest one are padded with units that are not `active`.

    Args:
        runs (`Sequence[RecordedRun]`): the recorded runs.
        config ([`SmartFRZPredictorConfig`]): form and sizes of the predictor.
        label (`str`): what counts as converged, one of [`LABELS`].
        spacings (`Sequence[int]`, *optional*, defaults to `(1,)`):
            Distances between the recorded snapshots of a window. Each freezing stage gives a row for each spacing.
        target (`str`, *optional*, defaults to `"kept"`): what the predictor learns, one of [`TARGETS`].

    Attributes:
        runs (`list[RecordedRun]`), label (`str`): as given.
        columns (`dict[str, torch.Tensor]`):
            All rows. For the predictor:

            - `features` `(rows, units, window, input_size)`, `usable` `(rows, units, window)` and `context`
              `(rows, units, 4 or 11)`: see [`PredictorInputs`];
            - `active`, `labels` (which have converged) and `targets` (what the predictor learns) `(rows, units)`.

            For simple rules:

            - `weight_change` `(rows, units)`: norm of the last update, relative to the norm of the weights;
            - `self_cka` `(rows, units)`: CKA of each unit's output to that some probes before;
            - `gradient_change` `(rows, units)`: relative change of the norm of the gradients since the last probe
              (AutoFreeze, arXiv 2102.01386).

            Of the row: `run` (index), `step`, `progress` (fraction of the run) and `spacing` `(rows,)`.
    """

    def __init__(
        self,
        runs: Sequence[RecordedRun],
        config: SmartFRZPredictorConfig,
        label: str,
        spacings: Sequence[int] = (1,),
        target: str = "kept",
    ):
        self.runs, self.label, self.augment = list(runs), label, False
        units = max(len(run.units) for run in runs)
        rows = [
            {key: _pad(value, units) for key, value in row.items()} | {"run": torch.tensor(index)}
            for index, run in enumerate(runs)
            for spacing in spacings
            for row in _rows(run, spacing, label, target, config)
        ]
        self.columns = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def select(self, rows: torch.Tensor, augment: bool = False) -> "FreezingStages":
        """
        Select some of the rows.

        Args:
            rows (`torch.Tensor` of shape `(rows,)`, `bool`): rows to keep.
            augment (`bool`, *optional*, defaults to `False`):
                Whether to vary the rows at random each time they are read: half of the time some units in front are
                inactive, as if they were frozen, and one time in ten the front probe is unknown.

        Returns:
            [`FreezingStages`]
        """
        part = copy(self)
        part.columns, part.augment = {key: value[rows] for key, value in self.columns.items()}, augment
        return part

    def __len__(self) -> int:
        return len(self.columns["run"])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.__getitems__([row]).items()}

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """A whole batch: reading the many small rows one by one would take most of the training time."""
        batch = {key: self.columns[key][rows] for key in INPUTS} | {"labels": self.columns["targets"][rows]}
        if self.augment:
            units = batch["active"].sum(1)
            depth = (torch.rand(len(rows)) * units).long() * (torch.rand(len(rows)) < DROP_FRONT)
            batch["active"] = batch["active"] & (torch.arange(batch["active"].shape[1]) >= depth.unsqueeze(1))
            batch["context"][torch.rand(len(rows)) < DROP_PROBE, :, CONTEXT_SIZE:] = 0
        return batch


def _rows(
    run: RecordedRun, spacing: int, label: str, target: str, config: SmartFRZPredictorConfig
) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of a run for one spacing, before padding."""
    weights, steps = run.tensors["weights"][..., : config.weights_per_unit], run.tensors["steps"]
    rates = LearningRates(run.tensors["learning_rates"].tolist())
    gradients, last = run.tensors["gradient_norms"], int(steps[-1])
    labels = LABELS[label](run.tensors)
    targets = TARGETS[target](run.tensors, labels)
    for probe, step in enumerate(run.tensors["probe_steps"].tolist()):
        now = int((steps <= step).sum()) - 1
        window = torch.arange(now % spacing, now + 1, spacing)[-config.window :]
        if not FIRST_DECISION * last <= step < last or len(window) < 2:
            continue
        inputs = build_inputs(
            config,
            weights[window].transpose(0, 1),
            weights[0],
            rates.spent[window],
            rates.relative[now],
            step / last,
            run.tensors["front_changes"][probe].unflatten(-1, (-1, 2)) if config.front_probe else None,
        )
        update, before = weights[window[-1]] - weights[window[-2]], gradients[probe - 1]
        yield {
            **inputs._asdict(),
            "active": torch.ones(len(run.units), dtype=torch.bool),
            "labels": labels[probe].float(),
            "targets": targets[probe],
            "weight_change": update.norm(dim=-1) / weights[now].norm(dim=-1),
            "self_cka": run.tensors["self_cka"][probe],
            "gradient_change": ((gradients[probe] - before) / before.clamp(min=EPSILON)).abs(),
            "step": torch.tensor(step),
            "progress": torch.tensor(step / last),
            "spacing": torch.tensor(spacing),
        }


def _pad(value: torch.Tensor, units: int) -> torch.Tensor:
    """Pad the first dimension, of the units, with zeros; numbers of the row have none."""
    return value if value.dim() == 0 else torch.cat([value, value.new_zeros(units - len(value), *value.shape[1:])])
