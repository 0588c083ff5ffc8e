"""
Makes the report of all results again: `report.md` with a table for each task, a chart for each task, and `summary.json`.

    python -m benchmarks.quality.compare.report
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import mean

from benchmarks.quality.compare import headline
from benchmarks.quality.compare.choice import flops, loss, points
from benchmarks.quality.compare.intervals import LEVEL, MEAN_LOST, MOST_LOST, Interval, bootstrap, interpolate
from benchmarks.quality.compare.plan import HERE, Plan, Result, Task
from benchmarks.utils import markdown_table

FULL, OURS, HINDSIGHT = "full", "smartfrz", "hindsight"
SAME_SPEED = 1.6  # evaluations of two runs differ less in time, even with LoRA and on a busy machine
SUFFIX = re.compile(r"-(tuned|conservative|balanced|aggressive|\d+)$")


@dataclass(frozen=True)
class Row:
    """
    One arm on one task, against full training with the same seeds.

    Attributes:
        seeds (`int`): that both have been run with.
        points (`float`): mean at the end.
        lost ([`Interval`]): points lost against full training; negative where the arm is better.
        loss (`float`): mean held-out loss at the end, less that of full training.
        compute, seconds, wall (`float`): FLOPs, processor and wall seconds of training as mean ratios to full training's.
        memory (`float`, *optional*): bytes that training adds, as a ratio to what full training adds.
        frozen (`float`, *optional*): mean fraction of the units that is frozen.
        side_by_side (`bool`): whether its evaluations took about as long as those of full training, so that the seconds compare.
        runs (`dict[int, dict[str, float]]`): by seed, points `lost`, `loss`, `compute` and `seconds`.
    """

    arm: str
    seeds: int
    points: float
    lost: Interval
    loss: float
    compute: float
    seconds: float
    wall: float
    memory: float | None
    frozen: float | None
    side_by_side: bool
    runs: dict[int, dict[str, float]]

    @property
    def ours(self) -> bool:
        return self.arm.startswith(OURS)

    @property
    def equal(self) -> bool:
        """Whether the accuracy counts as equal to full training's. One seed says nothing of that."""
        return self.arm == FULL or (self.seeds > 1 and self.lost.equal)

    @property
    def rule(self) -> bool:
        """Whether it is a freezing rule of another paper."""
        return family(self.arm) in headline.RULES


def family(arm: str) -> str:
    """Name of an arm without its operating point: what makes one line in a chart."""
    shorter = SUFFIX.sub("", arm)
    return arm if shorter == arm else family(shorter)


def read(plan: Plan, out: Path, task: Task) -> dict[str, dict[int, Result]]:
    """Results of a task by arm and seed."""
    found: dict[str, dict[int, Result]] = {}
    for experiment in plan.of(task):
        if experiment.file(out).exists():
            found.setdefault(experiment.arm.name, {})[experiment.seed] = experiment.result(out)
    return found


def _added(result: Result) -> float | None:
    memory = result["memory"]
    return None if memory["peak"] is None else memory["peak"] - memory["before"]


def _ratio(pairs: list[tuple[float | None, float | None]]) -> float | None:
    ratios = [value / other for value, other in pairs if value is not None and other]
    return mean(ratios) if len(ratios) == len(pairs) else None


