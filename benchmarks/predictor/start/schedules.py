"""
Fixed timetables of freezing, learning rates, and blocks that rest in some steps: what each costs, on data sets of the harvest and
on the tasks of `quality/compare`.

    python -m benchmarks.predictor.start.schedules --model_dir MODELS --data_dir DATA GLUE_AND_TEXT_DATA [--tasks ...] [--arms ...]

makes the runs that are missing in `schedules/runs/`, with the options of `quality/compare/run.py`. Without options, the table of
all runs is printed, and each of them is one entry of `schedules/results.json`.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from benchmarks.quality.compare import run, train
from benchmarks.quality.compare.arms import Method
from benchmarks.quality.compare.plan import Arm
from benchmarks.tasks import Task
from benchmarks.utils import markdown_table
from smartfrz_hf import Decision, Policy, find_blocks
from smartfrz_hf.policies import PEERS

HERE = Path(__file__).parent / "schedules"
RUNS, RESULTS = HERE / "runs", HERE / "results.json"
START = 0.34  # of the blocks: behind them are those that rest
PILOT = 0.025
BACKWARD = 2 / 3  # of the compute of a block


class Timetable(Policy):
    """
    Freezes shares of the blocks at fixed times. What freezes at 0 does so before the first step, without a pilot, so the learning
    rate is that of the arm.

    Args:
        stairs (`list[list[float]]`): since which fraction of the run, and which share of the blocks, with the stem.
    """

    def __init__(self, stairs: list[list[float]]):
        self.stairs = stairs

    def decide(self, observation):
        share = max(share for since, share in self.stairs if since <= observation.progress)
        depth = 1 + int(share * (observation.units - 1) + 1e-6)
        return Decision(max(depth, observation.depth), f"{share:.0%} of the blocks")


class Rests(TrainerCallback):
    """
    Has some blocks train in some steps only: in the others the backward pass ends behind them (Vlaar & Leimkuhler, "Multirate
    training of neural networks", ICML 2022).

    Args:
        model ([`~transformers.PreTrainedModel`]): what is trained.
        share (`float`): of the blocks; those from the first third on up to there rest.
        every (`int`): they train in one of so many steps.
        rate (`float`, *optional*, defaults to `1.0`): what their updates are multiplied with.
    """

    def __init__(self, model: PreTrainedModel, share: float, every: int, rate: float = 1.0):
        units = find_blocks(model).units
        first, last = (1 + int(part * (len(units) - 1) + 1e-6) for part in (START, share))
        self.parameters = [p for unit in units[first:last] for p in unit.named_parameters().values()]
        self.every, self.rate = every, rate
        self.before: list[torch.Tensor] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= PILOT * state.max_steps + 1:
            for parameter in self.parameters:
                parameter.requires_grad_(state.global_step % self.every == 0)
                parameter.grad = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = []
        if self.rate != 1 and state.global_step > PILOT * state.max_steps + 1 and self.parameters[0].grad is not None:
            self.before = [p.detach().clone() for p in self.parameters]

    def on_optimizer_step(self, args, state, control, **kwargs):
        for parameter, before in zip(self.parameters, self.before, strict=False):
            parameter.data.copy_(before + self.rate * (parameter.data - before))


def make_method(arm: Arm, task: Task, ratio: float | None = None) -> Method:
    """As of the comparison, with blocks that rest."""
    options = dict(arm.options)
    rests = options.pop("rests", None)
    method = _make_method(replace(arm, options=options), task, ratio)
    if rests is not None:
        method.callbacks.append(Rests(task.model, **rests))
    return method


_make_method = train.make_method


def resting_share(arm: dict[str, Any]) -> float:
    """Share of the compute of full training that blocks which rest save. The ledger does not know of it."""
    rests = arm["options"].get("rests")
    return (1 - 1 / rests["every"]) * BACKWARD * (rests["share"] - START) if rests else 0.0


def collect(known: list[dict[str, Any]], files: Iterable[Path]) -> list[dict[str, Any]]:
    """One entry for each run, those that are known and those of new files."""
    runs = {(entry["task"], entry["arm"], entry["seed"]): entry for entry in known}
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        key = found["task"]["name"], found["arm"]["name"], found["seed"]
        last = found["evaluations"][-1]
        runs[key] = {
            **dict(zip(("task", "arm", "seed"), key, strict=True)),
            **{name: last[name] for name in ("points", "loss")},
            "flops": sum(found["flops"].values()),
            "resting": round(resting_share(found["arm"]), 4),
            "device": found["machine"]["device"],
        }
    return [runs[key] for key in sorted(runs)]


def means(runs: list[dict[str, Any]], tasks: Iterable[str]) -> dict[str, dict[str, float]]:
    """
    Means over tasks of the means over seeds of what each arm loses and costs, against full training with the same seed: `tasks`,
    `runs` (counts), `points` and `loss` lost, `worst` (points of the worst task) and `compute`, by arm.
    """
    full = {(entry["task"], entry["seed"]): entry for entry in runs if entry["arm"] == "full"}
    found: dict[str, dict[str, list[tuple[float, float, float]]]] = defaultdict(lambda: defaultdict(list))
    for entry in runs:
        other = full.get((entry["task"], entry["seed"]))
        if entry["task"] in tasks and other is not None and other is not entry:
            compute = entry["flops"] / other["flops"] - entry["resting"]
            found[entry["arm"]][entry["task"]].append(
                (other["points"] - entry["points"], entry["loss"] - other["loss"], compute)
            )
    result = {}
    for arm, by_task in found.items():
        each = [[mean(column) for column in zip(*seeds, strict=True)] for seeds in by_task.values()]
        points, loss, compute = (mean(column) for column in zip(*each, strict=True))
        result[arm] = {
            "tasks": len(each),
            "runs": sum(map(len, by_task.values())),
            "points": points,
            "worst": max(row[0] for row in each),
            "loss": loss,
            "compute": compute,
        }
    return result


def table(known: dict[str, dict[str, float]]) -> str:
    """What [`means`] gives, in Markdown, the arm with the least compute first."""
    forms = {"tasks": "d", "runs": "d", "points": "+.2f", "worst": "+.1f", "loss": "+.3f", "compute": ".2f"}
    arms = sorted(known, key=lambda arm: known[arm]["compute"])
    rows = [[arm, *(format(known[arm][name], form) for name, form in forms.items())] for arm in arms]
    header = ("arm", "tasks", "runs", "points lost", "of the worst task", "loss added", "compute")
    return markdown_table(header, rows)


def groups(runs: list[dict[str, Any]]) -> dict[str, set[str]]:
    """The tasks of the runs, by what they are for."""
    names = {entry["task"] for entry in runs}
    hot, own = ({name for name in names if name.startswith(start)} for start in ("x.hot.", "x."))
    return {"harvest": own - hot, "harvest, four times the learning rate": hot, "held out": names - own}


def main() -> None:
    if len(sys.argv) > 1:
        train.make_method, PEERS["timetable"] = make_method, Timetable
        sys.argv[1:1] = ["--plan", str(HERE), "--out", str(RUNS), "--same_process"]
        run.main()
        return
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    runs = collect(known, RUNS.glob("*/*.json"))
    RESULTS.write_text("[\n " + ",\n ".join(json.dumps(entry) for entry in runs) + "\n]\n", encoding="utf-8")
    for title, tasks in groups(runs).items():
        sys.stdout.write(f"\n{title}\n\n{table(means(runs, tasks))}\n")


if __name__ == "__main__":
    main()
