"""
Fuzz the activation cache: the same short training with and without it must give the same losses, up to rounding.

`python tests/fuzz/fuzz.py FIRST LAST` runs the seeds from FIRST to LAST - 1, prints a line for each that fails, and exits with 1 if
any does. Some of these trainings are chaotic, so that any rounding becomes large. A case whose losses differ is run once more, with
the loss of each batch computed a second time without the cache, at the same weights: it fails if one of these differs by more than
rounding what crosses the boundary changes it. With `--out FILE` it writes what it has found to a file, and goes on from there when it is started again. Each seed draws
a model, its data, how the front grows, and what else happens to the model on its way.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import logging
import math
import random
import sys
import time
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "utils"))
from architectures import build  # noqa: E402

from smartfrz_hf import Freezer, find_blocks  # noqa: E402
from smartfrz_hf.activation_cache import ActivationCache, ActivationStore, checks  # noqa: E402
from smartfrz_hf.activation_cache.monitor import CacheMonitor  # noqa: E402
from smartfrz_hf.model.left_as_found import model_left_as_found  # noqa: E402

TEXT = ["bert", "roberta", "distilbert", "deberta-v2", "electra", "albert", "mpnet", "modernbert"]
CAUSAL = ["gpt2", "llama", "qwen2"]
IMAGES = ["vit", "deit", "swin", "convnext", "resnet"]
TWO_SEGMENTS = ["bert", "electra", "albert", "deberta-v2"]
LORA = {"bert": ["query", "value"], "roberta": ["query", "value"], "llama": ["q_proj", "v_proj"], "qwen2": ["q_proj"]}
# Largest difference between two losses: what rounding becomes over a short training. A wrong row makes far more.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.03}
# In a batch of rows that are kept rounded and rows that were just computed, rounding may do more than in one where all are.
MIXED = 4.0
# Why the cache turns itself off where it has found an error of its own.
ALARMS = ("an activation ", "the frozen front has returned a value that is not finite")
# Freshly made layers change little of what enters them. Larger weights make a row of the wrong depth stand out.
GAIN = 4.0


def draw_case(seed: int) -> dict:
    """Everything about one case."""
    draw = random.Random(seed)
    model = draw.choice(TEXT + CAUSAL + IMAGES)
    rows, batch = draw.choice([6, 8, 12]), draw.choice([2, 3, 4, 5])
    epochs = draw.choice([4, 5]) + (rows < 4 * batch)
    steps = epochs * math.ceil(rows / batch)
    events = draw_events(draw, steps, batch)
    text = model not in IMAGES
    return {
        "seed": seed,
        "model": model,
        "precision": draw.choice(["fp32", "bf16"]),
        "padding": draw.choice(["right", "right", "left", "fixed", "both", "holes", "none"]) if text else "none",
        "rows": rows,
        "batch": batch,
        "epochs": epochs,
        "accumulation": draw.choice([1, 1, 2]),
        "events": events,
        "lora": model in LORA and draw.random() < 0.6,
        "mean_pooling": text and draw.random() < 0.4,  # a loss outside the model, which reads no padding
        "reference_pass": draw.random() < 0.5,
        "evaluate": draw.random() < 0.5,
        "evaluate_in": draw.choice(["fp32", "bf16", "both", None]),
        "order": draw.choice(["shuffled", "shuffled", "shuffled", "given", "by length"]),
        "labels_at_padding": draw.random() < 0.2,
        "segments": model in TWO_SEGMENTS and draw.random() < 0.5,
        "twins": draw.random() < 0.2,
        "average_for_evaluation": draw.choice([None, None, "copy", "data", "swap"]),
        "kept_as": draw.choice(["exact", "exact", "exact", "bfloat16"]),
        "memory": draw.choice([2**24, 2**24, 20000]),
        "disk": draw.choice([0, 0, 2**24, 2**19]),
        "checked": draw.choice(["always", "as usual"]),
    }


def draw_events(draw: random.Random, steps: int, batch: int) -> list[dict]:
    """What happens before which step: mostly growth, often right after the first batches of a depth or of a resumed run."""
    at, events = draw.choice([0, draw.randint(0, max(1, steps // 3))]), []

    def grow(step: int) -> None:
        events.append(
            {"step": step, "what": "grow", "units": draw.choice(["one", "one", "some", "all"]), "to": draw.random()}
        )

    for _ in range(draw.randint(1, 4)):
        grow(at)
        at += draw.choice([1, 1, 2, draw.randint(1, max(1, steps // 3))])
    if draw.random() < 0.4:
        step = draw.randint(1, steps - 1)
        events.append({"step": step, "what": "resume", "batch": draw.choice([batch, 2, 3, 6])})
        if draw.random() < 0.7:
            grow(step + draw.choice([0, 1, 1, 2]))
    others = ["checkpoint", "plain", "unfreeze", "exchange", "exchange data", "new rows", "hook", "no hook", "dropout"]
    for what in draw.sample(others, draw.choice([0, 0, 1, 2])):
        events.append({"step": draw.randint(0, steps - 1), "what": what})
    return sorted(events, key=lambda event: event["step"])


@functools.cache
def prototype(name: str) -> torch.nn.Module:
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(GAIN)
    return model


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


def make_rows(case: dict, seed: int) -> list[dict]:
    draw = torch.Generator().manual_seed(seed)
    rows: list[dict] = []
    for number in range(case["rows"]):
        if case["model"] in IMAGES:
            rows.append({"pixel_values": torch.rand(3, 32, 32, generator=draw), "labels": torch.tensor(number % 2)})
            continue
        length = 12 if case["padding"] == "none" else int(torch.randint(3, 20, (), generator=draw))
        ids = torch.randint(5, 99, (length,), generator=draw)
        if case["twins"] and number % 2:  # the same row but for one token
            ids = rows[-1]["input_ids"].clone()
            place = int(torch.randint(0, len(ids), (), generator=draw))
            ids[place] = 5 + (ids[place] - 4) % 94
        rows.append({"input_ids": ids, "front": int(torch.randint(0, 4, (), generator=draw))})
        rows[-1]["labels"] = ids if case["model"] in CAUSAL else ids[0] % 2
        if case["segments"]:
            rows[-1]["token_type_ids"] = (torch.arange(len(ids)) > len(ids) // 2).long()
    return rows


def collate(case: dict, rows: list[dict]) -> dict[str, torch.Tensor]:
    if "pixel_values" in rows[0]:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    longest = 24 if case["padding"] == "fixed" else max(len(row["input_ids"]) for row in rows)

    def pad(row: dict, values: torch.Tensor, value: int) -> torch.Tensor:
        missing = longest - len(values)
        before = {"left": missing, "both": min(missing, row["front"])}.get(case["padding"], 0)
        return torch.nn.functional.pad(values, (before, missing - before), value=value)

    fill = {"input_ids": 1, "token_type_ids": 0, "labels": 1 if case["labels_at_padding"] else -100}
    batch = {
        name: torch.stack([pad(row, row[name], fill[name]) for row in rows])
        for name in ("input_ids", "token_type_ids", "labels")
        if name in rows[0] and rows[0][name].ndim
    }
    batch["attention_mask"] = torch.stack([pad(row, torch.ones_like(row["input_ids"]), 0) for row in rows])
    if case["padding"] == "holes":
        batch["attention_mask"][:, 1] = 0
    if "labels" not in batch:
        batch["labels"] = torch.stack([row["labels"] for row in rows])
    return batch


@contextlib.contextmanager
def averaged(model: torch.nn.Module, how: str | None):
    """Other weights for an evaluation, exchanged in one of the ways in which people do it."""
    before = {p: p.detach().clone() for p in model.parameters()}
    for p in model.parameters() if how else ():
        exchange(p, how, p.detach() * 0.9)
    yield
    for p in model.parameters() if how else ():
        exchange(p, "data" if how == "data" else "swap", before[p])


def exchange(parameter: torch.nn.Parameter, how: str, other: torch.Tensor) -> None:
    if how == "copy":
        with torch.no_grad():
            parameter.copy_(other)
    elif how == "data":
        parameter.data.copy_(other)
    else:
        parameter.data = other


class Run:
    """
    One short training.

    Args:
        case (`dict`): as [`draw_case`] gives it.
        with_cache (`bool`): whether it has a cache.
        narrow (`bool`): for a run with a cache, whether to compute each loss without it, too, at the same weights; and to round
            what crosses the boundary to `bfloat16` as a measure of what rounding does, where the case computes or keeps in it.

    Attributes:
        losses (`list[float]`): of all batches, in order.
        worst (`float`): largest difference from a loss computed without the cache, beyond what rounding does.
    """

    def __init__(self, case: dict, with_cache: bool, narrow: bool | None = None):
        self.case, self.with_cache, self.narrow, self.worst = case, with_cache, narrow, 0.0
        self.model, self.rows, self.batch = make_model(case), make_rows(case, case["seed"]), case["batch"]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.02, momentum=0.5)
        self.stack = find_blocks(self.model)
        self.step, self.depth = 0, 0
        self.losses: list[float] = []
        self.counts: Counter[str] = Counter()
        self.off: list[str] = []
        self.hook: torch.utils.hooks.RemovableHandle | None = None
        self.start()

    def start(self) -> None:
        """What happens at the start of a run, and of one that is resumed."""
        self.freezer = Freezer(self.stack, self.optimizer)
        self.cache = None
        if self.with_cache:
            case, steps = self.case, math.ceil(self.case["rows"] / self.batch)
            store = ActivationStore(case["memory"], case["disk"], dtype=case["kept_as"])
            self.cache = ActivationCache(self.stack, store, None, self.step + case["epochs"] * steps, steps)
            self.cache.end_of_step(self.step)
        self.freeze()

    def stop(self) -> None:
        if self.cache is not None:
            self.cache.close()
            savings = self.cache.savings
            self.counts.update(looked_up=savings.rows, hits=savings.hits, compared=savings.checked_rows)
            self.off += [savings.off] if savings.off else []
        self.freezer.unfreeze_to(0)

    def freeze(self) -> None:
        if self.depth:
            self.freezer.freeze_to(self.depth)
            if self.cache is not None:
                self.cache.freeze_to(self.depth)

    def happen(self, event: dict) -> None:
        what, last = event["what"], len(self.stack)
        front = [p for unit in self.stack.units[: self.depth] for p in unit.named_parameters().values()]
        base = self.model.get_base_model() if self.case["lora"] else self.model
        if what == "grow":
            targets = {"one": max(2, self.depth + 1), "some": 1 + int(event["to"] * last), "all": last}
            self.depth = max(self.depth, min(last, targets[event["units"]]))
            self.freeze()
        elif what == "resume":
            self.stop()
            self.batch = event["batch"]
            self.start()
        elif what == "unfreeze":
            self.stop()
            self.depth = 0
            self.start()
        elif what in ("exchange", "exchange data"):
            for parameter in front:
                exchange(parameter, "data" if "data" in what else "copy", parameter.detach() * 1.1)
        elif what == "new rows":
            self.rows[::2] = make_rows(self.case, self.case["seed"] + 1)[::2]
        elif what == "hook":
            self.hook = self.stack.blocks[0].register_forward_hook(scale_output)
        elif what == "no hook" and self.hook is not None:
            self.hook.remove()
        elif what in ("checkpoint", "plain") and base.supports_gradient_checkpointing:
            if what == "checkpoint":
                base.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                base.gradient_checkpointing_disable()
        elif what == "dropout":  # somebody switches the front back to training mode
            for unit in self.stack.units[: self.depth]:
                for module in unit.modules.values():
                    for child in module.modules():
                        child.training = True

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if not self.case["mean_pooling"]:
            return self.model(**batch).loss
        model = self.model.get_base_model() if self.case["lora"] else self.model
        hidden = model.base_model(**{name: value for name, value in batch.items() if name != "labels"})[0]
        mask = batch["attention_mask"].unsqueeze(-1)
        return ((hidden * mask).sum(1) / mask.sum(1)).float().square().mean()

    def forward(self, chosen: list[int], bf16: bool) -> torch.Tensor:
        batch = collate(self.case, [self.rows[i] for i in chosen])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = self.compared_loss(batch)
            if self.case["lora"] and self.case["reference_pass"]:
                with torch.no_grad(), self.model.disable_adapter():
                    self.losses.append(float(self.compared_loss(batch)))
        self.losses.append(float(loss.detach()))
        return loss

    def compared_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch; compared with that without the cache, if this was asked for."""
        if self.cache is None or self.narrow is None:
            return self.loss(batch)
        state = torch.get_rng_state()
        plain = self.loss_without_cache(batch, False)
        torch.set_rng_state(state)
        rounding = abs(self.loss_without_cache(batch, True) - plain) if self.narrow else 0.0
        torch.set_rng_state(state)
        loss = self.loss(batch)
        difference = abs(float(loss.detach()) - plain) - MIXED * rounding
        self.worst = max(self.worst, difference / max(1, abs(plain)) if math.isfinite(difference) else math.inf)
        return loss

    def loss_without_cache(self, batch: dict[str, torch.Tensor], rounded: bool) -> float:
        """The same loss computed without the cache, and if asked for with the output of the last frozen block rounded."""
        last = self.stack.blocks[max(0, self.depth - 2)]
        with self.cache.bypassed(), model_left_as_found(self.model), contextlib.ExitStack() as stack:
            if rounded and self.depth > 1:
                stack.callback(last.register_forward_hook(round_output).remove)
            return float(self.loss(batch))

    def train(self) -> None:
        case, draw, events = self.case, random.Random(self.case["seed"]), list(self.case["events"])
        bf16 = case["precision"] == "bf16"
        torch.manual_seed(case["seed"])
        for _ in range(case["epochs"]):
            left = list(range(case["rows"]))
            if case["order"] != "given":
                draw.shuffle(left)
            if case["order"] == "by length":
                left.sort(key=lambda i: len(self.rows[i].get("input_ids", ())))
            while left:
                while events and events[0]["step"] <= self.step:
                    self.happen(events.pop(0))
                chosen, left = left[: self.batch], left[self.batch :]
                self.model.train()
                loss = self.forward(chosen, bf16)
                if loss.requires_grad:
                    loss.backward()
                self.step += 1
                if self.step % case["accumulation"] == 0:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if self.cache is not None:
                    self.cache.end_of_step(self.step)
            if case["evaluate"]:
                self.model.eval()
                formats = {"both": [True, False], "bf16": [True], "fp32": [False]}.get(case["evaluate_in"], [bf16])
                with torch.no_grad(), averaged(self.model, case["average_for_evaluation"]):
                    for in_bf16, first in itertools.product(formats, range(0, case["rows"], 6)):
                        self.forward(list(range(case["rows"]))[first : first + 6], in_bf16)
        self.stop()