def rows(results: dict[str, dict[int, Result]]) -> list[Row]:
    """One row for each arm, as far as full training was run with its seeds."""
    full = results.get(FULL, {})
    found = []
    for arm, runs in results.items():
        seeds = [seed for seed in runs if seed in full]
        pairs = [(runs[seed], full[seed]) for seed in seeds]
        if not pairs:
            continue
        for run, other in pairs:
            if len({known["weights"] for known in (run, other) if "weights" in known}) > 1:
                raise ValueError(
                    f"{run['task']['name']}/{arm}.{run['seed']} and {FULL} began with different weights. Make both again with the "
                    "same model."
                )
        shares = [run["freezing"]["share"] for run, _ in pairs if run["freezing"]]
        found.append(
            Row(
                arm=arm,
                seeds=len(pairs),
                points=mean(points(run) for run, _ in pairs),
                lost=bootstrap([points(other) - points(run) for run, other in pairs]),
                loss=mean(loss(run) - loss(other) for run, other in pairs),
                compute=mean(flops(run) / flops(other) for run, other in pairs),
                seconds=mean(_training(run, "processor") / _training(other, "processor") for run, other in pairs),
                wall=mean(_training(run, "wall") / _training(other, "wall") for run, other in pairs),
                memory=_ratio([(_added(run), _added(other)) for run, other in pairs]),
                frozen=mean(shares) if shares else None,
                side_by_side=all(_equally_fast(*pair) for pair in pairs),
                runs={
                    seed: {
                        "lost": points(other) - points(run),
                        "loss": loss(run) - loss(other),
                        "compute": flops(run) / flops(other),
                        "seconds": _training(run, "processor") / _training(other, "processor"),
                    }
                    for seed, (run, other) in zip(seeds, pairs, strict=True)
                },
            )
        )
    return found


def _training(result: Result, kind: str) -> float:
    return max(result["seconds"][kind]["training"], 1e-9)


def _equally_fast(run: Result, other: Result) -> bool:
    """Whether two runs were made on equally fast machines: they evaluate the same model on the same rows."""
    one, two = (max(result["seconds"]["processor"]["evaluation"], 1e-9) for result in (run, other))
    return 1 / SAME_SPEED < one / two < SAME_SPEED


def hindsight(plan: Plan, found: list[Row]) -> Row | None:
    """
    The fixed schedule that turns out to be best: the one with the least compute among those of equal accuracy. Full training
    is one of them. `None` where no other one has been run with two seeds.
    """
    fixed = {arm.name for arm in plan.arms if arm.hindsight}
    if not any(row.arm in fixed and row.seeds > 1 for row in found):
        return None
    cheapest = min((r for r in found if r.equal and (r.arm in fixed or r.arm == FULL)), key=lambda row: row.compute)
    return Row(**cheapest.__dict__ | {"arm": HINDSIGHT})


def fewer_steps(found: list[Row], by: str) -> list[tuple[float, float]]:
    """What full training with fewer steps loses, over its compute or seconds."""
    return [(getattr(row, by), row.lost.mean) for row in found if family(row.arm) == FULL]


def table(found: list[Row]) -> str:
    """The rows of a task in Markdown, the one with the least compute first, those of unequal accuracy last."""
    curves = {by: fewer_steps(found, by) for by in ("compute", "seconds")}

    def against(row: Row, by: str) -> str:
        lost = interpolate(curves[by], getattr(row, by)) if family(row.arm) != FULL else None
        return "" if lost is None else f"{lost:+.2f}"

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    body = []
    for row in sorted(found, key=lambda row: (not row.equal, row.seconds)):
        lost = f"{row.lost.mean:+.2f} [{row.lost.low:+.2f}, {row.lost.high:+.2f}]" if row.arm != FULL else ""
        added = f"{row.loss:+.3f}" if row.arm != FULL else ""
        name = f"**{row.arm}**" if row.ours else row.arm
        numbers = [number(value) for value in (row.compute, row.seconds, row.wall, row.memory, row.frozen)]
        if not row.side_by_side:
            numbers[1:3] = [f"~{value}" for value in numbers[1:3]]
        equal = "yes" if row.equal else "no" if row.seeds > 1 else "one seed"
        body.append(
            [
                name,
                f"{row.points:.2f}",
                lost,
                added,
                equal,
                *numbers,
                against(row, "compute"),
                against(row, "seconds"),
                row.seeds,
            ]
        )
    header = ["arm", "points", "points lost", "loss added", "equal", "compute", "seconds", "wall", "memory", "frozen"]
    header += ["fewer steps, same compute", "fewer steps, same seconds", "seeds"]
    return markdown_table(header, body)


