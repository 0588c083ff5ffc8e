"""
Fuzz the activation cache: the same short training with and without it must give the same losses, up to rounding.

`python tests/fuzz/fuzz.py FIRST LAST` runs the seeds from FIRST to LAST - 1, prints a line for each that fails, and exits with 1 if
any does. Each seed draws an architecture, precision, padding, growth of the front, adapters, accumulation, batch size, order and
evaluation, and what else happens to the model on its way.
"""

import argparse
import contextlib
import copy
import functools
import json
import logging
import math
import random
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "utils"))
from architectures import build  # noqa: E402

from smartfrz_hf import Freezer, find_blocks  # noqa: E402
from smartfrz_hf.activation_cache import ActivationCache, ActivationStore  # noqa: E402
from smartfrz_hf.activation_cache.monitor import CacheMonitor  # noqa: E402

TEXT = ["bert", "roberta", "distilbert", "deberta-v2", "electra", "albert", "mpnet", "modernbert"]
CAUSAL = ["gpt2", "llama", "qwen2"]
IMAGES = ["vit", "deit", "swin", "convnext", "resnet"]
LORA = {"bert": ["query", "value"], "roberta": ["query", "value"], "llama": ["q_proj", "v_proj"], "qwen2": ["q_proj"]}
# Largest difference between two losses: what rounding becomes over a short training. A wrong row makes far more.
TOLERANCE = {"fp32": 2e-3, "bf16": 0.15}


