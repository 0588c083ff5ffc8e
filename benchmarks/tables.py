"""Puts the tables of README.md and method_card.md in their places, made from the files under `results/`."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import ablation
import ddp_bytes
import headroom
import held_out
import regret

from smartfrz_hf.predictor_training.card import point_table, score_table

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "method_card.md")
# By name of the table: the results file, and what makes the table of it.
TABLES: dict[str, tuple[str, Callable[[dict], str]]] = {
    "ablation": ("ablation", ablation.table),
    "ddp bytes": ("ddp_bytes", ddp_bytes.table),
    "headroom": ("headroom", headroom.table),
    "held-out families": ("predictor", lambda found: score_table(found["leave_one_family_out"])),
    "held-out tasks": ("predictor", lambda found: score_table(found["leave_one_task_out"])),
    "held-out runs": ("held_out", held_out.table),
    "operating points": ("predictor", lambda found: point_table(found["operating_points"])),
    "regret": ("labels", regret.regret_table),
    "regret by shift": ("labels", regret.shift_table),
    "regret by label": ("labels", regret.correlation_table),
}


def results_of(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def fill(text: str) -> str:
    """A page with each table, between `<!-- table: NAME -->` and `<!-- end -->`, made anew."""

    def table(found: re.Match) -> str:
        name, make = TABLES[found["name"]]
        return f"<!-- table: {found['name']} -->\n\n{make(results_of(name))}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (?P<name>[^>]+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    for page in PAGES:
        page.write_text(fill(page.read_text()))
    sys.stdout.write(f"{', '.join(page.name for page in PAGES)}: tables made from benchmarks/results\n")


if __name__ == "__main__":
    main()
