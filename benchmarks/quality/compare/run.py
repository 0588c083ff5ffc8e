"""
Makes the runs that are missing, one after the other, each in a process of its own with one thread. Several of these scripts
share the runs among them.

A run that was cut off leaves nothing and is made again. Runs that other runs depend on come first; those whose model, data or
package is not there are passed over.
"""

import argparse
import gc
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from typing import TextIO

import torch
from transformers.utils import logging

from benchmarks.loading import find_data
from benchmarks.quality.compare.arms import missing_package
from benchmarks.quality.compare.plan import Experiment, Plan
from benchmarks.quality.compare.train import add_folders, train
from benchmarks.utils import ROOT, claim

# Of full training's time, to estimate what is left.
USUAL_SHARE = 0.8


def obstacle(plan: Plan, experiment: Experiment, options: argparse.Namespace) -> str | None:
    """What is not there for a run: its model, its data, its package, or a result that it depends on."""
    task, package = experiment.task, missing_package(experiment.arm)
    if plan.folder(task, options.model_dir) is None:
        return f"no model {task.model} in {options.model_dir}"
    if find_data(task.task, options.data_dir) is None:
        return f"no data {task.task} in {' or '.join(map(str, options.data_dir))}"
    if package is not None:
        return f"no package {package}"
    other = plan.waits_for(experiment, options.out)
    return None if other is None else f"no result yet of {other.task.name}, on which {experiment.arm.name} depends"


def hours(experiments: list[Experiment]) -> float:
    """An estimate of the processor hours that some runs take."""
    shares = [(e, 1.0 if e.arm.method == "full" else USUAL_SHARE) for e in experiments]
    return sum(e.task.minutes * e.arm.share * share for e, share in shares) / 60


def describe(plan: Plan, missing: list[Experiment], options: argparse.Namespace) -> str:
    """The missing runs by tier and task, with estimated hours."""
    lines = []
    for tier in sorted({max(e.task.tier, e.arm.tier) for e in missing}):
        of_tier = [e for e in missing if max(e.task.tier, e.arm.tier) == tier]
        lines.append(f"tier {tier}: {len(of_tier)} runs, {hours(of_tier):.1f} hours")
        for name in dict.fromkeys(e.task.name for e in of_tier):
            part = [e for e in of_tier if e.task.name == name]
            lines.append(f"  {name}: {len(part)} runs, {hours(part):.1f} hours")
    lines.append(f"{len(missing)} runs, {hours(missing):.1f} processor hours")
    return "\n".join(lines + obstacles(plan, missing, options))


def obstacles(plan: Plan, missing: list[Experiment], options: argparse.Namespace) -> list[str]:
    """How many runs cannot be made now, and why."""
    found = Counter(obstacle(plan, experiment, options) for experiment in missing)
    return [f"  {number} have {what}" for what, number in found.items() if what is not None]


def check_names(parser: argparse.ArgumentParser, plan: Plan, options: argparse.Namespace) -> None:
    """Refuse names that the plan does not have."""
    known = {
        "--tasks": (options.tasks, {task.name for task in plan.tasks}),
        "--arms": (options.arms, {e.arm.name for e in plan.experiments}),
    }
    for option, (chosen, names) in known.items():
        wrong = [name for name in chosen or () if name not in names]
        if wrong:
            parser.error(f"{option}: the plan has no {', '.join(wrong)}, but {', '.join(sorted(names))}.")


def make_here(experiment: Experiment, plan: Plan, options: argparse.Namespace) -> bool:
    """Make one run in this process, and say how it went."""
    try:
        said = train(experiment, plan, options)
    except Exception:
        print(time.strftime("%H:%M:%S"), experiment.name, "failed", traceback.format_exc(), sep="\n", flush=True)
        return False
    finally:
        gc.collect()
    print(time.strftime("%H:%M:%S"), experiment.name, said, flush=True)
    return True


def make(experiment: Experiment, options: argparse.Namespace, lock: TextIO) -> bool:
    """Make one run in a new process, which holds the lock as long as it lives, and say how it went."""
    words = [experiment.task.name, experiment.arm.name, str(experiment.seed)]
    words += [f"--model_dir={options.model_dir}", f"--out={options.out}", f"--plan={options.plan}"]
    words += ["--data_dir", *map(str, options.data_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks.quality.compare.train", *words]
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        pass_fds=[lock.fileno()],
    )
    said = done.stdout.strip().splitlines()
    print(
        time.strftime("%H:%M:%S"), experiment.name, said[-1] if said and not done.returncode else "failed", flush=True
    )
    if done.returncode:
        print(*said[-20:], sep="\n", flush=True)
    return not done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    parser.add_argument("--tasks", nargs="+", help="names of tasks; all by default")
    parser.add_argument("--arms", nargs="+", help="names of arms; all by default")
    parser.add_argument("--tier", type=int, default=10**9, help="no runs of higher tiers")
    parser.add_argument("--same_process", action="store_true", help="no new process for each run: sooner, on a GPU")
    parser.add_argument("--most", type=int, default=10**9, help="stop after so many runs")
    parser.add_argument("--list", action="store_true", help="say what is missing and how long it takes, and stop")
    options = parser.parse_args()
    options.out, options.plan = options.out.resolve(), options.plan.resolve()
    options.model_dir, options.data_dir = options.model_dir.resolve(), [f.resolve() for f in options.data_dir]
    if options.same_process:
        torch.set_num_threads(1)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    check_names(parser, Plan.read(options.plan), options)
    failed: set[str] = set()
    made = 0
    while True:
        plan = Plan.read(options.plan)  # again each time: it may have grown
        missing = [
            experiment
            for experiment in plan.experiments
            if not experiment.file(options.out).exists()
            and experiment.name not in failed
            and (not options.tasks or experiment.task.name in options.tasks)
            and (not options.arms or experiment.arm.name in options.arms)
            and max(experiment.task.tier, experiment.arm.tier) <= options.tier
        ]
        if options.list:
            print(describe(plan, missing, options))
            return
        ready = [e for e in missing if obstacle(plan, e, options) is None]
        for experiment in [] if made == options.most else ready:
            file = experiment.file(options.out)
            file.parent.mkdir(parents=True, exist_ok=True)
            with claim(file) as lock:
                if lock is not None and not file.exists():
                    made += 1
                    here = options.same_process
                    well = make_here(experiment, plan, options) if here else make(experiment, options, lock)
                    failed |= set() if well else {experiment.name}
                    break
        else:
            print(f"{len(missing)} runs are missing, {len(failed)} have failed.", flush=True)
            print(*obstacles(plan, missing, options), sep="\n", flush=True)
            sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
