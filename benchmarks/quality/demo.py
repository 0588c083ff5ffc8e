"""
Repeat the demo with several seeds: `make bench-demo`.

Each seed fine-tunes MiniLM on two classes of STS-B twice, without and with SmartFRZ. A seed whose summary exists is not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.utils import ROOT, example, markdown_table, provenance, read_json, spread, write_json

RESULTS = Path(__file__).parent / "results" / "demo.json"


def section(results: dict) -> str:
    """What docs/benchmarks.md says of the demo, in Markdown."""
    first, seeds = results["runs"][0], [run["seed"] for run in results["runs"]]
    plain, ours, change = (
        {k: 100 * v for k, v in results[f"accuracy_{key}"].items()} for key in ("plain", "smartfrz", "difference")
    )

    def with_spread(value: dict[str, float], sign: str = "") -> str:
        return f"{value['mean']:{sign}.2f} ± {value['std']:.2f}"

    rows = [["accuracy, %", with_spread(plain), with_spread(ours)]]
    for name, key in (("training time, relative", "train_seconds"), ("backward compute, relative", "backward_flops")):
        rows.append([name, "1", with_spread(results[f"{key}_ratio"])])
    return "\n\n".join(
        [
            f"On {first['train_rows']:,} training pairs and seed {first['seed']} it printed:",
            f"```text\n{example('demo').table(first)}\n```",
            f"Over the seeds {', '.join(map(str, seeds))}, mean and standard deviation (`make bench-demo`):",
            markdown_table(["", "plain", "SmartFRZ"], rows),
            f"The difference in accuracy, seed by seed, is {with_spread(change, '+')} points.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], help="seeds, at least two")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench-demo", help="folder of finished runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")
    options = parser.parse_args()
    if len(options.seeds) < 2:
        parser.error("--seeds needs at least two seeds: one gives no standard deviation")
    summaries = []
    for seed in options.seeds:
        file = options.runs / str(seed) / "summary.json"
        if not file.exists():
            arguments = ["--seed", str(seed), "--output_dir", str(file.parent)]
            subprocess.run([sys.executable, ROOT / "examples" / "demo.py", *arguments], check=True)
        summaries.append({"seed": seed, **read_json(file)})
    pairs = [(summary["plain"], summary["smartfrz"]) for summary in summaries]

    def ratio(key: str) -> dict[str, float]:
        return spread([smartfrz[key] / plain[key] for plain, smartfrz in pairs])

    results = {
        "task": "stsb, two classes",
        "accuracy_plain": spread([plain["accuracy"] for plain, _ in pairs]),
        "accuracy_smartfrz": spread([smartfrz["accuracy"] for _, smartfrz in pairs]),
        "accuracy_difference": spread([smartfrz["accuracy"] - plain["accuracy"] for plain, smartfrz in pairs]),
        "train_seconds_ratio": ratio("train_seconds"),
        "forward_flops_ratio": ratio("forward_flops"),
        "backward_flops_ratio": ratio("backward_flops"),
        "runs": summaries,
        **provenance(),
    }
    write_json(options.out, results)
    print(json.dumps({key: value for key, value in results.items() if key != "runs"}, indent=2))


if __name__ == "__main__":
    main()