def scale_output(module: torch.nn.Module, args: tuple, output: object) -> object:
    return (output[0] * 1.2, *output[1:]) if isinstance(output, tuple) else output * 1.2


def round_output(module: torch.nn.Module, args: tuple, output: object) -> object:
    if isinstance(output, tuple):
        return (round_output(module, args, output[0]), *output[1:])
    return output.bfloat16().to(output.dtype)


def check(seed: int) -> dict:
    """Run one case. `wrong` is set if it fails."""
    case = draw_case(seed)
    began = time.perf_counter()
    try:
        cached, plain = Run(case, True), Run(case, False)
        train_with_cache(cached)
        plain.train()
    except Exception as error:
        return case | {"wrong": f"{type(error).__name__}: {error}"}
    pairs = list(zip(plain.losses, cached.losses, strict=True))
    worst = max((abs(a - b) / max(1, abs(a)) if math.isfinite(b) else math.inf) for a, b in pairs)
    # A narrower format for what is kept rounds on purpose.
    evaluated = case["evaluate_in"] if case["evaluate"] else None
    exact = case["precision"] == "fp32" and evaluated in (None, "fp32") and case["kept_as"] == "exact"
    kind, amplified = "fp32" if exact else "bf16", False
    wrong = next((reason for reason in cached.off if reason.startswith(ALARMS)), None)
    if worst > TOLERANCE[kind]:
        compared = Run(case, True, narrow=not exact)
        train_with_cache(compared)
        amplified, worst = compared.worst <= TOLERANCE[kind], compared.worst
        wrong = wrong if amplified else f"losses differ by {worst:.3g}"
    result = {"worst": worst, "kind": kind, **cached.counts, "off": cached.off, "wrong": wrong, "amplified": amplified}
    return case | result | {"seconds": time.perf_counter() - began}


