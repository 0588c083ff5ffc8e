"""
Does it pay? Fine-tunes on tasks that no choice has seen, in full, with the shipped predictor, with a fixed and with a linear
schedule of freezing, and in full with so few steps that it takes as long as with the predictor.

Each run has one thread, so that what it takes is its processor time, whatever runs beside it. Runs that are there already are
not run again.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from safetensors.torch import load_file, save_file
from workers import in_processes, provenance

from smartfrz_hf import SmartFRZCallback, SmartFRZConfig
from smartfrz_hf.predictor_training.specs import RunSpec, read_specs
from smartfrz_hf.predictor_training.tasks import prepare, pretrain

ROOT = Path(__file__).parents[1]
HELD_OUT_ROWS = 4000
WAYS = {
    "full": None,
    "conservative": SmartFRZConfig(operating_point="conservative"),
    "balanced": SmartFRZConfig(operating_point="balanced"),
    "aggressive": SmartFRZConfig(operating_point="aggressive"),
    "static": SmartFRZConfig(policy="static"),
    "linear": SmartFRZConfig(policy="linear"),
}
# Full training with so few steps that it takes as long as another way.
FEWER = {f"as long as {way}": way for way in ("balanced", "aggressive")}


def result_file(folder: Path, spec: RunSpec, way: str) -> Path:
    return folder / f"{spec.name}-{spec.seed}-{way.replace(' ', '_')}.json"


def start_file(folder: Path, spec: RunSpec) -> Path:
    return folder / f"{spec.name}-{spec.seed}-start.safetensors"


def make_start(spec: RunSpec, folder: Path, data_dir: str | None) -> None:
    """Write the backbone that all ways start from."""
    file = start_file(folder, spec)
    save_file({name: value.contiguous() for name, value in pretrain(spec, data_dir).items()}, f"{file}.new")
    Path(f"{file}.new").rename(file)


def run(spec: RunSpec, way: str, folder: Path, data_dir: str | None) -> None:
    """Train in one way, and write what that cost and how good the model is."""
    start = load_file(start_file(folder, spec)) if spec.pretraining else None
    ready = prepare(spec, data_dir, HELD_OUT_ROWS, start)
    steps = full_steps = spec.epochs * -(-len(ready.train) // spec.batch_size)
    config = WAYS.get(way)
    if way in FEWER:
        took = {
            name: json.loads(result_file(folder, spec, name).read_text())["seconds"] for name in ("full", FEWER[way])
        }
        steps = max(1, round(full_steps * min(1, took[FEWER[way]] / took["full"])))
    callback = None if config is None else SmartFRZCallback(config)
    with tempfile.TemporaryDirectory() as output:
        trainer = ready.trainer(spec, output, [] if callback is None else [callback], max_steps=steps)
        begin = time.process_time()
        trainer.train()
        seconds = time.process_time() - begin
        found = ready.score(trainer)
    found |= {"task": spec.name, "seed": spec.seed, "way": way, "steps": steps, "seconds": seconds}
    found |= {"compute": steps / full_steps, "compute_without_cache": steps / full_steps}
    if callback is not None:
        ledger = callback.ledger
        spent, full = ledger.spent, ledger.full
        found["compute"] = spent.total / full.total
        # The cache changes no bit of what is trained: without it, all that differs is that the front runs forward again.
        found["compute_without_cache"] = (full.forward + spent.backward + spent.optimizer) / full.total
        found["freeze_steps"] = ledger.freeze_steps
        found["cache"] = None if ledger.cache is None else {"hit_rate": ledger.cache.hit_rate, "off": ledger.cache.off}
    result_file(folder, spec, way).write_text(json.dumps(found))


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0}


def summarize(runs: list[dict], ways: list[str]) -> dict[str, dict]:
    """
    By task, and over all tasks together, each way's score in points, what it lost against full training, and what it took. A
    way that has not been tried with all seeds is left out.
    """
    full = {(run["task"], run["seed"]): run for run in runs if run["way"] == "full"}

    def entry(part: list[dict]) -> dict[str, dict[str, float]]:
        beside = [full[run["task"], run["seed"]] for run in part]
        return {
            "score": spread([100 * run["score"] for run in part]),
            "difference": spread(
                [100 * (run["score"] - other["score"]) for run, other in zip(part, beside, strict=True)]
            ),
            "seconds": spread([run["seconds"] / other["seconds"] for run, other in zip(part, beside, strict=True)]),
            "compute": spread([run["compute"] for run in part]),
            "compute_without_cache": spread([run["compute_without_cache"] for run in part]),
        }

    def entries(part: list[dict]) -> dict[str, dict]:
        whole = {(run["task"], run["seed"]) for run in part if run["way"] == "full"}
        found = {way: [run for run in part if run["way"] == way] for way in ways}
        return {way: entry(runs) for way, runs in found.items() if {(r["task"], r["seed"]) for r in runs} == whole}

    tasks = list(dict.fromkeys(run["task"] for run in runs))
    return {task: entries([run for run in runs if run["task"] == task]) for task in tasks} | {"all": entries(runs)}


def table(results: dict) -> str:
    """The results as a Markdown table: one line a task and way."""
    lines = [
        "| task | | score | against full | time | compute | compute, no cache |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, ways in results["tasks"].items():
        for way, part in ways.items():
            score = f"{part['score']['mean']:.1f} ± {part['score']['std']:.1f}" if task != "all" else ""
            lost = f"{part['difference']['mean']:+.2f} ± {part['difference']['std']:.2f}" if way != "full" else ""
            costs = " | ".join(f"{part[key]['mean']:.2f}" for key in ("seconds", "compute", "compute_without_cache"))
            lines.append(f"| {task} | {way} | {score} | {lost} | {costs} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--specs", type=Path, default=ROOT / "benchmarks" / "harvest" / "held_out.json", help="JSON list of the tasks"
    )
    parser.add_argument("--data_dir", help="folder of local copies of the data; the Hub when not given")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "held_out", help="folder of finished runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run of each way each")
    parser.add_argument(
        "--ways",
        nargs="+",
        default=["full", "balanced", "static", "linear", "as long as balanced"],
        choices=[*WAYS, *FEWER],
    )
    parser.add_argument("--tasks", nargs="+", help="run these only; results are of all that is finished. Default: all")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time; they share the cores")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "held_out.json", help="results file"
    )
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    specs = [replace(spec, seed=seed) for seed in options.seeds for spec in read_specs(options.specs)]
    wanted = [spec for spec in specs if spec.name in (options.tasks or [spec.name])]
    starts = [(spec, options.runs, options.data_dir) for spec in wanted if spec.pretraining]
    starts = [job for job in starts if not start_file(options.runs, job[0]).exists()]
    in_processes(make_start, starts, options.processes, "pretraining")
    ways = {*options.ways, *(name for way in options.ways if way in FEWER for name in ("full", FEWER[way]))}
    # How few steps are trained in the last way follows from what the others took.
    for part in (WAYS, FEWER):
        jobs = [
            (spec, way, options.runs, options.data_dir)
            for spec in wanted
            for way in part
            if way in ways and not result_file(options.runs, spec, way).exists()
        ]
        in_processes(run, jobs, options.processes, "runs")
    files = [result_file(options.runs, spec, way) for spec in specs for way in [*WAYS, *FEWER]]
    runs = [json.loads(file.read_text()) for file in files if file.exists()]
    results = {
        "seeds": options.seeds,
        "tasks": summarize(runs, [*WAYS, *FEWER]),
        "runs": runs,
    }
    results |= provenance("torch", "transformers", "accelerate")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
