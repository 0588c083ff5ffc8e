"""Harvesting: carrying out training runs and recording them, several at a time, in one Parquet file per run."""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import disable_progress_bars
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import logging

from .recording import RecordingCallback
from .specs import RunSpec
from .table import RecordedRun, run_file, write_run
from .tasks import prepare, pretrain

KILLED = "its process was killed, possibly for lack of memory: try fewer `processes`"


class Progress(NamedTuple):
    """
    How far a training is.

    Attributes:
        title (`str`): name of the run, and which of its trainings it is.
        step (`int`), steps (`int`): steps done, and in all.
    """

    title: str
    step: int
    steps: int


class ProgressTeller(TrainerCallback):
    """
    Tells how far a training is, at its start and after each step.

    Args:
        title (`str`): of the training.
        tell (`Callable[[Progress], None]`): is told.
    """

    def __init__(self, title: str, tell: Callable[[Progress], None]):
        self.title, self.tell = title, tell

    def on_train_begin(self, args, state, control, **kwargs):
        """Tell that it begins."""
        self.tell(Progress(self.title, state.global_step, state.max_steps))

    def on_step_end(self, args, state, control, **kwargs):
        """Tell that a step is done."""
        self.tell(Progress(self.title, state.global_step, state.max_steps))


def record_run(
    spec: RunSpec, data_dir: str | os.PathLike | None = None, tell: Callable[[Progress], None] = lambda progress: None
) -> RecordedRun:
    """
    Carry out one run and record it.

    Args:
        spec ([`RunSpec`]): the run.
        data_dir (`str`, *optional*): folder of local copies of the data.
        tell (`Callable[[Progress], None]`, *optional*): is told how far the run is, and its pretraining before it.

    Returns:
        [`RecordedRun`]
    """
    first = ProgressTeller(f"{spec.name}, pretraining", tell)
    prepared = prepare(spec, data_dir, start=pretrain(spec, data_dir, [first]) if spec.pretraining else None)
    recorder = RecordingCallback(prepared.probe)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train_loss = prepared.trainer(spec, folder, [recorder, ProgressTeller(spec.name, tell)]).train().training_loss
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
    runs that are missing. Progress bars show how far the runs are, and a line how long each one took.

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
        with tqdm(total=len(specs), initial=len(specs) - len(missing), desc="harvest", unit="run") as bar:
            futures = {pool.submit(_record_in_process, spec, out, data_dir, threads): spec for spec in missing}
            for future in as_completed(futures):
                name, (error, seconds) = futures[future].name, future.result()
                tqdm.write(f"{name}: {'recorded in' if error is None else 'failed after'} {seconds:.0f} s")
                bar.update()
                if error is not None:
                    failures.append(f"{name}: {error}")
    finally:
        pool.shutdown(cancel_futures=True)  # where it is interrupted, no further run starts
    return failures


def _record_in_process(
    spec: RunSpec, out: Path, data_dir: str | os.PathLike | None, threads: int
) -> tuple[str | None, float]:
    """Record a run in a process of its own, under a progress bar. Returns its error, if there is one, and its seconds."""
    start, context = time.perf_counter(), get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_record_to_file, args=(spec, out, data_dir, threads, sender))
    process.start()
    sender.close()  # so that the end of the process ends what is received
    with receiver, tqdm(desc=spec.name, unit="step", leave=False) as bar:
        try:
            while isinstance(message := receiver.recv(), Progress):
                if (bar.desc, bar.total) != (f"{message.title}: ", message.steps):
                    bar.set_description(message.title, refresh=False)
                    bar.reset(message.steps)
                bar.update(message.step - bar.n)
        except EOFError:
            message = KILLED
    process.join()
    return message, time.perf_counter() - start


def _record_to_file(
    spec: RunSpec, out: Path, data_dir: str | os.PathLike | None, threads: int, sender: Connection
) -> None:
    """
    Record a run, and send how far it is. At the end, send its error, or `None`: as text, since not every exception survives the
    way between processes.
    """
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        write_run(record_run(spec, data_dir, sender.send), out)
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")
    else:
        sender.send(None)
