"""What the benchmark scripts share: jobs in processes of their own, and a note of what a result was measured with."""

import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

import torch
from datasets import disable_progress_bars
from tqdm.auto import tqdm
from transformers.utils import logging


def _quietly(threads: int, work: Callable, *arguments: Any) -> None:
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    work(*arguments)


def in_processes(work: Callable, jobs: list[tuple], processes: int, description: str) -> None:
    """
    Call `work` with the arguments of each job, each in a process of its own; they share the threads evenly. What a job
    raises is raised here, once those that have been handed out with it have ended; the others are not begun.
    """
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [pool.submit(_quietly, threads, work, *job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc=description):
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def provenance(*packages: str) -> dict[str, Any]:
    """Versions and machine, for a results file."""
    return {
        "versions": {name: version(name) for name in packages},
        "machine": {
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
    }