def best(found: list[Row], by: str, among: Callable[[Row], bool]) -> Row | None:
    """The cheapest arm of equal accuracy among some, full training and hindsight aside."""
    rivals = [row for row in found if row.equal and row.arm not in (FULL, HINDSIGHT) and among(row)]
    return min(rivals, key=lambda row: getattr(row, by), default=None)


def overview(tasks: list[Task], found: dict[str, list[Row]]) -> Iterator[str]:
    """What the tables come to: ours against the best other arm and against hindsight, task by task; then each arm over all."""
    body = []
    for task in tasks:
        part = found[task.name]
        mine, other = best(part, "seconds", lambda row: row.ours), best(part, "seconds", lambda row: not row.ours)
        cheap, rule = best(part, "compute", lambda row: row.ours), best(part, "compute", lambda row: row.rule)
        limit = next((row for row in part if row.arm == HINDSIGHT), None)
        cells = [f"{row.arm}, {1 / row.seconds:.2f}x" if row else "none" for row in (mine, other)]
        cells.append(f"{mine.seconds / other.seconds:.2f}" if mine and other else "")
        cells.append(f"{1 - cheap.compute / rule.compute:+.0%}" if cheap and rule else "")
        saves = cheap is not None and limit is not None and limit.compute < 1
        cells.append(f"{(1 - cheap.compute) / (1 - limit.compute):.0%}" if saves else "")
        body.append([task.name, task.kind, "yes" if task.seen else "no", *cells])
    header = ["task", "", "data seen", "fastest of ours", "fastest other", "our seconds against it"]
    header += ["our compute saved against the best other rule", "of hindsight's saving"]
    yield markdown_table(header, body)
    names = dict.fromkeys(row.arm for part in found.values() for row in part)
    body = []
    for name in names:
        mine = [row for part in found.values() for row in part if row.arm == name]
        equal = [row for row in mine if row.equal]
        cells = [f"{exp(mean(log(getattr(row, by)) for row in mine)):.2f}" for by in ("compute", "seconds")]
        body.append([name, len(mine), len(equal), f"{mean(row.lost.mean for row in mine):+.2f}", *cells])
    yield markdown_table(["arm", "tasks", "of equal accuracy", "points lost", "compute", "seconds"], body)


