"""Harvesting: carrying out training runs and recording them, several at a time, in one Parquet file per run."""

import json
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
from datasets import disable_progress_bars
from tqdm.auto import tqdm
from transformers.utils import logging

from .recording import RecordingCallback
from .specs import RunSpec
from .table import RecordedRun, run_file, write_run
from .tasks import prepare


def record_run(spec: RunSpec, data_dir: str | os.PathLike | None = None) -> RecordedRun:
    """
    Carry out one run and record it.

    Args:
        spec ([`RunSpec`]): the run.
        data_dir (`str`, *optional*): folder of local copies of the data.

    Returns:
        [`RecordedRun`]
    """
    prepared = prepare(spec, data_dir)
    recorder = RecordingCallback(prepared.probe)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train_loss = prepared.trainer(spec, folder, [recorder]).train().training_loss
    provenance = {
        "run": spec.name,
        "family": prepared.model.config.model_type,
        "data": spec.data,
        "regime": spec.regime,
        "spec": json.dumps(asdict(spec)),
        "train_loss": train_loss,
        "eval_loss": recorder.probe_losses[-1],
        "seconds": round(time.perf_counter() - start, 1),
        "versions": json.dumps({name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")}),
        "machine": platform.machine(),
    }
    return RecordedRun(provenance, recorder.names, recorder.result())


def harvest(
    specs: list[RunSpec],
    out: str | os.PathLike,
    data_dir: str | os.PathLike | None = None,
    processes: int = 1,
) -> list[str]:
    """
    Carry out the runs that are not recorded yet, several at a time, each in a process of its own.

    A run that fails, or whose process is killed, does not stop the others. Calling this function again carries out the
    runs that are missing.

    Args:
        specs (`list[RunSpec]`): the runs.
        out (`str`): folder for the Parquet files, one per run. [`read_runs`] reads them.
        data_dir (`str`, *optional*): folder of local copies of the data.
        processes (`int`, *optional*, defaults to 1): number of runs at a time; they share the CPU cores evenly.

    Returns:
        `list[str]`: one line for each run that failed, with its name and the error.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    missing = [spec for spec in specs if not run_file(out, spec.name).exists()]
    threads = max(1, (os.cpu_count() or 1) // processes)
    failures = []
    pool = ThreadPoolExecutor(processes)
    try:
        futures = {pool.submit(_record_in_process, spec, out, data_dir, threads): spec for spec in missing}
        done = len(specs) - len(missing)
        for future in tqdm(as_completed(futures), total=len(specs), initial=done, desc="harvest", unit="run"):
            try:
                error = future.result()
            except BrokenProcessPool:
                error = "its process was killed, possibly for lack of memory: try fewer `processes`"
            if error is not None:
                failures.append(f"{futures[future].name}: {error}")
    finally:
        pool.shutdown(cancel_futures=True)  # where it is interrupted, no further run starts
    return failures


def _record_in_process(spec: RunSpec, out: Path, data_dir: str | os.PathLike | None, threads: int) -> str | None:
    # A killed process breaks its whole pool, so each run has its own.
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_set_up_process, initargs=(threads,)) as pool:
        return pool.submit(_record_to_file, spec, out, data_dir).result()


def _set_up_process(threads: int) -> None:
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


def _record_to_file(spec: RunSpec, out: Path, data_dir: str | os.PathLike | None) -> str | None:
    """Record a run and return its error as text, since not every exception survives the way between processes."""
    try:
        write_run(record_run(spec, data_dir), out)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
