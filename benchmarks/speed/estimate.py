"""
How far is `estimate` from real runs? `make bench-estimate`.

Estimates runs of the comparison (`benchmarks/quality/compare`) before the first step, and compares what was told with the
results of these runs, without freezing and with the default settings. Nothing is trained here, so it takes a minute for each
task and seed. A run whose results are missing is left out.

What freezes later in the run is not in an estimate, so a run should save more compute than was told. Both sides are
processor seconds of one thread, so that other work on the machine does not count.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import PrinterCallback, Trainer, set_seed

from benchmarks.loading import find_data, load_task
from benchmarks.quality.compare.choice import flops
from benchmarks.quality.compare.headline import ARM
from benchmarks.quality.compare.plan import HERE, Plan, Task
from benchmarks.tasks import training_arguments
from benchmarks.utils import markdown_table, provenance, read_json, write_json
from smartfrz_hf import SmartFRZCallback, estimate
from smartfrz_hf.estimation import Estimate

RESULTS = Path(__file__).parent / "results" / "estimate.json"


@contextmanager
def processor_clocks() -> Iterator[None]:
    """Let the package measure processor seconds in place of wall-clock seconds. Right on a CPU, with one thread."""
    with ExitStack() as stack:
        stack.enter_context(patch("smartfrz_hf.estimation.loop.time_of", lambda tensor: time.process_time()))
        stack.enter_context(patch("smartfrz_hf.activation_cache.cache.time_of", lambda tensor: time.process_time()))
        for module in ("cache", "checks", "proof"):
            stack.enter_context(patch(f"smartfrz_hf.activation_cache.{module}.perf_counter", time.process_time))
        yield


def foresee(plan: Plan, task: Task, seed: int, options: argparse.Namespace) -> tuple[Estimate, int]:
    """The estimate of a run, and the bytes of the model's weights."""
    set_seed(seed)
    pair = replace(task, seed=seed)
    folder, data = plan.folder(pair, options.model_dir), find_data(pair.task, options.data_dir)
    if folder is None or data is None:
        raise FileNotFoundError(f"The model {pair.model} or the data {pair.task} are not there.")
    ready = load_task(pair, plan.models[pair.model], folder, data)
    ready.model.accepts_loss_kwargs = False  # type: ignore[assignment]  # as in the comparison
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            ready.model,
            training_arguments(pair, pair.steps, output),
            train_dataset=ready.train,
            data_collator=ready.train_collate or ready.collate,
            callbacks=[SmartFRZCallback()],
        )
        trainer.remove_callback(PrinterCallback)
        set_seed(seed)
        with processor_clocks():
            told = estimate(trainer, seconds=options.seconds)
        return told, sum(p.nbytes for p in ready.model.parameters())


def compare(told: Estimate, weights: int, plain: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """What was told beside what the two runs took."""
    assert told.chosen is not None
    chosen, stages = told.chosen, ours["freezing"]["stages"]
    memory = plain["memory"]["peak"]
    return {
        "depth": [chosen.depth, stages[0][1] if stages and stages[0][2].startswith("from the start") else 0],
        "depth_range": [chosen.least, chosen.most],
        "units": ours["freezing"]["units"],
        "compute_saved": [chosen.compute_saved, 1 - flops(ours) / flops(plain)],
        "time_saved": [
            chosen.time_saved,
            1 - ours["seconds"]["processor"]["training"] / plain["seconds"]["processor"]["training"],
        ],
        "later_saved": chosen.later_saved,
        "plain_seconds": [told.depths[0].seconds, plain["seconds"]["processor"]["training"]],
        # Weights are in memory before the run begins.
        "plain_memory": [
            told.depths[0].memory - weights,
            None if memory is None else memory - plain["memory"]["before"],
        ],
        "seconds_to_measure": told.profile.seconds,
    }


def runs(plan: Plan, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for task in plan.tasks:
        for seed in options.seeds if task.name in options.tasks else ():
            files = [options.results / task.name / f"{arm}.{seed}.json" for arm in ("full", ARM)]
            if not all(file.is_file() for file in files):
                continue
            told, weights = foresee(plan, task, seed, options)
            text = str(told)
            sys.stdout.write(f"--- {task.name}, seed {seed}\n{text}\n")
            sys.stdout.flush()
            found = compare(told, weights, *(read_json(file) for file in files))
            sys.stdout.write(f"{json.dumps(found)}\n")
            yield {"task": task.name, "seed": seed, **found, "text": text}


def table(results: dict) -> str:
    """What was told and what the runs came to, in Markdown."""

    def pair(values: list[float], form: str = "{:.0%}") -> list[str]:
        return [form.format(value).replace("%", " %") for value in values]

    rows = []
    for run in results["runs"]:
        depth, (least, most) = run["depth"], run["depth_range"]
        told = f"{depth[0]}" if least == most else f"{depth[0]} ({least}-{most})"
        memory = [value / 1e6 for value in run["plain_memory"] if value is not None]
        rows.append(
            [
                f"`{run['task']}`, {run['seed']}",
                f"{told} / {depth[1]} of {run['units']}",
                " / ".join(pair(run["compute_saved"])),
                " / ".join(pair([run["time_saved"][0], run["later_saved"], run["time_saved"][1]])),
                " / ".join(pair(run["plain_seconds"], "{:.0f} s")),
                " / ".join(pair(memory, "{:.0f} MB")),
            ]
        )
    head = [
        "task, seed",
        "units from the start",
        "compute saved",
        "time saved, with what freezes later, measured",
        "plain run, time",
        "plain run, memory",
    ]
    return markdown_table(head, rows)


def example_text(results: dict) -> str:
    """What `smartfrz estimate` printed for the first run, as a block of text."""
    return f"```text\n{results['runs'][0]['text']}\n```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["minilm.cr", "minilm.mrpc", "minilm.sentiment"], help="tasks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="about how long to measure, for each task and seed"
    )
    parser.add_argument("--model_dir", type=Path, required=True, help="folder of the pretrained models")
    parser.add_argument("--data_dir", type=Path, nargs="+", required=True, help="folders of the data sets")
    parser.add_argument("--plan", type=Path, default=HERE, help="folder of tasks.json and arms.json")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the runs' results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")
    options = parser.parse_args()
    torch.set_num_threads(1)  # like the runs
    found = list(runs(Plan.read(options.plan), options))
    if not found:
        parser.error(f"{options.results} has no results of both `full` and `{ARM}` for these tasks and seeds")
    write_json(options.out, {"runs": found, **provenance()})


if __name__ == "__main__":
    main()
