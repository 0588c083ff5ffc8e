"""
Prints what the harvest has come to: for each pair, points and held-out loss of the full run, and what each frozen run lost
against it; then how the signals of the full runs rank the depths and the pairs.
"""

import argparse
import json
from collections.abc import Iterator
from math import inf, isfinite, log
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import spearmanr

HERE = Path(__file__).parent
LOST = 1.0  # points (or what amounts to it in loss) up to which a depth counts as safe
Result = dict[str, Any]


def read(folder: Path) -> dict[str, dict[int | None, Result]]:
    """Results by pair, then by frozen blocks, with None for the full run."""
    found: dict[str, dict[int | None, Result]] = {}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault(result["pair"]["name"], {})[result["frozen_blocks"]] = result
    return found


def last(result: Result) -> dict[str, float]:
    """The evaluation at the end."""
    return result["evaluations"][-1]


def losses(runs: dict[int | None, Result]) -> Iterator[tuple[int, float, float]]:
    """Frozen blocks, points lost and held-out loss added against the full run."""
    full = last(runs[None])
    for blocks in sorted(blocks for blocks in runs if blocks is not None):
        frozen = last(runs[blocks])
        yield blocks, full["points"] - frozen["points"], frozen["loss"] - full["loss"]


def safe_share(runs: dict[int | None, Result], points: float = LOST) -> float:
    """The deepest share of the blocks up to which no run lost more; -1/blocks where not even the stem may freeze."""
    safe = -1
    for blocks, lost, added in losses(runs):
        if lost > points and added > 0:
            break
        safe = blocks
    return safe / runs[None]["blocks"]


def signals(full: Result) -> Iterator[tuple[str, list[float]]]:
    """Each signal of a full run by name, as one number a unit."""
    found = full["signals"]
    for moment, known in [("before", found["before"]), *found["moments"].items()]:
        flat = {**known, **{f"put_back_{k}": v for k, v in known.get("front_put_back", {}).items()}}
        for name, values in flat.items():
            if isinstance(values, list) and name != "losses":  # one number a step
                yield f"{moment}:{name}", [inf if v is None else v for v in values]
        if "front_put_back" in known:
            put_back = known["front_put_back"]
            loss = [value - put_back["current_loss"] for value in put_back["loss"]]
            yield f"{moment}:put_back_added_loss", loss
            spread = put_back["current_spread"] or 1e-12
            yield f"{moment}:put_back_relative_shift", [value / spread for value in put_back["shift"]]
        for name in ("gradient_square_norm", "sampled_gradient_square_norm"):
            top = known.get(name.replace("gradient", "mean_gradient"))
            if top:
                ratio = [a / b if a is not None and b else inf for a, b in zip(top, known[name], strict=True)]
                yield f"{moment}:{name.replace('square_norm', 'signal_to_noise')}", ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--top", type=int, default=20, help="signals to print")
    options = parser.parse_args()
    pairs = {name: runs for name, runs in read(options.results).items() if None in runs}
    print("pair | steps | full: points, loss | points lost (loss added) by frozen blocks | safe share\n--|--|--|--|--")
    for name, runs in pairs.items():
        cells = ", ".join(f"{blocks}: {lost:+.1f} ({added:+.3f})" for blocks, lost, added in losses(runs))
        full = last(runs[None])
        share = f"{safe_share(runs):.2f}" if len(runs) > 1 else ""
        print(f"{name} | {runs[None]['steps']} | {full['points']:.1f}, {full['loss']:.3f} | {cells} | {share}")

    # A signal of unit u speaks of freezing up to u: the last unit frozen at `blocks`, and the mean of the front.
    rows: dict[str, list[tuple[float, float]]] = {}
    deepest: dict[str, list[tuple[float, float]]] = {}
    lengths = []
    for runs in pairs.values():
        if len(runs) == 1:
            continue
        lengths.append((log(runs[None]["steps"]), safe_share(runs)))
        for name, values in signals(runs[None]):
            middle = values[len(values) // 2]
            front = [value for value in values[1 : len(values) // 2 + 1] if isfinite(value)]
            if isfinite(middle) and front:
                deepest.setdefault(f"{name} at half", []).append((middle, safe_share(runs)))
                total = sum(abs(value) for value in values if isfinite(value)) or 1e-30
                share = sum(abs(value) for value in front) / total
                deepest.setdefault(f"{name} share of the front half", []).append((share, safe_share(runs)))
            for blocks, _, added in losses(runs):
                if isfinite(values[blocks]):
                    rows.setdefault(name, []).append((values[blocks], added / last(runs[None])["loss"]))
    deepest["steps"] = lengths
    for title, table in (("relative loss added, over all depths", rows), ("deepest safe share, over pairs", deepest)):
        ranked = {
            name: float(spearmanr(*zip(*found, strict=True))[0])
            for name, found in table.items()
            if len(found) > 3 and len({a for a, _ in found}) > 1 and len({b for _, b in found}) > 1
        }
        number = round(mean(len(found) for found in table.values())) if table else 0
        print(f"\nrank correlation with the {title} ({number}):")
        for name in sorted(ranked, key=lambda name: -abs(ranked[name]))[: options.top]:
            print(f"  {ranked[name]:+.2f}  {name}")


if __name__ == "__main__":
    main()
