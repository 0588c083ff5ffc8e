"""
Fine-tunes each (model, task) pair of `pairs.json` in full and with its front frozen from the first step, and keeps what each
run came to: one JSON file a run in `results/`. Runs that are there are not repeated; one that was cut off is.

    python -m benchmarks.predictor.start.harvest --model_dir MODELS --data_dir DATA MORE_DATA
"""

import argparse
import gc
import json
import os
import time
import traceback
from dataclasses import asdict
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging

from benchmarks.loading import find_data, load_task
from benchmarks.predictor.start.signals import Signals, WatchedTrainer, rounded
from benchmarks.tasks import Pair, Plan, Task, losses, points, training_arguments
from benchmarks.utils import claim, provenance
from smartfrz_hf.freezing.freezer import Freezer
from smartfrz_hf.model.units import find_blocks
from smartfrz_hf.predictor_training.start_pairs import pilot_signals

HERE = Path(__file__).parent
EARLY_ROWS = 200  # held-out rows of the evaluations before the last one
EARLY = (1 / 3, 2 / 3)
RATE_MOMENT = "0.05"


def result_file(out: Path, pair: Pair, blocks: int | None) -> Path:
    """`PAIR.full.json`, or `PAIR.B.json` with the stem and B blocks frozen."""
    return out / f"{pair.name}.{'full' if blocks is None else blocks}.json"


class Evaluations(TrainerCallback):
    """Evaluates at some steps of a run."""

    def __init__(self, task: Task, steps: int):
        self.task, self.steps = task, steps
        self.wanted = {round(steps * part) for part in EARLY}
        self.found: list[dict[str, Any]] = []
        self.correct = ""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.wanted:
            self.evaluate(state.global_step, EARLY_ROWS)

    def evaluate(self, step: int, rows: int | None = None) -> None:
        logits, labels = self.task.outputs(self.task.held_out[:rows])
        each = losses(logits, labels)
        error = float(each.std() / len(each) ** 0.5)
        known = {"loss": float(each.mean()), "loss_standard_error": error, "points": points(logits, labels)}
        self.found.append({"step": step, "rows": len(each)} | {k: rounded([v])[0] for k, v in known.items()})
        if logits.shape[1] > 1:
            # One bit a row, so that two runs can be compared row by row.
            bits = "".join("1" if hit else "0" for hit in logits.argmax(1) == labels)
            self.correct = f"{int(bits, 2):0{ceil(len(bits) / 4)}x}"


def rate_factor(full: dict[str, Any], blocks: int) -> float:
    """
    What the learning rate of a frozen run is multiplied with, so that its loss falls as fast at first as that of the full run.
    """
    return pilot_signals(full["signals"], RATE_MOMENT).rate_factor(blocks + 1)


def run(pair: Pair, blocks: int | None, task: Task, factor: float = 1.0) -> dict[str, Any]:
    """
    Train once.

    Args:
        pair ([`Pair`]): model and task.
        blocks (`int`, *optional*): blocks frozen from the start, besides the stem. Nothing is frozen when not given.
        task ([`Task`]): newly loaded.
        factor (`float`, *optional*, defaults to `1.0`): for the learning rate.

    Returns:
        `dict`: the result, ready for JSON.
    """
    started = time.perf_counter()
    stack = find_blocks(task.model)
    steps = ceil(len(task.train) / pair.batch_size) * pair.epochs
    evaluations = Evaluations(task, steps)
    task.model.accepts_loss_kwargs = False  # one batch a step: the model's own mean loss is right
    with TemporaryDirectory() as folder:
        args = training_arguments(pair, steps, folder, factor)
        signals = None
        if blocks is None:
            signals = Signals(stack, task, pair.batch_size, steps)
            signals.before()
        else:
            Freezer(stack).freeze_to(blocks + 1)
        trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
        trainer = WatchedTrainer(
            task.model, args, train_dataset=task.train, data_collator=task.collate, callbacks=[evaluations]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.signals = signals
        ready = time.perf_counter()
        set_seed(pair.seed)  # what was measured before may have drawn random numbers
        trainer.train()
        done = time.perf_counter()
    evaluations.evaluate(steps)
    ended = time.perf_counter()
    curve = [[entry["step"], *rounded([entry["loss"]])] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "pair": asdict(pair),
        "frozen_blocks": blocks,
        "rate_factor": factor,
        "blocks": len(stack) - 1,
        "steps": steps,
        "trained_parameters": trained,
        "vocabulary": task.vocabulary,
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "evaluations": evaluations.found,
        "correct": evaluations.correct,
        "train_loss": curve,
        "seconds": {
            "before": round(ready - started, 1),
            "training": round(done - ready, 1),
            "final": round(ended - done, 1),
        },
        "signals": signals.found if signals else None,
    } | provenance()


def write(result: dict[str, Any], path: Path) -> None:
    """Write the result at once or not at all."""
    parts = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    os.replace(partial, path)


def make(pair: Pair, blocks: int | None, plan: Plan, options: argparse.Namespace, path: Path, left: int) -> bool:
    """Make one run and write its result. Returns whether it went well."""
    try:
        set_seed(pair.seed)
        folder, data = plan.folder(pair, options.model_dir), find_data(pair.task, options.data_dir)
        full = result_file(options.out, pair, None)
        factor = 1.0 if blocks is None else rate_factor(json.loads(full.read_text(encoding="utf-8")), blocks)
        result = run(pair, blocks, load_task(pair, plan.models[pair.model], folder, data), factor)
        write(result, path)
    except Exception:
        print(f"{time.strftime('%H:%M:%S')} {path.stem} failed", traceback.format_exc(), sep="\n", flush=True)
        return False
    last = result["evaluations"][-1]
    said = f"loss {last['loss']}, points {last['points']}, {result['seconds']}, {left} to go"
    print(f"{time.strftime('%H:%M:%S')} {path.stem}: {said}", flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="folder of the pretrained models")
    parser.add_argument("--data_dir", type=Path, nargs="+", required=True, help="folders of the data sets")
    parser.add_argument("--plan", type=Path, default=HERE / "pairs.json")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--most", type=int, default=10**9, help="stop after so many runs")
    parser.add_argument("--list", action="store_true", help="say what is missing and stop")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.out.mkdir(exist_ok=True)
    failed: set[Path] = set()
    for _ in range(options.most):
        plan = Plan.read(options.plan)  # again each time: it may have grown
        missing = [
            (pair, blocks)
            for pair in plan.pairs
            if pair.role == "harvest"
            and plan.folder(pair, options.model_dir)
            and find_data(pair.task, options.data_dir)
            for blocks in [None, *pair.frozen_blocks]
            if not (path := result_file(options.out, pair, blocks)).exists() and path not in failed
        ]
        if options.list:
            print(*(f"{pair.name} {blocks}" for pair, blocks in missing), f"{len(missing)} runs", sep="\n")
            return
        if not missing:
            break
        # A frozen run needs the full one; what other processes are at is theirs.
        ready = [run for run in missing if run[1] is None or result_file(options.out, run[0], None).exists()]
        for pair, blocks in ready:
            path = result_file(options.out, pair, blocks)
            with claim(path) as claimed:
                if claimed and not path.exists():
                    made = make(pair, blocks, plan, options, path, len(missing) - 1)
                    failed |= set() if made else {path}
                    break
        else:
            break
        gc.collect()


if __name__ == "__main__":
    main()
