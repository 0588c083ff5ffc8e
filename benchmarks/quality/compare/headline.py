"""The figures of the README, and the table and the chart in docs/benchmarks.md, from `summary.json`."""

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.quality.compare.intervals import MEAN_LOST, MOST_LOST
from benchmarks.utils import markdown_table

ARM = "smartfrz-balanced"  # the default settings
AGGRESSIVE = "smartfrz-aggressive"
MODELS = {
    "minilm": "MiniLM",
    "smollm2-12": "the first 12 blocks of SmolLM2-135M",
    "smollm2-30": "the whole of SmolLM2-135M",
    "bert-12": "a BERT of our own with 12 blocks",
    "bert-12-2": "a BERT of our own with 12 blocks",
    "resnet": "a ResNet, a ViT and a DeiT of our own",
    "vit-12": "a ResNet, a ViT and a DeiT of our own",
    "deit-12": "a ResNet, a ViT and a DeiT of our own",
}
# Tasks of more epochs have a table of their own.
MOST_EPOCHS = 4
# Freezing rules of other papers.
RULES = ("autofreeze", "egeria", "freezeout", "grades", "grades-by-unit", "linear", "self_cka")
# Ours, and full training with fewer steps at a higher rate, for about the same compute.
FEWER_STEPS = (
    ARM,
    AGGRESSIVE,
    "smartfrz-balanced-65",
    *(f"full{steps}-rate1.7" for steps in ("", "-65", "-50", "-42")),
)
# Data sets that were added after the last choice of limits and rates, before any run on them.
NEW_DATA = ("trec", "subj", "irony", "emotion")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def compared(known: dict, seen: bool = False) -> dict[str, dict[str, Any]]:
    """
    By fine-tuning task of few epochs, what the default settings took and lost, and the model.

    Args:
        known (`dict`): of `summary.json`.
        seen (`bool`, *optional*, defaults to `False`): the tasks whose data the predictor was trained on, or the others.
    """
    return {
        task: part["arms"][ARM] | {"model": part["model"], "epochs": part["epochs"]}
        for task, part in known["tasks"].items()
        if part["kind"] == "fine-tuning"
        and part["seen"] == seen
        and part["epochs"] <= MOST_EPOCHS
        and ARM in part["arms"]
    }


def figures(known: dict) -> str:
    """Three figures as a table, and their conditions below it."""
    runs = compared(known)
    change = {task: -run["points_lost"]["mean"] for task, run in runs.items()}
    worst, best = min(change, key=lambda task: change[task]), max(change, key=lambda task: change[task])
    rows = []
    for key, what in (("compute", "floating-point operations of training"), ("seconds", "processor time of training")):
        saved = [1 - run[key] for run in runs.values()]
        name = "compute" if key == "compute" else "time"
        rows.append(
            [
                f"**{percent(mean(saved))} less {name}**",
                f"{what}; {percent(min(saved))} to {percent(max(saved))}, depending on the task",
            ]
        )
    rows.append(
        [
            f"**{mean(change.values()):+.2f} points**",
            f"accuracy; {change[worst]:+.1f} (`{worst}`) to {change[best]:+.1f} (`{best}`), depending on the task",
        ]
    )
    return f"{markdown_table(['on average', 'what, and the range'], rows)}\n\n{conditions(known)}"


def conditions(known: dict) -> str:
    """What the figures were measured on, in two sentences."""
    runs = compared(known)
    names = list(dict.fromkeys(MODELS.get(run["model"], run["model"]) for run in runs.values()))
    models = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    seeds = sorted({run["seeds"] for run in runs.values()})
    many = span([run["seeds"] for run in runs.values()])
    epochs = span([run["epochs"] for run in runs.values()])
    warning = " With one seed, differences of a point or two are noise." if seeds[0] == 1 else ""
    return (
        f"Default settings (`balanced`) against full training with the same seed. {count(len(runs)).capitalize()} small "
        f"fine-tuning task{'s' * (len(runs) != 1)}, {many} seed{'s' * (seeds[-1] != 1)} each, pretrained models ({models}), one "
        f"CPU thread, {epochs} epochs.{warning}"
    )


