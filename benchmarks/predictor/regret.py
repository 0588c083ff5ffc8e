"""
Which label predicts the cost of a freeze?

Branches real training runs at several steps and depths, freezes there and trains on. Compares the loss (as a share of what
training gained) and the accuracy that each freeze cost with each label. A branch continues a checkpoint of the full run with
the same optimizer, data order and random numbers, so that the freeze is the only difference. Branches that exist are not run
again.
"""

import argparse
import json
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from transformers import TrainerCallback

from benchmarks.utils import ROOT, markdown_table, provenance, read_json, run_in_processes, write_json
from smartfrz_hf import SmartFRZCallback, SmartFRZConfig
from smartfrz_hf.predictor_training.labels import at_probes, rewind_cost
from smartfrz_hf.predictor_training.recording import RecordingCallback
from smartfrz_hf.predictor_training.specs import RunSpec, read_specs
from smartfrz_hf.predictor_training.tasks import prepare

HERE = Path(__file__).parent
MOMENTS = (0.15, 0.35, 0.65)


class CheckpointAtMoments(TrainerCallback):
    """Saves a checkpoint at each moment in `MOMENTS`."""

    def __init__(self):
        self.steps: list[int] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = [max(1, round(moment * state.max_steps)) for moment in MOMENTS]

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


def full(spec: RunSpec, folder: Path, data_dir: str | None) -> None:
    """The full run: write its checkpoints, labels and scores."""
    ready = prepare(spec, data_dir)
    checkpoints = CheckpointAtMoments()
    recorder = RecordingCallback(ready.probe, probes=24)
    trainer = ready.trainer(
        spec, str(folder / "checkpoints"), [recorder, checkpoints], save_strategy="steps", save_steps=10**9
    )
    trainer.train()
    summary = ready.score(trainer)
    save_file(recorder.result(), folder / "run.safetensors")
    summary |= {"steps": checkpoints.steps, "max_steps": trainer.state.max_steps, "units": recorder.names}
    (folder / "full.json").write_text(json.dumps(summary))


def branch(spec: RunSpec, folder: Path, data_dir: str | None, step: int, depth: int) -> None:
    """Continue from a checkpoint with the front frozen."""
    ready = prepare(spec, data_dir)
    checkpoint = str(folder / "checkpoints" / f"checkpoint-{step}")
    freeze = SmartFRZCallback(SmartFRZConfig(policy="static", static_depth=depth))
    freeze.resume_from = checkpoint
    with tempfile.TemporaryDirectory() as output:
        trainer = ready.trainer(spec, output, [freeze])
        trainer.train(resume_from_checkpoint=checkpoint)
        scores = ready.score(trainer)
    (folder / f"branch-{step}-{depth}.json").write_text(json.dumps(scores | {"step": step, "depth": depth}))


def labels_at(tensors: dict[str, torch.Tensor], step: int, depth: int) -> dict[str, float]:
    """Each label for freezing the front at a step. A higher value means that freezing is safer."""
    probes, moments = tensors["probe_steps"], tensors["rewind_steps"]
    probe = int((probes - step).abs().argmin())
    cost = rewind_cost(tensors["rewind_losses"], *tensors["rewind_range"].tolist())
    cost, shifts = (at_probes(values, moments, probes)[:, depth - 1] for values in (cost, tensors["rewind_shifts"]))
    labels = {}
    for name in ("cka", "token_cka"):
        cka = tensors[name][:, :depth]
        labels[name] = float(cka[probe:].min())
        labels[f"{name}_change_left"] = -float(((1 - cka[probe:]) / (1 - cka[0]).clamp(min=1e-6)).max())
    return labels | {
        "rewind_cost": -float(cost[probe]),
        "rewind_cost_from_now_on": -float(cost[probe:].max()),
        "rewind_shift": -float(shifts[probe]),
        "rewind_shift_from_now_on": -float(shifts[probe:].max()),
        "progress": step / int(probes[-1]),
        "depth": -depth,
    }


def correlation(rows: list[dict], label: str, regret: str) -> float:
    """Rank correlation between how unsafe each freeze is by a label and what it cost."""
    return float(spearmanr([-row["labels"][label] for row in rows], [row[regret] for row in rows])[0])


