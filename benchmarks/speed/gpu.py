"""
What freezing saves on a GPU: seconds a step and memory with the front frozen at several depths, with and without the activation
cache, of models of usual size with random weights.

    python -m benchmarks.speed.gpu            # needs CUDA; a minute a model
"""

import argparse
import gc
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.utils import logging

from benchmarks.utils import markdown_table, provenance, read_json, write_json
from smartfrz_hf import SmartFRZCallback, SmartFRZConfig

RESULTS = Path(__file__).parent / "results" / "gpu.json"
BATCHES, EPOCHS = 12, 3  # the cache is filled in the first epoch; the last one is timed
DEPTHS = (0.0, 0.34, 0.5, 0.67, 0.84)


class Rows(Dataset):
    """Random rows that come again in each epoch."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def texts(count: int, length: int, vocabulary: int, labels: bool) -> Rows:
    ids = torch.randint(5, vocabulary, (count, length))
    return Rows([{"input_ids": row, "labels": torch.tensor(int(row[0]) % 2) if labels else row} for row in ids])


def bert() -> tuple[PreTrainedModel, Rows, int]:
    """BERT-base, texts of 128 tokens."""
    return BertForSequenceClassification(BertConfig()), texts(64 * BATCHES, 128, 30_000, True), 64


def llama() -> tuple[PreTrainedModel, Rows, int]:
    """A Llama of SmolLM2-360M's shape (32 blocks of width 960), blocks of 512 tokens."""
    shape = {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15}
    config = LlamaConfig(vocab_size=49152, num_key_value_heads=5, use_cache=False, tie_word_embeddings=True, **shape)
    return LlamaForCausalLM(config), texts(32 * BATCHES, 512, 49_000, False), 32


def vit() -> tuple[PreTrainedModel, Rows, int]:
    """ViT-B/16, images of 224 pixels."""
    pixels = torch.randn(64 * BATCHES, 3, 224, 224)
    rows = [{"pixel_values": image, "labels": torch.tensor(i % 2)} for i, image in enumerate(pixels)]
    return ViTForImageClassification(ViTConfig(num_labels=2)), Rows(rows), 64


MODELS = {"bert": bert, "llama": llama, "vit": vit}


class Timer(TrainerCallback):
    """Seconds and peak memory of each step, from after the batch is loaded to the end of the update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peaks: list[int] = []

    def on_step_begin(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begun)
        self.peaks.append(torch.cuda.max_memory_allocated())


def run(name: str, depth: float | None, cache: bool) -> dict[str, Any]:
    """Train, without this package where there is no depth, and give the medians of the last epoch and of the first."""
    set_seed(0)
    model, rows, batch = MODELS[name]()
    timer = Timer()
    policy = {"policy": "static", "static_depth": depth} if depth else {"policy": "never"}
    # One decision: in a run of usual length, they are far apart.
    config = SmartFRZConfig(
        **policy, first_decision=1, decide_every=10_000, activation_cache=cache, cache_memory="32GB"
    )
    callback = SmartFRZCallback(config)
    with TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=batch,
            learning_rate=1e-5,
            bf16=True,
            save_strategy="no",
            report_to=[],
            logging_steps=1000,
            disable_tqdm=True,
        )
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[*([] if depth is None else [callback]), timer])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    ledger = callback.ledger
    first, last = slice(BATCHES // 2, BATCHES), slice(-BATCHES, None)
    times = {
        "step_ms": round(1000 * median(timer.seconds[last]), 2),
        "first_epoch_ms": round(1000 * median(timer.seconds[first]), 2),
        "peak_gib": round(max(timer.peaks[last]) / 2**30, 3),
    }
    if depth is None:
        return times | {"depth": 0, "hits": 0}
    return times | {
        "depth": ledger.depth,
        "units": len(ledger.units),
        "hits": ledger.cache.hits if ledger.cache else 0,
        "cache_off": ledger.cache.off if ledger.cache else None,
        "cache_gib": round(ledger.cache.bytes_held / 2**30, 3) if ledger.cache else 0,
        "compute_saved": round(ledger.compute_saved, 4),
    }


def label(run: dict[str, Any]) -> str:
    return f"{run['depth']} of {run['units']}" if "units" in run else "plain"


def table(results: dict[str, Any]) -> str:
    """Steps and memory by depth."""
    body = [
        [f"{name}, {label(run)}{', cached' if run['hits'] else ''}", f"{run['step_ms']:.1f} ms"]
        + [f"{run['time']:.2f}", f"{run['peak_gib']:.2f} GiB", f"{run['memory']:.2f}"]
        for name, runs in results["models"].items()
        for run in runs.values()
    ]
    return markdown_table(["frozen units", "step", "time", "peak memory", "memory"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--depths", nargs="+", type=float, default=DEPTHS, help="fractions of the units")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    found = read_json(options.out) if options.out.exists() else {"models": {}} | provenance()
    for name in options.models:
        runs: dict[str, Any] = {}
        for depth in (None, *options.depths):
            for cache in (False, True) if depth else (False,):
                key = f"{'plain' if depth is None else depth}{' cached' if cache else ''}"
                runs[key] = run(name, depth, cache)
                runs[key]["time"] = round(runs[key]["step_ms"] / runs["plain"]["step_ms"], 3)
                runs[key]["memory"] = round(runs[key]["peak_gib"] / runs["plain"]["peak_gib"], 3)
                print(name, key, runs[key], flush=True)
                gc.collect()
        found["models"][name] = runs
        write_json(options.out, found)


if __name__ == "__main__":
    main()
