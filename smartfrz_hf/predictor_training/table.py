"""The table of recorded runs: one row per run and unit, with its provenance, in one Parquet file per run."""

import os
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Array2D, Dataset, Features, List, Value

PROVENANCE = {
    "run": "string",
    "family": "string",
    "data": "string",
    "regime": "string",
    "spec": "string",
    "train_loss": "float64",
    "eval_loss": "float64",
    "seconds": "float64",
    "versions": "string",
    "machine": "string",
}
# Tensors of [`RecordingCallback.result`]: of the run, of each unit, and of each unit with several numbers per moment.
RUN_FIELDS = {
    "steps": "int32",
    "learning_rates": "float64",
    "probe_steps": "int32",
    "probe_losses": "float32",
    "rewind_steps": "int32",
    "rewind_range": "float32",
}
UNIT_FIELDS = ("cka", "token_cka", "self_cka", "gradient_norms", "rewind_losses", "rewind_shifts")
UNIT_WIDE_FIELDS = {"front_changes": 8}


@dataclass
class RecordedRun:
    """
    A recorded run.

    Attributes:
        provenance (`dict`):
            Name, model family, data, regime, losses and seconds of the run, and specification and versions as JSON.
        units (`list[str]`): names of the units.
        tensors (`dict[str, torch.Tensor]`): see [`RecordingCallback.result`].
    """

    provenance: dict[str, Any]
    units: list[str]
    tensors: dict[str, torch.Tensor]

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.provenance["run"]

    @property
    def family(self) -> str:
        """Family of the model."""
        return self.provenance["family"]

    @property
    def task(self) -> str:
        """Name of the data set."""
        return self.provenance["data"]


def run_file(folder: str | os.PathLike, name: str) -> Path:
    """Path of the file of a run."""
    return Path(folder) / f"{name}.parquet"


def write_run(run: RecordedRun, folder: str | os.PathLike) -> None:
    """Write a run to its file. The file appears only when it is complete."""
    tensors, units = run.tensors, range(len(run.units))
    weights_per_unit = tensors["weights"].shape[-1]
    columns: dict[str, list] = {key: [run.provenance[key]] * len(run.units) for key in PROVENANCE}
    columns |= {"unit": list(run.units), "index": list(units)}
    columns |= {key: [tensors[key].numpy()] * len(run.units) for key in RUN_FIELDS}
    columns |= {key: [tensors[key][:, unit].numpy() for unit in units] for key in UNIT_FIELDS}
    wide = UNIT_WIDE_FIELDS | {"weights": weights_per_unit}
    columns |= {key: [tensors[key][:, unit].numpy() for unit in units] for key in wide}
    features = {key: Value(kind) for key, kind in PROVENANCE.items()}
    features |= {"unit": Value("string"), "index": Value("int32")}
    features |= {key: List(Value(kind)) for key, kind in RUN_FIELDS.items()}
    features |= {key: List(Value("float32")) for key in UNIT_FIELDS}
    features |= {key: Array2D((None, size), "float32") for key, size in wide.items()}
    partial = Path(folder) / f".{run.name}.partial"
    Dataset.from_dict(columns, features=Features(features)).to_parquet(partial)
    partial.rename(run_file(folder, run.name))


def read_table(folder: str | os.PathLike) -> Dataset:
    """
    Read all recorded runs as one table, ordered by run and unit.

    Raises:
        FileNotFoundError: the folder holds no recorded run.
    """
    files = sorted(Path(folder).glob("[!.]*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no recorded run; record some with `smartfrz harvest`.")
    return Dataset(pq.read_table(files))


def read_runs(folder: str | os.PathLike) -> list[RecordedRun]:
    """
    Read all recorded runs, ordered by name.

    Raises:
        FileNotFoundError: the folder holds no recorded run.
        ValueError: a run was recorded by an earlier version and lacks a column.
    """
    rows = read_table(folder).with_format("numpy")
    return [_run(list(part)) for _, part in groupby(rows, key=lambda row: row["run"])]


def _run(rows: list[dict[str, Any]]) -> RecordedRun:
    def tensor(values: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(values))

    first = rows[0]
    missing = [key for key in (*RUN_FIELDS, *UNIT_FIELDS, *UNIT_WIDE_FIELDS) if key not in first]
    if missing:
        raise ValueError(
            f"The run {first['run']} was recorded by an earlier version and lacks {', '.join(missing)}; record it "
            "again."
        )
    tensors = {key: tensor(first[key]) for key in RUN_FIELDS}
    tensors |= {
        key: tensor(np.stack([row[key] for row in rows], axis=1))
        for key in (*UNIT_FIELDS, *UNIT_WIDE_FIELDS, "weights")
    }
    provenance = {key: first[key].item() if isinstance(first[key], np.generic) else first[key] for key in PROVENANCE}
    return RecordedRun(provenance, [str(row["unit"]) for row in rows], tensors)
