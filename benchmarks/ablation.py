"""
What is each part of the predictor worth? Leaves each model family out once, for one variant after the other.

Variants that are there already are not run again.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from workers import in_processes, provenance

from smartfrz_hf import SmartFRZPredictorConfig
from smartfrz_hf.cli import DEFAULT_LABEL, DEFAULT_TARGET
from smartfrz_hf.predictor.configuration import CONTEXT_SIZE, DYNAMICS_SIZE, PROBE_SIZE
from smartfrz_hf.predictor_training.cross_validation import cross_validate
from smartfrz_hf.predictor_training.dataset import FreezingStages
from smartfrz_hf.predictor_training.evaluation import SPACINGS
from smartfrz_hf.predictor_training.fit import FitOptions
from smartfrz_hf.predictor_training.labels import LABELS
from smartfrz_hf.predictor_training.metrics import summarize
from smartfrz_hf.predictor_training.table import read_runs
from smartfrz_hf.signals.probe_history import LAGS

ROOT = Path(__file__).parents[1]
FEATURES = (
    "update against the way so far",
    "update against the window's mean",
    "update per learning rate",
    "cosine to the update before",
    "cosine to the whole way",
    "displacement against the way so far",
    "way since then against that so far",
    "straightness since then",
    "way to come",
    "age",
)
CONTEXTS = ("depth", "progress", "learning rate", "learning rate left")


class WithSelfCKA(SmartFRZPredictorConfig):
    """One more number beside the context."""

    @property
    def context_size(self) -> int:
        return super().context_size + 1


@dataclass
class Variant:
    """What differs from the predictor as it is shipped."""

    group: str
    config: dict[str, Any] = field(default_factory=dict)  # beside that the front probe is told
    config_class: type = SmartFRZPredictorConfig
    label: str = DEFAULT_LABEL
    target: str = DEFAULT_TARGET
    spacings: tuple[int, ...] = SPACINGS
    change: Callable[[dict[str, torch.Tensor]], None] = lambda columns: None
    judged: dict[str, Any] | None = None


def blank(key: str, places: Iterable[int], columns: dict[str, torch.Tensor]) -> None:
    columns[key][..., list(places)] = 0


def add_self_cka(columns: dict[str, torch.Tensor]) -> None:
    change = (1 - columns["self_cka"]).clamp(min=1e-6).log10() / 3 + 1  # from -1 to 1
    columns["context"] = torch.cat([columns["context"], change.unsqueeze(-1)], dim=-1)


def variants() -> dict[str, Variant]:
    found = {"as shipped": Variant("")}
    for window in (3, 5, 10, 40):
        found[f"window {window}"] = Variant("history", {"window": window})
    for weights_per_unit in (16, 64, 256):
        found[f"{weights_per_unit} samples"] = Variant("history", {"weights_per_unit": weights_per_unit})
    for spacings in ((1,), (2,), (4,), (1, 2, 4)):
        found[f"spacings {', '.join(map(str, spacings))}"] = Variant("history", spacings=spacings)
    for place, name in enumerate(FEATURES):
        found[f"without {name}"] = Variant("quantities of a snapshot", change=partial(blank, "features", (place,)))
    for place, name in enumerate(CONTEXTS):
        found[f"without {name}"] = Variant("context", change=partial(blank, "context", (place,)))
    found["without all context"] = Variant("context", change=partial(blank, "context", range(CONTEXT_SIZE)))
    found["without weights"] = Variant(
        "quantities of a snapshot", change=partial(blank, "features", range(DYNAMICS_SIZE))
    )
    for weights_per_unit in (128, 512):
        found[f"as shipped, shown {weights_per_unit} samples"] = Variant(
            "other input", judged={"weights_per_unit": weights_per_unit}
        )
    for spacing in (2, 4):
        found[f"as shipped, shown spacing {spacing}"] = Variant("other input", judged={"spacings": (spacing,)})
    found["as shipped, not shown the front probe"] = Variant("other input", judged={"probed": False})
    found["without the sum over the front"] = Variant("network", {"front_sum": False})
    found["without attention across units"] = Variant("network", {"unit_attention": False})
    found["half as wide"] = Variant(
        "network", {"encoder_size": 8, "attention_size": 4, "unit_size": 8, "head_size": 8}
    )
    found["twice as wide"] = Variant(
        "network", {"encoder_size": 32, "attention_size": 16, "unit_size": 32, "head_size": 32}
    )
    found["the paper's form: weights themselves"] = Variant("network", {"form": "weights", "front_probe": False})
    found["without the front probe"] = Variant("front probe", {"front_probe": False})
    for name, place in (("what leaves the unit", CONTEXT_SIZE), ("what the model says", CONTEXT_SIZE + len(LAGS))):
        found[f"without {name}"] = Variant(
            "front probe", change=partial(blank, "context", range(place, place + len(LAGS)))
        )
    found["learned as a label"] = Variant("label", target="label")
    found["with self-CKA"] = Variant("extra input", config_class=WithSelfCKA, change=add_self_cka)
    for label in LABELS:
        if label != DEFAULT_LABEL:
            found[f"label {label}"] = Variant("label", label=label, target="label")
    return found


def judge(name: str, runs: Path, file: Path) -> None:
    """Leave each family out once, with one variant, and write how good it is."""
    variant = variants()[name]
    config = variant.config_class(**{"front_probe": True} | variant.config)
    stages = FreezingStages(read_runs(runs), config, variant.label, variant.spacings, variant.target)
    variant.change(stages.columns)
    judged = None
    if variant.judged is not None:
        shown = SmartFRZPredictorConfig(
            weights_per_unit=variant.judged.get("weights_per_unit", config.weights_per_unit), front_probe=True
        )
        judged = FreezingStages(stages.runs, shown, variant.label, variant.judged.get("spacings", (1,)))
        if not variant.judged.get("probed", True):
            blank("context", range(CONTEXT_SIZE, CONTEXT_SIZE + PROBE_SIZE), judged.columns)
    held_out = cross_validate(stages, config, lambda run: run.family, FitOptions(), name, judged)
    found = summarize(held_out)
    kept = {key: found[key] for key in ("auc", "ap", "brier", "moment_error", "frozen", "positive")}
    file.write_text(json.dumps({"variant": name, "group": variant.group} | kept))


def table(results: dict) -> str:
    """The results as a Markdown table."""
    lines = [
        "| | | ROC AUC | average precision | Brier score | moment error | frozen at a cost of 3 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["variants"]:
        scores = " | ".join(f"{row[key]:.3f}" for key in ("auc", "ap", "brier", "moment_error"))
        lines.append(f"| {row['group']} | {row['variant']} | {scores} | {row['frozen']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder that `smartfrz harvest` filled")
    parser.add_argument("--done", type=Path, default=ROOT / "runs" / "ablation", help="folder of finished variants")
    parser.add_argument("--only", help="only variants with this in their name")
    parser.add_argument("--processes", type=int, default=2, help="variants at a time")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "ablation.json", help="results file"
    )
    options = parser.parse_args()
    options.done.mkdir(parents=True, exist_ok=True)
    files = {name: options.done / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}.json" for name in variants()}
    waiting = [name for name in files if not files[name].exists() and (options.only or "") in name]
    in_processes(judge, [(name, options.runs, files[name]) for name in waiting], options.processes, "variants")
    results = {
        "variants": [json.loads(file.read_text()) for file in files.values() if file.exists()],
        **provenance("torch", "transformers", "scikit-learn"),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