def shift_table(results: dict) -> str:
    """Points lost by freezes, grouped by their rewind shift, as a Markdown table."""
    rows = []
    for least, most in pairwise((0, 0.01, 0.03, 0.1, 0.3, 1)):
        lost = [
            100 * row["regret_score"]
            for row in results["rows"]
            if row["depth"] and least <= -row["labels"]["rewind_shift"] < most
        ]
        rows.append([f"{least:.0%} to {most:.0%}", len(lost), f"{np.mean(lost):+.1f}"])
    return markdown_table(["rewind shift", "freezes", "points lost, mean"], rows)


def correlation_table(results: dict) -> str:
    """The rank correlations as a Markdown table, best first."""
    header = ["label", "loss, all runs", "loss, within a run", "score, all runs", "score, within a run"]
    by_label = sorted(results["rank_correlation"].items(), key=lambda item: -item[1]["regret_loss"]["mean_over_runs"])
    rows = []
    for label, by in by_label:
        values = [by[regret][over] for regret in ("regret_loss", "regret_score") for over in ("all", "mean_over_runs")]
        rows.append([label.replace("_", " "), *(f"{value:.2f}" for value in values)])
    return markdown_table(header, rows)


def regret_table(results: dict) -> str:
    """The cost of each freeze and some of its labels, as a Markdown table."""
    shown = ("cka", "cka_change_left", "rewind_cost", "rewind_shift")
    header = ["run", "step", "frozen units", "loss lost", "score lost", "CKA", "change left", "rewind cost"]
    rows = []
    for row in results["rows"]:
        labels = [f"{abs(row['labels'][label]):.3f}" for label in shown] if row["depth"] else [""] * len(shown)
        cost = [f"{row['regret_loss']:+.1%}", f"{100 * row['regret_score']:+.1f}"]
        rows.append([row["run"], row["step"], row["depth"], *cost, *labels])
    return markdown_table([*header, "rewind shift"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", type=Path, default=HERE / "run_lists" / "regret.json", help="JSON list of the runs")
    parser.add_argument("--data_dir", help="folder with local copies of the data; default: the Hub")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "regret", help="folder of finished branches")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time; they share the cores")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "labels.json", help="results file")
    options = parser.parse_args()
    specs = read_specs(options.specs)
    for spec in specs:
        (options.runs / spec.name).mkdir(parents=True, exist_ok=True)
    jobs = [
        (spec, options.runs / spec.name, options.data_dir)
        for spec in specs
        if not (options.runs / spec.name / "full.json").exists()
    ]
    run_in_processes(full, jobs, options.processes, "full runs")
    jobs = []
    for spec in specs:
        folder = options.runs / spec.name
        summary = read_json(folder / "full.json")
        units = len(summary["units"])
        depths = sorted({round(units * share) for share in (0.3, 0.6, 0.9)})
        branches = [(step, depth) for step in summary["steps"] for depth in depths]
        # A branch at depth 0 freezes nothing, and has to end where the full run ended.
        for step, depth in [(summary["steps"][1], 0), *branches]:
            if not (folder / f"branch-{step}-{depth}.json").exists():
                jobs.append((spec, folder, options.data_dir, step, depth))
    run_in_processes(branch, jobs, options.processes, "branches")

    rows, by_run = [], []
    for spec in specs:
        folder = options.runs / spec.name
        summary, tensors = read_json(folder / "full.json"), load_file(folder / "run.safetensors")
        gained = float(tensors["rewind_range"][0]) - summary["loss"]
        part = []
        for file in sorted(folder.glob("branch-*.json")):
            end = read_json(file)
            row = {"run": spec.name, "step": end["step"], "depth": end["depth"]}
            row["regret_loss"] = (end["loss"] - summary["loss"]) / gained
            row["regret_score"] = summary["score"] - end["score"]
            if end["depth"]:
                part.append(row | {"labels": labels_at(tensors, end["step"], end["depth"])})
            else:
                rows.append(row)
        rows, by_run = rows + part, [*by_run, part]
    correlations = {
        label: {
            regret: {
                "all": correlation([row for part in by_run for row in part], label, regret),
                "mean_over_runs": float(np.mean([correlation(part, label, regret) for part in by_run])),
            }
            for regret in ("regret_loss", "regret_score")
        }
        for label in by_run[0][0]["labels"]
    }
    results = {"moments": MOMENTS, "rank_correlation": correlations, "rows": rows} | provenance()
    write_json(options.out, results)
    print(correlation_table(results))


if __name__ == "__main__":
    main()
