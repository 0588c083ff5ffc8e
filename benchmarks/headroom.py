"""
How much could have been frozen on the held-out tasks, had it been known, and what does the shipped predictor say of them?

Records the full runs as a harvest does, with the label that needs their end: the rewind test. What the predictor freezes is
read off the recordings by its threshold alone, without the policy's rule for the first fifth of a run. Runs that are there
already are not run again.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from scipy.special import expit
from workers import provenance

from smartfrz_hf.predictor import SmartFRZPredictor
from smartfrz_hf.predictor_training.cross_validation import PREDICTOR, HeldOut, logits
from smartfrz_hf.predictor_training.dataset import FreezingStages
from smartfrz_hf.predictor_training.harvest import harvest
from smartfrz_hf.predictor_training.metrics import COSTS, path_cost, ranking
from smartfrz_hf.predictor_training.specs import read_specs
from smartfrz_hf.predictor_training.table import read_runs

ROOT = Path(__file__).parents[1]
POINTS = ("balanced", "aggressive")
LABEL = "rewind-shift-0.03"


def judge(held_out: HeldOut, thresholds: dict[str, float]) -> dict:
    """Of the runs of one task: what could be frozen at each cost, and what the predictor freezes, at which cost."""
    active, score = held_out.active, held_out.scores[PREDICTOR]
    kept = held_out.stages.columns["targets"].numpy()
    found: dict = {"runs": len(held_out.stages.runs), "converged": float(held_out.labels[active].mean())}
    found |= ranking(held_out.labels[active], score[active])

    def frozen(moments: np.ndarray) -> dict[str, float]:
        shares = np.nanmean(1 - moments, axis=1).tolist()
        return {"mean": mean(shares), "std": stdev(shares) if len(shares) > 1 else 0.0}

    found["possible"] = {name: frozen(held_out.moments(kept >= 1 - COSTS[name])) for name in POINTS}
    chosen = {name: held_out.moments(expit(score) >= thresholds[name]) for name in POINTS}
    found["frozen"] = {name: frozen(moments) for name, moments in chosen.items()}
    found["cost"] = {name: float(path_cost(held_out, moments).mean()) for name, moments in chosen.items()}
    return found


def table(results: dict) -> str:
    """The results as a Markdown table: one line a task."""
    costs = [f"could be frozen at {COSTS[name]:.0%}" for name in POINTS]
    chosen = [f"frozen by `{name}` | at a cost of" for name in POINTS]
    heads = ["task", "ROC AUC", "average precision", *costs, *chosen]
    lines = [f"| {' | '.join(heads)} |", "|---" * (len(heads) + len(POINTS)) + "|"]
    for task, part in results["tasks"].items():
        cells = [task, f"{part['auc']:.3f}", f"{part['ap']:.3f}"]
        cells += [f"{part['possible'][name]['mean']:.0%} ± {part['possible'][name]['std']:.0%}" for name in POINTS]
        for name in POINTS:
            cells += [
                f"{part['frozen'][name]['mean']:.0%} ± {part['frozen'][name]['std']:.0%}",
                f"{part['cost'][name]:.1%}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--specs", type=Path, default=ROOT / "benchmarks" / "harvest" / "held_out.json", help="JSON list of the tasks"
    )
    parser.add_argument("--data_dir", help="folder of local copies of the data; the Hub when not given")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "headroom", help="folder of recorded runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run of each task each")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time; they share the cores")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "headroom.json", help="results file"
    )
    options = parser.parse_args()
    tasks = read_specs(options.specs)
    specs = [replace(spec, name=f"{spec.name}-{seed}", seed=seed) for seed in options.seeds for spec in tasks]
    failures = harvest(specs, options.runs, options.data_dir, options.processes)
    if failures:
        sys.exit("\n".join(failures))
    predictor = SmartFRZPredictor.from_pretrained(ROOT / "predictor_weights" / "smartfrz-base")
    runs, found = read_runs(options.runs), {}
    for task in tasks:
        names = {f"{task.name}-{seed}" for seed in options.seeds}
        stages = FreezingStages([run for run in runs if run.name in names], predictor.config, LABEL)
        held_out = HeldOut(stages, np.full(len(stages), task.name), {PREDICTOR: logits(predictor, stages)})
        found[task.name] = judge(held_out, predictor.config.operating_points)
    results = {"seeds": options.seeds, "label": LABEL, "tasks": found} | provenance(
        "torch", "transformers", "accelerate"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