def draw_case(seed: int) -> dict:
    """Everything about one case."""
    draw = random.Random(seed)
    model = draw.choice(TEXT + CAUSAL + IMAGES)
    rows, batch = draw.choice([6, 10, 16]), draw.choice([2, 4, 5, 8])
    epochs, accumulation = draw.choice([4, 5]), draw.choice([1, 1, 2])
    steps = epochs * math.ceil(rows / batch)
    stages = sorted(draw.sample(range(steps // 2 + 1), min(steps // 2, draw.randint(1, 3))))
    return {
        "seed": seed,
        "model": model,
        "precision": draw.choice(["fp32", "bf16"]),
        "padding": "none" if model in IMAGES else draw.choice(["right", "left", "fixed", "none"]),
        "rows": rows,
        "batch": batch,
        "epochs": epochs,
        "accumulation": accumulation,
        "stages": [[step, draw.random()] for step in stages],
        "lora": model in LORA and draw.random() < 0.6,
        "reference_pass": draw.random() < 0.5,
        "evaluate": draw.random() < 0.5,
        "shuffle": draw.random() < 0.8,
        "labels_at_padding": draw.random() < 0.2,
        "average_for_evaluation": draw.choice([None, None, "copy", "data", "swap"]),
        "kept_as": draw.choice(["exact", "exact", "exact", "bfloat16"]),
        "budget": draw.choice([2**24, 2**24, 20000]),
    }


@functools.cache
def prototype(name: str) -> torch.nn.Module:
    return build(name)


def make_model(case: dict) -> torch.nn.Module:
    model = copy.deepcopy(prototype(case["model"]))
    if case["lora"]:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(target_modules=LORA[case["model"]], r=2, init_lora_weights=False))
        for name, parameter in model.named_parameters():
            if "classifier" in name or "lm_head" in name:
                parameter.requires_grad_(True)
    return model


def make_rows(case: dict) -> list[dict]:
    draw = torch.Generator().manual_seed(case["seed"])
    rows = []
    for number in range(case["rows"]):
        if case["model"] in IMAGES:
            rows.append({"pixel_values": torch.rand(3, 32, 32, generator=draw), "labels": torch.tensor(number % 2)})
            continue
        length = 12 if case["padding"] == "none" else int(torch.randint(3, 20, (), generator=draw))
        rows.append({"input_ids": torch.randint(5, 99, (length,), generator=draw)})
        rows[-1]["labels"] = rows[-1]["input_ids"] if case["model"] in CAUSAL else rows[-1]["input_ids"][0] % 2
    return rows


def collate(case: dict, rows: list[dict]) -> dict[str, torch.Tensor]:
    if "pixel_values" in rows[0]:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    longest = 20 if case["padding"] == "fixed" else max(len(row["input_ids"]) for row in rows)

    def pad(values: torch.Tensor, value: int) -> torch.Tensor:
        missing = longest - len(values)
        return torch.nn.functional.pad(
            values, (missing, 0) if case["padding"] == "left" else (0, missing), value=value
        )

    batch = {
        "input_ids": torch.stack([pad(row["input_ids"], 1) for row in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(row["input_ids"]), 0) for row in rows]),
    }
    filler = 1 if case["labels_at_padding"] else -100
    by_token = case["model"] in CAUSAL
    batch["labels"] = torch.stack([pad(row["labels"], filler) if by_token else row["labels"] for row in rows])
    return batch


@contextlib.contextmanager
def averaged(model: torch.nn.Module, how: str | None):
    """Other weights for an evaluation, exchanged in one of the ways in which people do it."""
    before = {p: p.detach().clone() for p in model.parameters()}
    for p in model.parameters() if how else ():
        other = p.detach() * 0.9
        if how == "copy":
            with torch.no_grad():
                p.copy_(other)
        elif how == "data":
            p.data.copy_(other)
        else:
            p.data = other
    yield
    for p in model.parameters() if how else ():
        if how == "data":
            p.data.copy_(before[p])
        else:
            p.data = before[p]


def run(case: dict, with_cache: bool) -> tuple[list[float], ActivationCache | None]:
    """All losses of one short training."""
    model, rows = make_model(case), make_rows(case)
    torch.manual_seed(case["seed"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4, eps=1e-6)
    stack = find_blocks(model)
    freezer = Freezer(stack, optimizer)
    steps = math.ceil(case["rows"] / case["batch"])
    cache = None
    if with_cache:
        store = ActivationStore(case["budget"], dtype=case["kept_as"])
        cache = ActivationCache(stack, store, None, case["epochs"] * steps, steps)
    order, losses, step = random.Random(case["seed"]), [], 0
    stages = dict(map(tuple, case["stages"]))

    def forward(chosen: list[int]) -> torch.Tensor:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=case["precision"] == "bf16")
        batch = collate(case, [rows[i] for i in chosen])
        with autocast:
            loss = model(**batch).loss
            if case["lora"] and case["reference_pass"]:
                with torch.no_grad(), model.disable_adapter():
                    losses.append(float(model(**batch).loss))
        losses.append(float(loss.detach()))
        return loss

    for _ in range(case["epochs"]):
        indices = list(range(case["rows"]))
        if case["shuffle"]:
            order.shuffle(indices)
        for first in range(0, len(indices), case["batch"]):
            if step in stages:
                depth = max(freezer.depth, min(len(stack), 1 + int(stages[step] * len(stack))))
                freezer.freeze_to(depth)
                if cache is not None:
                    cache.freeze_to(depth)
            model.train()
            loss = forward(indices[first : first + case["batch"]])
            if loss.requires_grad:
                loss.backward()
            step += 1
            if step % case["accumulation"] == 0:
                optimizer.step()
                optimizer.zero_grad()
            if cache is not None:
                cache.end_of_step(step)
        if case["evaluate"]:
            model.eval()
            with torch.no_grad(), averaged(model, case["average_for_evaluation"]):
                for first in range(0, case["rows"], 6):
                    forward(list(range(case["rows"]))[first : first + 6])
    if cache is not None:
        cache.close()
    return losses, cache


def check(seed: int) -> dict:
    """Run one case. `wrong` is set if it fails."""
    case = draw_case(seed)
    began = time.perf_counter()
    try:
        found, cache = run(case, True)
        expected, _ = run(case, False)
    except Exception as error:
        return case | {"wrong": f"{type(error).__name__}: {error}"}
    pairs = list(zip(expected, found, strict=True))
    worst = max((abs(a - b) / max(1, abs(a)) if math.isfinite(b) else math.inf) for a, b in pairs)
    # A narrower format for what is kept rounds on purpose.
    limit = TOLERANCE["fp32" if case["precision"] == "fp32" and case["kept_as"] == "exact" else "bf16"]
    savings, wrong = cache.savings, None
    if worst > limit:
        wrong = f"losses differ by {worst:.3g}"
    elif savings.off and "kept" in savings.off:
        wrong = savings.off
    result = {"worst": worst, "rows": savings.rows, "hits": savings.hits, "off": savings.off, "wrong": wrong}
    return case | result | {"seconds": time.perf_counter() - began}


@contextlib.contextmanager
def quiet():
    """Tiny models compute faster than anything can be looked up; keep their cache on nevertheless. And print no warnings."""
    before, CacheMonitor.loss = CacheMonitor.loss, lambda self: None
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("smartfrz_hf").setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        CacheMonitor.loss = before
        logging.getLogger("transformers").setLevel(level)
        logging.getLogger("smartfrz_hf").setLevel(logging.NOTSET)
        torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int, nargs="?", default=0)
    parser.add_argument("last", type=int, nargs="?", default=100)
    parser.add_argument("--out", type=Path, help="file to write a summary to")
    parser.add_argument("--verbose", action="store_true", help="print each case")
    options = parser.parse_args()
    failed, counts = [], {"cases": 0, "rows": 0, "hits": 0, "seconds": 0.0}
    with quiet():
        for seed in range(options.first, options.last):
            result = check(seed)
            counts["cases"] += 1
            for key in ("rows", "hits", "seconds"):
                counts[key] += result.get(key, 0)
            if result["wrong"] or options.verbose:
                print(json.dumps(result), flush=True)  # noqa: T201
            if result["wrong"]:
                failed.append(seed)
    summary = counts | {"seeds": [options.first, options.last - 1], "failed": failed}
    print(json.dumps(summary))  # noqa: T201
    if options.out is not None:
        options.out.write_text(json.dumps(summary, indent=2) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