def table(known: dict, seen: bool = False) -> str:
    """One row for each task of [`compared`], and their mean, in Markdown."""
    runs = compared(known, seen)

    rows: list[list[object]] = [
        [f"`{task}`", run["seeds"], points_lost(run), f"{run['loss_added']:+.3f}", *costs(run)]
        for task, run in runs.items()
    ]
    rows.append(["mean ± standard deviation over tasks", "", *over_tasks(runs)])
    if not seen and new_data(known):
        rows.append(["the same over tasks that no choice has seen", "", *over_tasks(new_data(known))])
    return markdown_table(["task", "seeds", "points lost", "loss added", "compute", "processor time"], rows)


def new_data(known: dict) -> dict[str, dict[str, Any]]:
    """Those tasks of [`compared`] whose data was added when all choices had been made."""
    return {task: run for task, run in compared(known).items() if task.partition(".")[2] in NEW_DATA}


def over_tasks(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Means over tasks: points lost with their standard deviation, loss added, compute, processor time."""
    points = [run["points_lost"]["mean"] for run in runs.values()]
    spread = f" ± {stdev(points):.2f}" if len(points) > 1 else ""
    loss = mean(run["loss_added"] for run in runs.values())
    means = [f"{mean(run[key] for run in runs.values()):.2f}" for key in ("compute", "seconds")]
    return [f"{mean(points):+.2f}{spread}", f"{loss:+.3f}", *means]


def beside_ours(known: dict) -> dict[str, dict[str, Any]]:
    """
    By arm, its means over the tasks of [`compared`] that it ran on, and ours on the same tasks with the same seeds: `{"tasks": ...,
    "seeds": [...], "its": {"lost": ..., "loss": ..., "compute": ..., "seconds": ...}, "ours": {...}}`. The fastest against ours first.
    """
    ours = compared(known)
    shared: dict[str, list[tuple[dict, dict, set[str]]]] = {}
    for task in ours:
        for arm, run in known["tasks"][task]["arms"].items():
            seeds = run["runs"].keys() & ours[task]["runs"].keys()
            if arm not in ("full", "hindsight", ARM) and seeds:
                shared.setdefault(arm, []).append((run["runs"], ours[task]["runs"], seeds))

    def means(runs: list[tuple[dict, set[str]]]) -> dict[str, float]:
        return {
            key: mean(mean(by_seed[seed][key] for seed in seeds) for by_seed, seeds in runs)
            for key in ("lost", "loss", "compute", "seconds")
        }

    found = {
        arm: {
            "tasks": len(part),
            "seeds": [len(seeds) for _, _, seeds in part],
            "its": means([(its, seeds) for its, _, seeds in part]),
            "ours": means([(mine, seeds) for _, mine, seeds in part]),
        }
        for arm, part in shared.items()
    }
    return dict(sorted(found.items(), key=lambda entry: entry[1]["its"]["seconds"] / entry[1]["ours"]["seconds"]))


def methods(known: dict) -> str:
    """One row for each arm of [`beside_ours`] that ran on two tasks or more, in Markdown."""
    rows = []
    for arm, at in beside_ours(known).items():
        if at["tasks"] == 1:
            continue
        cells = [
            f"{at[who]['lost']:+.2f}, {at[who]['loss']:+.3f} at {' / '.join(costs(at[who]))}"
            for who in ("its", "ours")
        ]
        rows.append([f"`{arm}`", at["tasks"], span(at["seeds"]), *cells])
    header = [
        "method",
        "tasks",
        "seeds",
        "points lost, loss added at compute / time",
        f"`{ARM}`, same tasks and seeds",
    ]
    return markdown_table(header, rows) if rows else "No other method has been run yet."


def by_operating_point(known: dict) -> dict[str, dict[str, Any]]:
    """
    By operating point, means over tasks of [`compared`]: `{"tasks": ..., "lost": ..., "worst": points of the worst task, "compute": ...,
    "seconds": ...}`. `balanced` and `aggressive` on the tasks and with the seeds that both ran on, so that they compare.
    """
    arms = {task: known["tasks"][task]["arms"] for task in compared(known)}
    found = {}
    for point, beside in (("conservative", ARM), ("balanced", "smartfrz-aggressive"), ("aggressive", ARM)):
        shared = [
            [
                its[f"smartfrz-{point}"]["runs"][seed]
                for seed in its[f"smartfrz-{point}"]["runs"].keys() & its[beside]["runs"].keys()
            ]
            for its in arms.values()
            if its.keys() >= {f"smartfrz-{point}", beside}
        ]
        if shared:
            means = {
                key: [mean(run[key] for run in runs) for runs in shared] for key in ("lost", "compute", "seconds")
            }
            averages = {key: mean(values) for key, values in means.items()}
            found[point] = averages | {"tasks": len(shared), "worst": max(means["lost"])}
    return found


def operating_points(known: dict) -> str:
    """One row for each of [`by_operating_point`], in Markdown."""
    rows = [
        [f"`{point}`", run["tasks"], f"{run['lost']:+.2f}", f"{round(run['worst'], 1) + 0:+.1f}", *costs(run)]
        for point, run in by_operating_point(known).items()
    ]
    header = ["operating point", "tasks", "points lost, mean", "worst task", "compute", "processor time"]
    return markdown_table(header, rows)


def equal_accuracy(known: dict) -> str:
    """
    One row for each task of [`compared`] on which other methods ran, in Markdown: `balanced` and `aggressive`, and of what is of
    equal accuracy the fastest other method, and the rule of another paper that takes the least compute.
    """

    def own(run: dict | None) -> str:
        if run is None:
            return "not run"
        return cell(None, run) if is_equal(run) else f"not equal ({points_lost(run)} points lost)"

    def cell(arm: str | None, run: dict | None) -> str:
        return "none" if run is None else f"{f'`{arm}`, ' if arm else ''}{' / '.join(costs(run))}"

    rows = []
    for task, ours in compared(known).items():
        others = {
            arm: run
            for arm, run in known["tasks"][task]["arms"].items()
            if arm not in ("full", "hindsight") and not arm.startswith("smartfrz")
        }
        equal = {arm: run for arm, run in others.items() if is_equal(run)}
        rules = [arm for arm in equal if arm.removesuffix("-tuned") in RULES]
        fastest = min(equal, key=lambda arm: equal[arm]["seconds"], default=None)
        cheapest = min(rules, key=lambda arm: equal[arm]["compute"], default=None)
        if len(others) > 1:
            mine = [own(ours), own(known["tasks"][task]["arms"].get(AGGRESSIVE))]
            rows.append([f"`{task}`", *mine, *(cell(arm, equal.get(arm or "")) for arm in (fastest, cheapest))])
    header = [
        "task",
        "`balanced`, compute / time",
        "`aggressive`",
        "fastest other method",
        "other paper's rule with the least compute",
    ]
    return markdown_table(header, rows)


def at_same_compute(known: dict) -> dict[str, dict[str, Any]]:
    """
    By arm of `FEWER_STEPS`, means over the tasks of [`compared`] and the seeds that all of them have: `{"lost": ..., "loss": ...,
    "compute": ..., "seconds": ..., "by_task": {task: points lost}}`. The one with the most compute first.
    """
    shared = {}
    for task in compared(known):
        arms = known["tasks"][task]["arms"]
        if arms.keys() >= set(FEWER_STEPS):
            shared[task] = set.intersection(*(set(arms[arm]["runs"]) for arm in FEWER_STEPS))
    found = {}
    for arm in FEWER_STEPS if shared else ():
        means: dict[str, dict[str, float]] = {
            key: {
                task: mean(known["tasks"][task]["arms"][arm]["runs"][seed][key] for seed in seeds)
                for task, seeds in shared.items()
            }
            for key in ("lost", "loss", "compute", "seconds")
        }
        found[arm] = {key: mean(by_task.values()) for key, by_task in means.items()} | {"by_task": means["lost"]}
    return dict(sorted(found.items(), key=lambda entry: -entry[1]["compute"]))


def fewer_steps(known: dict) -> str:
    """One row for each arm of [`at_same_compute`], in Markdown."""
    found = at_same_compute(known)
    tasks = [f"`{task}`" for run in list(found.values())[:1] for task in run["by_task"]]
    rows = [
        [f"`{arm}`", *costs(run), f"{run['lost']:+.2f}", f"{run['loss']:+.3f}"]
        + [f"{lost:+.1f}" for lost in run["by_task"].values()]
        for arm, run in found.items()
    ]
    return markdown_table(["method", "compute", "processor time", "points lost", "loss added", *tasks], rows)


def is_equal(run: dict[str, Any]) -> bool:
    """Whether an arm counts as equal in accuracy to full training. One seed says nothing of that."""
    lost = run["points_lost"]
    return run["seeds"] > 1 and lost["mean"] < MEAN_LOST and lost["high"] < MOST_LOST


def by_method(known: dict, kind: str, times: bool = True, epochs: int = 0) -> str:
    """One row for each method and each task of a kind with so many epochs or more, in Markdown; the least compute first."""
    header = ["task", "method", "seeds", "points lost", "compute", "processor time"][: 6 if times else 5]
    rows: list[list[object]] = []
    for task, part in known["tasks"].items():
        if part["kind"] != kind or part["epochs"] < epochs:
            continue
        for arm, run in sorted(part["arms"].items(), key=lambda entry: entry[1]["compute"]):
            if arm not in ("full", "hindsight"):
                row = [f"`{task}`", f"`{arm}`", run["seeds"], points_lost(run), *costs(run)]
                rows.append(row[: len(header)])
    return markdown_table(header, rows)


def chart(known: dict, path: Path) -> None:
    """What each task saved, with the points lost beside its name."""
    from matplotlib.figure import Figure

    runs = compared(known)
    figure = Figure(figsize=(6, 1.4 + 0.6 * len(runs)), layout="constrained")
    axes = figure.subplots()
    for offset, key, label, color in (
        (-0.2, "compute", "compute", "#e07a3f"),
        (0.2, "seconds", "processor time", "#7d97a5"),
    ):
        saved = [100 * (1 - run[key]) for run in runs.values()]
        axes.barh([place + offset for place in range(len(runs))], saved, height=0.38, label=label, color=color)
    names = [f"{task}\n{run['points_lost']['mean']:+.1f} points lost" for task, run in runs.items()]
    axes.set_yticks(range(len(runs)), names)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("saved against full training, %")
    axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def points_lost(run: dict[str, Any]) -> str:
    """The mean over seeds, with its interval."""
    at = run["points_lost"]
    return f"{at['mean']:+.2f} [{at['low']:+.2f}, {at['high']:+.2f}]" if run["seeds"] > 1 else f"{at['mean']:+.2f}"


def costs(run: dict[str, Any]) -> list[str]:
    """Compute and processor time, as ratios to full training."""
    return [f"{run[key]:.2f}" for key in ("compute", "seconds")]


def span(values: list[int]) -> str:
    """`three`, or `three to five`."""
    return " to ".join(dict.fromkeys(count(value) for value in (min(values), max(values))))


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def count(number: int) -> str:
    return NUMBERS[number] if number < len(NUMBERS) else str(number)
