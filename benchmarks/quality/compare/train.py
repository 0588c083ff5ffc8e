"""Makes one run and writes its result: `python -m benchmarks.quality.compare.train TASK ARM SEED ...`, called by `run`."""

import argparse
import hashlib
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed
from transformers.utils import logging

from benchmarks.loading import find_data, load_task
from benchmarks.quality.compare import vgg  # noqa: F401  (registers the model)
from benchmarks.quality.compare.arms import LEARNING_RATE, Method, frozen_share, make_method
from benchmarks.quality.compare.choice import choose
from benchmarks.quality.compare.measure import FlopMeter, Stopwatch, peak_memory, reset_peak_memory
from benchmarks.quality.compare.plan import HERE, Arm, Experiment, Plan, Result
from benchmarks.tasks import Task, training_arguments
from benchmarks.utils import provenance

EARLY_ROWS = 200  # held-out rows of the evaluations before the last one
EARLY = (1 / 3, 2 / 3)
PACKAGES = ("smartfrz_hf", "torch", "transformers", "accelerate", "peft")


class Evaluations(TrainerCallback):
    """Evaluates at some steps of a run."""

    def __init__(self, task: Task, steps: int, watch: Stopwatch):
        self.task, self.watch = task, watch
        self.wanted = {round(steps * part) for part in EARLY}
        self.found: list[dict[str, Any]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.wanted:
            with self.watch.measure("evaluation"):
                self.evaluate(state.global_step, EARLY_ROWS)

    def evaluate(self, step: int, rows: int | None = None) -> None:
        some = self.task.held_out[:rows]
        known = self.task.evaluate(some)
        known |= {name: round(known[name], 4) for name in ("loss", "points")}
        self.found.append({"step": step, "rows": len(some)} | known)


def measure_callbacks(method: Method, watch: Stopwatch) -> None:
    """Have the time that a method's own callbacks and its policy take go to `overhead`."""
    for callback in method.callbacks:
        for name in dir(TrainerCallback):
            if name.startswith("on_"):
                setattr(callback, name, watch.timed(getattr(callback, name), "overhead"))
    if method.freezing is not None:
        policy: Any = method.freezing.policy
        policy.before_update = watch.timed(policy.before_update, "overhead")


def digest(model: torch.nn.Module) -> str:
    """Of the weights with which a run begins."""
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def run(experiment: Experiment, arm: Arm, plan: Plan, model_dir: Path, data_dirs: list[Path], out: Path) -> Result:
    """
    Train once.

    Args:
        experiment ([`Experiment`]): which.
        arm ([`Arm`]): its arm, with the tuned value in it.
        plan ([`Plan`]): that it is of.
        model_dir (`Path`), data_dirs (`list[Path]`): where models and data are.
        out (`Path`): results so far.

    Returns:
        `dict`: the result, ready for JSON.
    """
    made_with = provenance(*PACKAGES)  # a package that is missing is told before the run
    watch = Stopwatch()
    pair = replace(experiment.task, seed=experiment.seed)
    with watch.measure("loading"):
        set_seed(experiment.seed)
        folder, data = plan.folder(pair, model_dir), find_data(pair.task, data_dirs)
        if folder is None or data is None:
            raise FileNotFoundError(f"The model {pair.model} or the data {pair.task} are not there.")
        task = load_task(pair, plan.models[pair.model], folder, data)
        weights = digest(task.model)
        ratio = None
        if arm.ratio_of:
            (other,) = plan.needs(experiment)
            ratio = min(0.95, other.result(out)["freezing"]["share"])
        method = make_method(arm, task, ratio)
    steps = max(1, round(arm.share * pair.steps))
    task.model.accepts_loss_kwargs = False  # type: ignore[assignment]  # one batch a step: the model's own mean loss is right
    evaluations = Evaluations(task, steps, watch)
    meter = None if method.freezing else FlopMeter(task.model, watch)
    measure_callbacks(method, watch)
    with TemporaryDirectory() as output:
        args = training_arguments(pair, steps, output, arm.options.get(LEARNING_RATE, 1.0))
        trainer = Trainer(
            task.model,
            args,
            train_dataset=task.train,
            data_collator=task.train_collate or task.collate,
            callbacks=[*method.callbacks, evaluations, *([] if meter is None else [meter])],
        )
        trainer.remove_callback(PrinterCallback)
        set_seed(experiment.seed)  # what a method was made with may have drawn random numbers
        before = reset_peak_memory()
        with watch.measure("training"):
            trainer.train()
        peak = peak_memory()
    with watch.measure("final evaluation"):
        evaluations.evaluate(trainer.state.global_step)
    curve = [[entry["step"], round(entry["loss"], 4)] for entry in trainer.state.log_history if "loss" in entry]
    result: Result = {
        "task": asdict(experiment.task),
        "arm": asdict(arm) | {"name": experiment.arm.name},
        "seed": experiment.seed,
        "weights": weights,
        "steps": trainer.state.global_step,
        "evaluations": evaluations.found,
        "train_loss": curve,
        "seconds": watch.result(),
        "flops": meter.result() if meter else None,
        "memory": {"before": before, "peak": peak},
        "freezing": None,
        "cache": None,
    }
    if method.freezing is not None:
        ledger = method.freezing.ledger
        result["flops"] = asdict(ledger.spent)
        result["freezing"] = {
            "units": len(ledger.units),
            "share": round(frozen_share(ledger), 4),
            "gap": round(ledger.gap_share, 4),
            "stages": [[stage.step, stage.depth, stage.reason] for stage in ledger.stages],
        }
        cache = ledger.cache
        result["cache"] = None if cache is None else {"rows": cache.rows, "hits": cache.hits, "off": cache.off}
    return result | made_with


def write(result: Result, path: Path) -> None:
    """Write the result at once or not at all, one line for each part."""
    parts = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    os.replace(partial, path)


def train(experiment: Experiment, plan: Plan, options: argparse.Namespace) -> str:
    """Make a run, write its result, and say what it came to."""
    arm = choose(plan, experiment, options.out)
    result = run(experiment, arm, plan, options.model_dir, options.data_dir, options.out)
    write(result, experiment.file(options.out))
    last, seconds = result["evaluations"][-1], result["seconds"]["processor"]
    return f"points {last['points']}, loss {last['loss']}, {seconds}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("arm")
    parser.add_argument("seed", type=int)
    add_folders(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    plan = Plan.read(options.plan)
    wanted = (options.task, options.arm, options.seed)
    experiment = next((e for e in plan.experiments if (e.task.name, e.arm.name, e.seed) == wanted), None)
    if experiment is None:
        parser.error(f"The plan has no run of {options.task} with {options.arm} and seed {options.seed}.")
    sys.stdout.write(f"{train(experiment, plan, options)}\n")


def add_folders(parser: argparse.ArgumentParser) -> None:
    """The options that `run` hands on."""
    parser.add_argument("--model_dir", type=Path, required=True, help="folder of the pretrained models")
    parser.add_argument("--data_dir", type=Path, nargs="+", required=True, help="folders of the data sets")
    parser.add_argument("--plan", type=Path, default=HERE, help="folder of tasks.json and arms.json")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")


if __name__ == "__main__":
    main()
