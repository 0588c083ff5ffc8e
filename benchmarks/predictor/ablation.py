"""
What is each part of the predictor worth?

Fits each variant of the predictor anew, with each model family left out once. Variants that exist are not run again.
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

from benchmarks.utils import ROOT, markdown_table, provenance, read_json, run_in_processes, write_json
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

RESULTS = Path(__file__).parent / "results" / "ablation.json"
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
    """A predictor whose context has one more number."""

    @property
    def context_size(self) -> int:
        return super().context_size + 1


@dataclass
class Variant:
    """How a variant differs from the shipped predictor."""

    group: str
    config: dict[str, Any] = field(default_factory=dict)  # in addition to `front_probe=True`
    config_class: type = SmartFRZPredictorConfig
    label: str = DEFAULT_LABEL
    target: str = DEFAULT_TARGET
    spacings: tuple[int, ...] = SPACINGS
    change: Callable[[dict[str, torch.Tensor]], None] = lambda columns: None
    judged: dict[str, Any] | None = None  # other input than in training


def blank(key: str, places: Iterable[int], columns: dict[str, torch.Tensor]) -> None:
    columns[key][..., list(places)] = 0


def add_self_cka(columns: dict[str, torch.Tensor]) -> None:
    change = (1 - columns["self_cka"]).clamp(min=1e-6).log10() / 3 + 1  # from -1 to 1
    columns["context"] = torch.cat([columns["context"], change.unsqueeze(-1)], dim=-1)


def variants() -> dict[str, Variant]:
    result = {"as shipped": Variant("")}
    for window in (3, 5, 10, 40):
        result[f"window {window}"] = Variant("history", {"window": window})
    for weights_per_unit in (16, 64, 256):
        result[f"{weights_per_unit} samples"] = Variant("history", {"weights_per_unit": weights_per_unit})
    for spacings in ((1,), (2,), (4,), (1, 2, 4)):
        result[f"spacings {', '.join(map(str, spacings))}"] = Variant("history", spacings=spacings)
    for place, name in enumerate(FEATURES):
        result[f"without {name}"] = Variant("quantities of a snapshot", change=partial(blank, "features", (place,)))
    for place, name in enumerate(CONTEXTS):
        result[f"without {name}"] = Variant("context", change=partial(blank, "context", (place,)))
    result["without all context"] = Variant("context", change=partial(blank, "context", range(CONTEXT_SIZE)))
    result["without weights"] = Variant(
        "quantities of a snapshot", change=partial(blank, "features", range(DYNAMICS_SIZE))
    )
    for weights_per_unit in (128, 512):
        result[f"as shipped, shown {weights_per_unit} samples"] = Variant(
            "other input", judged={"weights_per_unit": weights_per_unit}
        )
    for spacing in (2, 4):
        result[f"as shipped, shown spacing {spacing}"] = Variant("other input", judged={"spacings": (spacing,)})
    result["as shipped, not shown the front probe"] = Variant("other input", judged={"probed": False})
    result["without the sum over the front"] = Variant("network", {"front_sum": False})
    result["without attention across units"] = Variant("network", {"unit_attention": False})
    result["half as wide"] = Variant(
        "network", {"encoder_size": 8, "attention_size": 4, "unit_size": 8, "head_size": 8}
    )
    result["twice as wide"] = Variant(
        "network", {"encoder_size": 32, "attention_size": 16, "unit_size": 32, "head_size": 32}
    )
    result["the paper's form: weights themselves"] = Variant("network", {"form": "weights", "front_probe": False})
    result["without the front probe"] = Variant("front probe", {"front_probe": False})
    for name, place in (("what leaves the unit", CONTEXT_SIZE), ("what the model says", CONTEXT_SIZE + len(LAGS))):
        result[f"without {name}"] = Variant(
            "front probe", change=partial(blank, "context", range(place, place + len(LAGS)))
        )
    result["learned as a label"] = Variant("label", target="label")
    result["with self-CKA"] = Variant("extra input", config_class=WithSelfCKA, change=add_self_cka)
    for label in LABELS:
        if label != DEFAULT_LABEL:
            result[f"label {label}"] = Variant("label", label=label, target="label")
    return result


def judge(name: str, runs: Path, file: Path) -> None:
    """Leave each model family out once with one variant, and write its scores."""
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
    scores = summarize(held_out)
    kept = {key: scores[key] for key in ("auc", "ap", "brier", "moment_error", "frozen", "positive")}
    file.write_text(json.dumps({"variant": name, "group": variant.group} | kept))


def table(results: dict) -> str:
    """The results as a Markdown table."""
    header = ["", "", "ROC AUC", "average precision", "Brier score", "moment error", "frozen at a cost of 3 %"]
    keys = ("auc", "ap", "brier", "moment_error")
    rows = [
        [row["group"], row["variant"], *(f"{row[key]:.3f}" for key in keys), f"{row['frozen']:.1%}"]
        for row in results["variants"]
    ]
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder written by `smartfrz harvest`")
    parser.add_argument("--done", type=Path, default=ROOT / "runs" / "ablation", help="folder of finished variants")
    parser.add_argument("--only", help="run only the variants with this text in their name")
    parser.add_argument("--processes", type=int, default=2, help="variants at a time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")
    options = parser.parse_args()
    options.done.mkdir(parents=True, exist_ok=True)
    files = {name: options.done / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}.json" for name in variants()}
    waiting = [name for name in files if not files[name].exists() and (options.only or "") in name]
    run_in_processes(judge, [(name, options.runs, files[name]) for name in waiting], options.processes, "variants")
    finished = [read_json(file) for file in files.values() if file.exists()]
    results = {"variants": finished} | provenance("torch", "transformers", "scikit-learn")
    write_json(options.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