def train_with_cache(run: Run) -> None:
    every = {"CHECK_EVERY": 1, "CHECK_TIME": 1e6} if run.case["checked"] == "always" else {}
    with patch.multiple(checks, **every) if every else contextlib.nullcontext():
        run.train()


@contextlib.contextmanager
def quiet():
    """Tiny models compute faster than anything can be looked up; keep their cache on nevertheless. And print no warnings."""
    names = ("transformers", "smartfrz_hf")
    levels = [logging.getLogger(name).level for name in names]
    threads = torch.get_num_threads()
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), patch.object(CacheMonitor, "loss", lambda self: None):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in zip(names, levels, strict=True):
            logging.getLogger(name).setLevel(level)
        torch.set_num_threads(threads)


def begin(options: argparse.Namespace) -> dict:
    """What an interrupted run has written, if this fuzzer wrote it; else an empty summary."""
    versions = {name: version(name) for name in ("smartfrz_hf", "torch", "transformers", "peft")}
    fuzzer = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    about = {"versions": versions, "fuzzer": fuzzer, "first": options.first}
    if options.out is not None and options.out.exists():
        found = json.loads(options.out.read_text())
        if all(found.get(key) == value for key, value in about.items()):
            return found
    return about | {
        "next": options.first,
        "looked_up": 0,
        "hits": 0,
        "compared": 0,
        "seconds": 0.0,
        "worst": {},
        "amplified": [],
        "wrong": [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int, nargs="?", default=0)
    parser.add_argument("last", type=int, nargs="?", default=100)
    parser.add_argument("--out", type=Path, help="file to write the results to, and to go on from")
    parser.add_argument("--verbose", action="store_true", help="print each case")
    options = parser.parse_args()
    summary = begin(options)
    with quiet():
        for seed in range(summary["next"], options.last):
            result = check(seed)
            summary["next"] = seed + 1
            for key in ("looked_up", "hits", "compared", "seconds"):
                summary[key] = round(summary[key] + result.get(key, 0), 2)
            if "worst" in result:
                kind = result["kind"]
                summary["worst"][kind] = max(summary["worst"].get(kind, 0.0), result["worst"])
            if result.get("amplified"):
                summary["amplified"].append(seed)
            if result["wrong"]:
                summary["wrong"].append({"seed": seed, "what": result["wrong"]})
            if result["wrong"] or options.verbose:
                print(json.dumps(result), flush=True)  # noqa: T201
            if options.out is not None and (seed % 20 == 19 or seed + 1 == options.last):
                options.out.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))  # noqa: T201
    sys.exit(bool(summary["wrong"]))


if __name__ == "__main__":
    main()