def chart(title: str, found: list[Row], path: Path) -> None:
    """Points lost over compute and over seconds, one line a policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[Row]] = {}
    for row in found:
        lines.setdefault(family(row.arm), []).append(row)
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    for axis, by in zip(axes, ("compute", "seconds"), strict=True):
        for number, (name, part) in enumerate(lines.items()):
            part = sorted(part, key=lambda row: getattr(row, by))
            costs, lost = [getattr(row, by) for row in part], [row.lost.mean for row in part]
            errors = [[row.lost.mean - row.lost.low for row in part], [row.lost.high - row.lost.mean for row in part]]
            style = {"color": f"C{number % 10}", "marker": "osD^vPX*"[number // 10 % 8]}
            width = 2.5 if name.startswith(OURS) else 1.0
            axis.errorbar(costs, lost, yerr=errors, label=name, linewidth=width, elinewidth=0.5, markersize=5, **style)
        axis.axhline(MEAN_LOST, color="grey", linestyle=":", linewidth=1)
        axis.set_xlabel(f"{by} of full training")
    axes[0].set_ylabel("points lost")
    figure.suptitle(title)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def summary(tasks: list[Task], found: dict[str, list[Row]]) -> dict:
    """`{"tasks": {task: {"kind": ..., "model": ..., "epochs": ..., "arms": {arm: {"seeds": ..., "points_lost": ..., ...}}}}}`."""

    def entry(row: Row) -> dict:
        lost = row.lost.to_dict()
        costs = {"compute": round(row.compute, 4), "seconds": round(row.seconds, 4)}
        runs = {str(seed): {key: round(value, 4) for key, value in run.items()} for seed, run in row.runs.items()}
        return {"seeds": row.seeds, "points_lost": lost, "loss_added": round(row.loss, 4), **costs, "runs": runs}

    return {
        "tasks": {
            task.name: {
                "kind": task.kind if task.objective == "labels" else task.objective,
                "model": task.model,
                "epochs": task.epochs,
                "seen": task.seen,
                "arms": {row.arm: entry(row) for row in found[task.name]},
            }
            for task in tasks
        }
    }


def summary_table(known: dict, arms: dict[str, str]) -> str:
    """
    Means over the tasks of a summary, and its worst task, in Markdown.

    Args:
        known (`dict`): of [`summary`].
        arms (`dict[str, str]`): what to call each of the arms.
    """
    body = []
    for arm, name in arms.items():
        runs = {task: part["arms"][arm] for task, part in known["tasks"].items() if arm in part["arms"]}
        lost = {task: run["points_lost"]["mean"] for task, run in runs.items()}
        worst = max(lost, key=lambda task: lost[task])
        compute = mean(run["compute"] for run in runs.values())
        body.append(
            [name, len(runs), f"{mean(lost.values()):+.2f}", f"{lost[worst]:+.1f} ({worst})", f"{compute:.2f}"]
        )
    return markdown_table(["", "tasks", "points lost, mean", "worst task", "compute"], body)


def make(plan: Plan, out: Path, report: Path) -> None:
    """Write everything into a folder."""
    found, tasks = {}, []
    for task in plan.tasks:
        part = rows(read(plan, out, task)) if task.role != "tune" else []
        if len(part) > 1:
            limit = hindsight(plan, part)
            found[task.name] = part + ([limit] if limit else [])
            tasks.append(task)
    report.mkdir(parents=True, exist_ok=True)
    known = summary(tasks, found)
    (report / "summary.json").write_text(json.dumps(known, indent=1) + "\n")
    if headline.compared(known):
        headline.chart(known, report / "charts" / "default_settings.png")
    text = ["# Comparison", "", INTRODUCTION, ""]
    for part in overview(tasks, found) if tasks else ():
        text += [part, ""]
    for task in tasks:
        what = f"{task.model}, {task.task}, {task.rows:,} rows, {task.epochs} epochs, batch {task.batch_size}"
        text += [
            f"## {task.name}",
            "",
            f"{what}.",
            "",
            table(found[task.name]),
            "",
            f"![{task.name}](charts/{task.name}.png)",
            "",
        ]
        chart(f"{task.name}: {what}", found[task.name], report / "charts" / f"{task.name}.png")
    (report / "report.md").write_text("\n".join(text))


INTRODUCTION = f"""Written by `make bench-report` from the files in `results/`; never edited by hand. Costs are means over seeds of ratios to full
training with the same seed: FLOPs, processor seconds and wall seconds of training without evaluations. Points are accuracy in
percent, 100 times Spearman's correlation or the F1 score of entities, or -100 times the loss of a language model. `loss added` is the held-out loss, less that of
full training. A time with `~` does not compare: evaluations took much longer or shorter than those of full training, so the runs
come from different machines, or one was busier. `points lost` has a {LEVEL:.0%} bootstrap
interval over seeds; with three seeds it is their range, and holds the true mean in about three cases of four. Accuracy counts as equal if the mean lost is below {MEAN_LOST} and the interval ends below {MOST_LOST}. `fewer steps`
is what full training with so few steps loses that it costs as much, by straight lines between the lengths that were run.
`hindsight` is the best fixed schedule, chosen after all were run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=HERE, help="folder of tasks.json and arms.json")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--report", type=Path, default=HERE, help="folder that gets the report")
    options = parser.parse_args()
    if not options.out.is_dir():
        parser.error(f"There is no folder {options.out}.")
    make(Plan.read(options.plan), options.out, options.report)
    sys.stdout.write((options.report / "report.md").read_text())


if __name__ == "__main__":
    main()
