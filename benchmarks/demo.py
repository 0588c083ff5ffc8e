"""Repeat the demo over seeds: `make bench-demo`. A seed whose summary is there already is not run again."""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[42, 43, 44], help="one plain and one SmartFRZ run each"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench-demo", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "demo.json", help="results file")
    options = parser.parse_args()
    if len(options.seeds) < 2:
        parser.error("--seeds needs at least two: a spread cannot be had from one")
    summaries = []
    for seed in options.seeds:
        file = options.runs / str(seed) / "summary.json"
        if not file.exists():
            words = ["--seed", str(seed), "--output_dir", str(file.parent)]
            subprocess.run([sys.executable, ROOT / "examples" / "demo.py", *words], check=True)
        summaries.append({"seed": seed, **json.loads(file.read_text())})
    plain, ours = [s["plain"] for s in summaries], [s["smartfrz"] for s in summaries]

    def ratio(key: str) -> dict[str, float]:
        return spread([b[key] / a[key] for a, b in zip(plain, ours, strict=True)])

    result = {
        "task": "stsb",
        "spearman_plain": spread([run["spearman"] for run in plain]),
        "spearman_smartfrz": spread([run["spearman"] for run in ours]),
        "spearman_difference": spread([b["spearman"] - a["spearman"] for a, b in zip(plain, ours, strict=True)]),
        "train_seconds_ratio": ratio("train_seconds"),
        "forward_flops_ratio": ratio("forward_flops"),
        "backward_flops_ratio": ratio("backward_flops"),
        "runs": summaries,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "machine": {"architecture": platform.machine(), "python": platform.python_version()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2))


if __name__ == "__main__":
    main()
