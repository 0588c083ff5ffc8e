"""
How much of the held-out tasks could have been frozen, and how much of that does the shipped predictor find?

Records full training runs as `smartfrz harvest` does, with the label that needs the end of the run (the rewind test). The
predictor's decisions are read off the recordings by its threshold alone: the policy's rule for the first fifth of a run does
not apply. Runs that exist are not run again.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.special import expit

from benchmarks.utils import ROOT, markdown_table, provenance, spread, write_json
from smartfrz_hf.predictor import SmartFRZPredictor
from smartfrz_hf.predictor_training.cross_validation import PREDICTOR, HeldOut, logits
from smartfrz_hf.predictor_training.dataset import FreezingStages
from smartfrz_hf.predictor_training.harvest import harvest
from smartfrz_hf.predictor_training.metrics import COSTS, path_cost, ranking
from smartfrz_hf.predictor_training.specs import read_specs
from smartfrz_hf.predictor_training.table import read_runs

HERE = Path(__file__).parent
POINTS = ("balanced", "aggressive")
LABEL = "rewind-shift-0.03"


def judge(held_out: HeldOut, thresholds: dict[str, float]) -> dict:
    """For the runs of one task: the share that could be frozen at each cost, what the predictor freezes, and its cost."""
    active, score = held_out.active, held_out.scores[PREDICTOR]
    kept = held_out.stages.columns["targets"].numpy()
    result: dict = {"runs": len(held_out.stages.runs), "converged": float(held_out.labels[active].mean())}
    result |= ranking(held_out.labels[active], score[active])

    def frozen_share(moments: np.ndarray) -> dict[str, float]:
        return spread(np.nanmean(1 - moments, axis=1).tolist())

    result["possible"] = {name: frozen_share(held_out.moments(kept >= 1 - COSTS[name])) for name in POINTS}
    chosen = {name: held_out.moments(expit(score) >= thresholds[name]) for name in POINTS}
    result["frozen"] = {name: frozen_share(moments) for name, moments in chosen.items()}
    result["cost"] = {name: float(path_cost(held_out, moments).mean()) for name, moments in chosen.items()}
    return result


def table(results: dict) -> str:
    """The results as a Markdown table with one row per task."""
    header = ["task", "ROC AUC", "average precision", *(f"could be frozen at {COSTS[name]:.0%}" for name in POINTS)]
    header += [column for name in POINTS for column in (f"frozen by `{name}`", "at a cost of")]
    rows = []
    for task, part in results["tasks"].items():
        cells = [task, f"{part['auc']:.3f}", f"{part['ap']:.3f}"]
        cells += [f"{part['possible'][name]['mean']:.0%} ± {part['possible'][name]['std']:.0%}" for name in POINTS]
        for name in POINTS:
            frozen = part["frozen"][name]
            cells += [f"{frozen['mean']:.0%} ± {frozen['std']:.0%}", f"{part['cost'][name]:.1%}"]
        rows.append(cells)
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--specs", type=Path, default=HERE / "run_lists" / "held_out.json", help="JSON list of the tasks"
    )
    parser.add_argument("--data_dir", help="folder with local copies of the data; default: the Hub")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "headroom", help="folder of recorded runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds; each task runs once per seed")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time; they share the cores")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "headroom.json", help="results file")
    options = parser.parse_args()
    tasks = read_specs(options.specs)
    specs = [replace(spec, name=f"{spec.name}-{seed}", seed=seed) for seed in options.seeds for spec in tasks]
    failures = harvest(specs, options.runs, options.data_dir, options.processes)
    if failures:
        sys.exit("\n".join(failures))
    predictor = SmartFRZPredictor.from_pretrained(ROOT / "predictor_weights" / "smartfrz-base")
    runs, results_by_task = read_runs(options.runs), {}
    for task in tasks:
        names = {f"{task.name}-{seed}" for seed in options.seeds}
        stages = FreezingStages([run for run in runs if run.name in names], predictor.config, LABEL)
        held_out = HeldOut(stages, np.full(len(stages), task.name), {PREDICTOR: logits(predictor, stages)})
        results_by_task[task.name] = judge(held_out, predictor.config.operating_points)
    results = {"seeds": options.seeds, "label": LABEL, "tasks": results_by_task} | provenance()
    write_json(options.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
