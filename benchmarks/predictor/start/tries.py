"""
Tries ways to freeze that are not in the package, on data sets of the harvest: the head first (LP-FT, Kumar et al., ICLR 2022),
all units again at the end, and the mean of a front's last weights when it freezes late (LAWA, Kaddour, 2022).

    python -m benchmarks.predictor.start.tries --model_dir MODELS --data_dir DATA GLUE_AND_TEXT_DATA

Each run is one entry of `tries.json`; those that are there are kept. The table says what each came to against full training.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.quality.compare import train
from benchmarks.quality.compare.plan import Arm, Experiment, Plan, Task
from benchmarks.utils import provenance
from smartfrz_hf import Decision, Policy, find_blocks
from smartfrz_hf.policies import PEERS

FILE = Path(__file__).parent / "tries.json"
PILOT = 0.025
BETWEEN = 0.02  # of a run, between two sets of weights of a mean


class Try(Policy):
    """
    Freezes the stem and a share of the blocks.

    Args:
        share (`float`): of the blocks.
        since (`float`): when they freeze; 0 for the start of the run.
        until (`float`): when all units train again.
        head (`float`): how long only the head trains before.
        averaged (`int`): sets of weights, the last ones, whose mean the front gets when it freezes.
    """

    model: PreTrainedModel  # of the run

    def __init__(self, share: float, since=0.0, until=2.0, head=0.0, averaged=0):
        self.share, self.since, self.until, self.head, self.averaged = share, since, until, head, averaged
        self.pilot = 0.0 if since or head else PILOT
        self.sets: list[list[torch.Tensor]] = []
        self.changed = False

    def decide(self, observation):
        now, depth = observation.progress, 1 + int(self.share * (observation.units - 1) + 1e-6)
        if observation.pilot is not None:
            return Decision(depth, "from the start")
        if self.head and observation.step == 0:
            return Decision(observation.units, "all but the head")
        if (
            self.averaged
            and not self.changed
            and observation.step % max(1, round(BETWEEN * observation.max_steps)) == 0
        ):
            self.sets = [*self.sets, [p.detach().clone() for p in self.front(depth)]][-self.averaged :]
        moment = max(self.head, self.since) or self.until
        if self.changed or now < moment:
            return Decision(observation.depth, "nothing new")
        self.changed = True
        for parameter, values in zip(self.front(depth), zip(*self.sets, strict=True), strict=False):
            parameter.data.copy_(torch.stack(values).mean(0))
        return Decision(0 if moment == self.until else depth, "now", unfreeze=moment != self.since)

    def front(self, depth: int) -> list[torch.nn.Parameter]:
        return [p for unit in find_blocks(self.model).units[:depth] for p in unit.named_parameters().values()]


WAYS: dict[str, dict[str, Any]] = {
    "third": {"share": 0.34},
    "third, head first for 10%": {"share": 0.34, "head": 0.1},
    "third, head first for 20%": {"share": 0.34, "head": 0.2},
    "half, all train from 60%": {"share": 0.5, "until": 0.6},
    "half, from 40%": {"share": 0.5, "since": 0.4},
    "half, from 40%, mean of 5": {"share": 0.5, "since": 0.4, "averaged": 5},
}
TASKS = {
    name: Task(**{"name": name, "batch_size": 32} | task)
    for name, task in {
        "minilm.mpqa": {"model": "minilm", "task": "text/mpqa", "rows": 1500},
        "bert.mpqa": {"model": "bert-12", "task": "text/mpqa", "rows": 1500, "learning_rate": 1e-4},
        "minilm.mr": {"model": "minilm", "task": "text/mr", "rows": 1500},
        "bert.sst2": {"model": "bert-12", "task": "glue/sst2", "rows": 1000, "learning_rate": 1e-4},
    }.items()
}


def arm(name: str) -> Arm:
    if name == "full":
        return Arm("full", "full")
    return Arm(name, "freezing", policy="try", options=WAYS[name], config={"first_decision": 1, "decide_every": 1})


def table(runs: list[dict[str, Any]]) -> str:
    """Means over the pairs of runs with the same task and seed."""
    full = {(run["task"], run["seed"]): run for run in runs if run["way"] == "full"}
    rows = defaultdict(list)
    for run in runs:
        if (other := full.get((run["task"], run["seed"]))) and other is not run:
            lost = other["points"] - run["points"], run["loss"] - other["loss"], run["flops"] / other["flops"]
            rows[run["way"]].append(lost)
    lines = ["way | runs | points lost | loss added | compute", "--|--|--|--|--"]
    for way, found in rows.items():
        points, loss, compute = (mean(column) for column in zip(*found, strict=True))
        lines.append(f"{way} | {len(found)} | {points:+.2f} | {loss:+.4f} | {compute:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, nargs="+", required=True)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    PEERS["try"] = Try
    make_method = train.make_method

    def method_of(arm, task, ratio=None):
        Try.model = task.model
        return make_method(arm, task, ratio)

    train.make_method = method_of
    plan = Plan.read()
    runs = json.loads(FILE.read_text())["runs"] if FILE.exists() else []
    for seed in options.seeds:
        for task in options.tasks:
            for way in ("full", *options.ways):
                if any((run["task"], run["way"], run["seed"]) == (task, way, seed) for run in runs):
                    continue
                experiment = Experiment(TASKS[task], arm(way), seed)
                result = train.run(experiment, experiment.arm, plan, options.model_dir, options.data_dir, FILE.parent)
                last = result["evaluations"][-1]
                known = {"task": task, "way": way, "seed": seed, "points": last["points"], "loss": last["loss"]}
                runs.append(known | {"flops": sum(result["flops"].values())})
                text = ",\n  ".join(json.dumps(run) for run in runs)
                rest = json.dumps(provenance())[1:]
                FILE.write_text(f'{{\n "runs": [\n  {text}\n ],\n {rest}\n')
    print(table(runs))


if __name__ == "__main__":
    main()
