"""
How far a step moves the weights in some tasks of the comparison, at the peak of the learning rate: `PilotSignals.motion`.

    python -m benchmarks.predictor.start.motion --model_dir MODELS --data_dir DATA GLUE_AND_TEXT_DATA

Takes the pilot of each run, and writes the mean and the largest motion of the blocks behind the first third, by task and seed, to
`motion/motion.json`. The table is its means over seeds.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch
from transformers import Trainer, TrainerCallback, set_seed
from transformers.utils import logging

from benchmarks.loading import find_data, load_task
from benchmarks.quality.compare import train
from benchmarks.quality.compare.plan import Plan, Task
from benchmarks.tasks import training_arguments
from benchmarks.utils import markdown_table, provenance, read_json, write_json
from smartfrz_hf import Decision, Policy, SmartFRZCallback
from smartfrz_hf.policies.smartfrz import PILOT
from smartfrz_hf.signals.pilot_signals import PilotSignals

FILE = Path(__file__).parent / "motion" / "motion.json"
TASKS = (
    "smollm2-12.cr",
    "smollm2-12.opinions",
    "minilm.cr",
    "minilm.opinions",
    "bert.cr",
    "bert.opinions",
    "resnet.mnist",
)


class Watch(Policy):
    """Freezes nothing, and keeps what the pilot has shown."""

    pilot = PILOT
    seen: PilotSignals | None = None

    def decide(self, observation):
        self.seen = observation.pilot or self.seen
        return Decision(observation.depth, "watching")


class StopAfterPilot(TrainerCallback):
    def __init__(self, watch: Watch):
        self.watch = watch

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= self.watch.seen is not None


def motion(task: Task, plan: Plan, options: argparse.Namespace) -> dict[str, float]:
    """Mean and largest motion of the blocks behind the first third."""
    set_seed(task.seed)
    folder, data = plan.folder(task, options.model_dir), find_data(task.task, options.data_dir)
    if folder is None or data is None:
        raise FileNotFoundError(f"The model {task.model} or the data {task.task} are not there.")
    loaded, watch = load_task(task, plan.models[task.model], folder, data), Watch()
    loaded.model.accepts_loss_kwargs = False  # type: ignore[assignment]
    with TemporaryDirectory() as output:
        Trainer(
            loaded.model,
            training_arguments(task, task.steps, output, 1.0),
            train_dataset=loaded.train,
            data_collator=loaded.train_collate or loaded.collate,
            callbacks=[SmartFRZCallback(policy=watch), StopAfterPilot(watch)],
        ).train()
    assert watch.seen is not None
    blocks = watch.seen.motion[1:-1]
    rest = blocks[len(blocks) // 3 :].tolist()
    return {"mean": round(mean(rest), 6), "largest": round(max(rest), 6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    train.add_folders(parser)
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="names of tasks of the comparison")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    plan = Plan.read(options.plan)
    tasks = {task.name: task for task in plan.tasks}
    found = read_json(FILE)["tasks"] if FILE.exists() else {}
    for name in options.tasks:
        for seed in (1, 2):
            if str(seed) not in found.setdefault(name, {}):
                found[name][str(seed)] = motion(replace(tasks[name], seed=seed), plan, options)
                write_json(FILE, {"tasks": found} | provenance())
    rows = [
        [f"`{name}`", *(f"{mean(run[key] for run in runs.values()):.3%}" for key in ("mean", "largest"))]
        for name, runs in found.items()
    ]
    print(markdown_table(["task", "mean of the blocks", "largest"], rows))


if __name__ == "__main__":
    main()
