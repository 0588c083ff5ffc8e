"""Carrying out runs and recording them, several at a time, one Parquet file each."""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from datasets import disable_progress_bars
from tqdm.auto import tqdm
from transformers.utils import logging

from .record import RecordingCallback
from .specs import RunSpec
from .table import RecordedRun, run_file, write_run
from .tasks import prepare


def run(
    spec: RunSpec,
    data_dir: str | os.PathLike | None = None,
    progress: Callable[[float], None] | None = None,
) -> RecordedRun:
    """
    Carry out one run and record it.

    Args:
        spec ([`RunSpec`]): the run.
        data_dir (`str`, *optional*): folder of local copies of the data.
        progress (`Callable[[float], None]`, *optional*): told of each fraction done.

    Returns:
        [`RecordedRun`]
    """
    ready = prepare(spec, data_dir)
    recorder = RecordingCallback(ready.probe, progress=progress)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = ready.trainer(spec, folder, [recorder])
        train_loss = trainer.train().training_loss
    provenance = {
        "run": spec.name,
        "family": ready.model.config.model_type,
        "data": spec.data,
        "regime": spec.regime,
        "spec": json.dumps(asdict(spec)),
        "train_loss": train_loss,
        "eval_loss": recorder.probe_losses[-1],
        "seconds": round(time.perf_counter() - started, 1),
        "versions": json.dumps({name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")}),
        "machine": platform.machine(),
    }
    return RecordedRun(provenance, recorder.names, recorder.result())


def _work(spec: RunSpec, out: Path, data_dir: str | None, threads: int, queue) -> None:
    """Body of one process."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        write_run(run(spec, data_dir, progress=queue.put), out)
    except Exception as error:
        queue.put(f"{spec.name}: {type(error).__name__}: {error}")
        raise SystemExit(1) from error


def harvest(
    specs: list[RunSpec],
    out: str | os.PathLike,
    data_dir: str | os.PathLike | None = None,
    processes: int = 1,
) -> list[str]:
    """
    Carry out the runs that are not there yet, several at a time.

    Args:
        specs (`list[RunSpec]`): the runs.
        out (`str`): folder that gets one Parquet file a run; together they are one table, as [`read_runs`] reads it.
        data_dir (`str`, *optional*): folder of local copies of the data.
        processes (`int`, *optional*, defaults to 1): runs at a time; the machine's cores are shared out evenly.

    Returns:
        `list[str]`: what failed, one line each. A failed run does not stop the others; calling again resumes.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    waiting = [spec for spec in specs if not run_file(out, spec.name).exists()]
    context = get_context("spawn")
    queue = context.Queue()
    threads = max(1, (os.cpu_count() or 1) // processes)
    running: dict[str, Any] = {}
    failures: list[str] = []
    with tqdm(total=len(specs), initial=len(specs) - len(waiting), desc="harvest", unit="run") as bar:
        while waiting or running:
            while waiting and len(running) < processes:
                spec = waiting.pop(0)
                folder = None if data_dir is None else str(data_dir)
                running[spec.name] = context.Process(target=_work, args=(spec, out, folder, threads, queue))
                running[spec.name].start()
            try:
                message = queue.get(timeout=1)
                if isinstance(message, str):
                    failures.append(message)
                else:
                    bar.update(message)
            except Empty:
                pass
            for name in [name for name, process in running.items() if not process.is_alive()]:
                process = running.pop(name)
                bar.n = round(bar.n, 6)  # a run ends on a whole number, which its parts may miss by rounding
                if process.exitcode and not any(line.startswith(f"{name}:") for line in failures):
                    failures.append(f"{name}: the process ended with exit code {process.exitcode}")
    return failures
