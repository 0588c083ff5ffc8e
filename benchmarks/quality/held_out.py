"""
Does freezing pay on tasks that no design choice has seen?

Fine-tunes in full, with the shipped predictor, with a fixed prefix, with a linear schedule, and in full with so few steps that
training takes as long as with the predictor. Each run has one thread, so that its time is its processor time, whatever runs
beside it. Runs that exist are not run again.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.utils import ROOT, markdown_table, provenance, read_json, run_in_processes, spread, write_json
from smartfrz_hf import SmartFRZCallback, SmartFRZConfig
from smartfrz_hf.predictor_training.specs import RunSpec, read_specs
from smartfrz_hf.predictor_training.tasks import prepare, pretrain

HERE = Path(__file__).parent
HELD_OUT_ROWS = 4000
METHODS = {
    "full": None,
    "conservative": SmartFRZConfig(operating_point="conservative"),
    "balanced": SmartFRZConfig(operating_point="balanced"),
    "aggressive": SmartFRZConfig(operating_point="aggressive"),
    "static": SmartFRZConfig(policy="static"),
    "linear": SmartFRZConfig(policy="linear"),
}
# Full training with so few steps that it takes as long as another method.
SHORTENED = {f"as long as {method}": method for method in ("balanced", "aggressive")}


def result_file(folder: Path, spec: RunSpec, method: str) -> Path:
    return folder / f"{spec.name}-{spec.seed}-{method.replace(' ', '_')}.json"


def start_file(folder: Path, spec: RunSpec) -> Path:
    return folder / f"{spec.name}-{spec.seed}-start.safetensors"


def make_start(spec: RunSpec, folder: Path, data_dir: str | None) -> None:
    """Write the pretrained backbone that all methods start from."""
    file = start_file(folder, spec)
    save_file({name: value.contiguous() for name, value in pretrain(spec, data_dir).items()}, f"{file}.new")
    Path(f"{file}.new").rename(file)


def run(spec: RunSpec, method: str, folder: Path, data_dir: str | None) -> None:
    """Train with one method, and write its score, time and compute."""
    start = load_file(start_file(folder, spec)) if spec.pretraining else None
    ready = prepare(spec, data_dir, HELD_OUT_ROWS, start)
    steps = full_steps = spec.epochs * -(-len(ready.train) // spec.batch_size)
    config = METHODS.get(method)
    if method in SHORTENED:
        other = SHORTENED[method]
        seconds_of = {name: read_json(result_file(folder, spec, name))["seconds"] for name in ("full", other)}
        steps = max(1, round(full_steps * min(1, seconds_of[other] / seconds_of["full"])))
    callback = None if config is None else SmartFRZCallback(config)
    with tempfile.TemporaryDirectory() as output:
        trainer = ready.trainer(spec, output, [] if callback is None else [callback], max_steps=steps)
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
        result = ready.score(trainer)
    result |= {"task": spec.name, "seed": spec.seed, "way": method, "steps": steps, "seconds": seconds}
    result |= {"compute": steps / full_steps, "compute_without_cache": steps / full_steps}
    if callback is not None:
        ledger = callback.ledger
        spent, full = ledger.spent, ledger.full
        result["compute"] = spent.total / full.total
        # The cache changes no weight by a single bit; without it, only the forward passes of the frozen front are added.
        result["compute_without_cache"] = (full.forward + spent.backward + spent.optimizer) / full.total
        result["freeze_steps"] = ledger.freeze_steps
        cache = ledger.cache
        result["cache"] = None if cache is None else {"hit_rate": cache.hit_rate, "off": cache.off}
    result_file(folder, spec, method).write_text(json.dumps(result))


def summarize(runs: list[dict], methods: list[str]) -> dict[str, dict]:
    """
    Score in points, difference from full training, time and compute of each method, by task and over all tasks.

    A method that was not run with every seed is left out.
    """
    full = {(run["task"], run["seed"]): run for run in runs if run["way"] == "full"}

    def entry(part: list[dict]) -> dict[str, dict[str, float]]:
        pairs = [(run, full[run["task"], run["seed"]]) for run in part]
        return {
            "score": spread([100 * run["score"] for run in part]),
            "difference": spread([100 * (run["score"] - other["score"]) for run, other in pairs]),
            "seconds": spread([run["seconds"] / other["seconds"] for run, other in pairs]),
            "compute": spread([run["compute"] for run in part]),
            "compute_without_cache": spread([run["compute_without_cache"] for run in part]),
        }

    def entries(part: list[dict]) -> dict[str, dict]:
        all_seeds = {(run["task"], run["seed"]) for run in part if run["way"] == "full"}
        by_method = {method: [run for run in part if run["way"] == method] for method in methods}
        return {
            method: entry(chosen)
            for method, chosen in by_method.items()
            if {(run["task"], run["seed"]) for run in chosen} == all_seeds
        }

    tasks = list(dict.fromkeys(run["task"] for run in runs))
    return {task: entries([run for run in runs if run["task"] == task]) for task in tasks} | {"all": entries(runs)}


def table(results: dict) -> str:
    """The results as a Markdown table with one row per task and method."""
    rows = []
    for task, methods in results["tasks"].items():
        for method, part in methods.items():
            score = f"{part['score']['mean']:.1f} ± {part['score']['std']:.1f}" if task != "all" else ""
            difference = part["difference"]
            lost = f"{difference['mean']:+.2f} ± {difference['std']:.2f}" if method != "full" else ""
            costs = [f"{part[key]['mean']:.2f}" for key in ("seconds", "compute", "compute_without_cache")]
            rows.append([task, method, score, lost, *costs])
    return markdown_table(["task", "", "score", "against full", "time", "compute", "compute, no cache"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--specs", type=Path, default=HERE / "run_lists" / "held_out.json", help="JSON list of the tasks"
    )
    parser.add_argument("--data_dir", help="folder with local copies of the data; default: the Hub")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "held_out", help="folder of finished runs")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds; each method runs once per seed"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["full", "balanced", "static", "linear", "as long as balanced"],
        choices=[*METHODS, *SHORTENED],
        help="methods to compare",
    )
    parser.add_argument(
        "--tasks", nargs="+", help="tasks to run; the results file holds all finished ones. Default: all"
    )
    parser.add_argument("--processes", type=int, default=2, help="runs at a time; they share the cores")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "held_out.json", help="results file")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    specs = [replace(spec, seed=seed) for seed in options.seeds for spec in read_specs(options.specs)]
    wanted = [spec for spec in specs if spec.name in (options.tasks or [spec.name])]
    starts = [(spec, options.runs, options.data_dir) for spec in wanted if spec.pretraining]
    starts = [job for job in starts if not start_file(options.runs, job[0]).exists()]
    run_in_processes(make_start, starts, options.processes, "pretraining")
    methods = set(options.methods)
    methods |= {name for method in options.methods if method in SHORTENED for name in ("full", SHORTENED[method])}
    # The shortened runs take their number of steps from the times of the others, so they come second.
    for part in (METHODS, SHORTENED):
        jobs = [
            (spec, method, options.runs, options.data_dir)
            for spec in wanted
            for method in part
            if method in methods and not result_file(options.runs, spec, method).exists()
        ]
        run_in_processes(run, jobs, options.processes, "runs")
    files = [result_file(options.runs, spec, method) for spec in specs for method in [*METHODS, *SHORTENED]]
    runs = [read_json(file) for file in files if file.exists()]
    results = {"seeds": options.seeds, "tasks": summarize(runs, [*METHODS, *SHORTENED]), "runs": runs} | provenance()
    write_json(options.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
