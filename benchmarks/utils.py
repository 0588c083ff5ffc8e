"""What the benchmarks share: Markdown tables, results files with versions and machine, and parallel jobs."""

import fcntl
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import psutil
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

ROOT = Path(__file__).parents[1]


def example(name: str) -> ModuleType:
    """Import a script of `examples/`."""
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return import_module(name)


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def write_json(file: Path, values: Any) -> None:
    """Write a results file, and its folder where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n")


def provenance(*packages: str) -> dict[str, Any]:
    """Versions of Python and of packages, and the machine: every results file holds them."""
    return {
        "versions": {name: version(name) for name in packages or ("torch", "transformers", "accelerate")},
        "machine": {
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
        },
    }


@contextmanager
def claim(file: Path) -> Iterator[TextIO | None]:
    """
    A lock, or `None` if another process is at work on a file. What was claimed is free again when the context ends, or the last
    process that has the lock.

    Args:
        file (`Path`): that is to be written. The lock is a file beside it.
    """
    lock = file.with_name(f".{file.name}.lock")
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        try:
            yield held
        finally:
            lock.unlink(missing_ok=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation; the deviation of a single value is 0."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["|" + "".join(f" {name} |" if name else " |" for name in header), "|---" * len(header) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def run_in_processes(work: Callable, jobs: list[tuple], processes: int, description: str) -> None:
    """
    Call `work` with the arguments of each job, each in a new process. The processes share the threads evenly.

    When a job fails, the jobs that already run are finished, the others are cancelled, and the exception is raised.
    """
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [pool.submit(_run_quietly, threads, work, *job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc=description):
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _run_quietly(threads: int, work: Callable, *arguments: Any) -> None:
    from datasets import disable_progress_bars  # not needed by the comparison, which runs where it is missing

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    work(*arguments)
