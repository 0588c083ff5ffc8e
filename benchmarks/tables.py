"""
Rebuild the tables in README.md, in docs/ and in the method card from the results files: `python -m benchmarks.tables`.

A page marks each table with `<!-- table: NAME -->` and `<!-- end -->`.
"""

import re
import sys
from collections.abc import Callable

from smartfrz_hf.predictor_training.card import point_table, score_table

from .predictor import ablation, regret
from .quality import demo
from .quality.compare import headline
from .quality.compare.report import summary_table
from .speed import ddp_bytes, estimate, gpu, step_time
from .utils import ROOT, read_json

PAGES = tuple(
    ROOT / page
    for page in (
        "README.md",
        "docs/benchmarks.md",
        "docs/distributed.md",
        "docs/estimate.md",
        "benchmarks/predictor/method_card.md",
    )
)
TWELVE_TASKS = {
    "full-50": "half of the steps",
    "static-33": "the first third of the units frozen",
    "static-50": "the first half of the units frozen",
    "smartfrz-conservative": "`conservative`",
    "smartfrz-balanced": "up to half of the blocks from the start",
    "smartfrz-aggressive": "up to 84 % of the blocks from the start",
}
NEW_TASKS = {
    "smartfrz-aggressive": "`aggressive`",
    "smartfrz-balanced": "`balanced`",
    "static-50-rate1.7": "the first half of the units frozen, 1.7 times the rate",
    "full-65-rate1.7": "65 % of the steps, 1.7 times the rate",
    "lora-8": "LoRA, `r` 8, 10 times the rate",
    "autofreeze": "AutoFreeze",
    "egeria": "Egeria",
}
THRESHOLDS = {
    "smartfrz-balanced": "0.99 (`balanced`)",
    "smartfrz-t86": "0.86 (`aggressive`)",
    "smartfrz-t60": "0.6",
    "smartfrz-h60": "0.6, and nothing before half of the run",
    "linear": "`linear`, from half of the run on",
}
# Name of the table: the results file, and the function that turns its content into Markdown.
TABLES: dict[str, tuple[str, Callable[[dict], str]]] = {
    "ablation": ("predictor/results/ablation", ablation.table),
    "compared": ("quality/compare/summary", headline.table),
    "compared, seen data": ("quality/compare/summary", lambda known: headline.table(known, seen=True)),
    "compared, conditions": ("quality/compare/summary", headline.conditions),
    "ddp bytes": ("speed/results/ddp_bytes", ddp_bytes.table),
    "demo": ("quality/results/demo", demo.section),
    "equal accuracy": ("quality/compare/summary", headline.equal_accuracy),
    "estimate": ("speed/results/estimate", estimate.table),
    "estimate, text": ("speed/results/estimate", estimate.example_text),
    "fewer steps": ("quality/compare/summary", headline.fewer_steps),
    "from scratch": ("quality/compare/summary", lambda known: headline.by_method(known, "scratch")),
    "gpu runs": ("quality/compare/gpu_alone/summary", lambda known: headline.by_method(known, "fine-tuning")),
    "gpu steps": ("speed/results/gpu", gpu.table),
    "higher rate": ("quality/compare/higher_rate/summary", lambda known: headline.by_method(known, "fine-tuning")),
    "held-out families": ("predictor/results/predictor", lambda results: score_table(results["leave_one_family_out"])),
    "held-out tasks": ("predictor/results/predictor", lambda results: score_table(results["leave_one_task_out"])),
    "language models": ("quality/compare/summary", lambda known: headline.by_method(known, "language")),
    "methods": ("quality/compare/summary", headline.methods),
    "minilm on new data": ("quality/compare/minilm_new/summary", lambda results: summary_table(results, NEW_TASKS)),
    "mobilenet": (
        "quality/compare/mobilenet_gpu/summary",
        lambda known: headline.by_method(known, "scratch", times=False),
    ),
    "operating points": ("predictor/results/predictor", lambda results: point_table(results["operating_points"])),
    "points by operating point": ("quality/compare/summary", headline.operating_points),
    "readme figures": ("quality/compare/summary", headline.figures),
    "six epochs": (
        "quality/compare/summary",
        lambda known: headline.by_method(known, "fine-tuning", epochs=headline.MOST_EPOCHS + 1),
    ),
    "smollm2 on a gpu": ("quality/compare/smollm2_gpu/summary", lambda results: summary_table(results, NEW_TASKS)),
    "step times, minilm": ("speed/results/step_time", lambda results: step_time.table(results["models"]["minilm"])),
    "step times, vit": ("speed/results/step_time", lambda results: step_time.table(results["models"]["vit"], 3)),
    "tagging": ("quality/compare/summary", lambda known: headline.by_method(known, "tags")),
    "thresholds from scratch": (
        "quality/compare/from_scratch/summary",
        lambda results: summary_table(results, THRESHOLDS),
    ),
    "twelve tasks": ("quality/compare/gpu/summary", lambda results: summary_table(results, TWELVE_TASKS)),
    "regret": ("predictor/results/labels", regret.regret_table),
    "regret by shift": ("predictor/results/labels", regret.shift_table),
    "regret by label": ("predictor/results/labels", regret.correlation_table),
}


def results_of(name: str) -> dict:
    """Content of a results file, by its path below `benchmarks/` without the extension."""
    return read_json(ROOT / "benchmarks" / f"{name}.json")


def fill(text: str) -> str:
    """The text of a page with each of its tables rebuilt."""

    def rebuild(match: re.Match) -> str:
        name, make_table = TABLES[match["name"]]
        return f"<!-- table: {match['name']} -->\n\n{make_table(results_of(name))}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (?P<name>[^>]+) -->.*?<!-- end -->", rebuild, text, flags=re.DOTALL)


def main() -> None:
    for page in PAGES:
        page.write_text(fill(page.read_text()))
    sys.stdout.write(f"Rebuilt the tables in {', '.join(page.name for page in PAGES)}.\n")


if __name__ == "__main__":
    main()
