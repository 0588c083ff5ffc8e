"""Which value a tuned arm takes: the one that did best on other tasks."""

from pathlib import Path
from statistics import mean

from .intervals import MEAN_LOST
from .plan import Arm, Experiment, Plan, Result


def points(result: Result) -> float:
    """Of the evaluation at the end."""
    return result["evaluations"][-1]["points"]


def loss(result: Result) -> float:
    """On held-out rows at the end."""
    return result["evaluations"][-1]["loss"]


def flops(result: Result) -> float:
    """All of a run."""
    return sum(result["flops"].values())


def choose(plan: Plan, experiment: Experiment, out: Path) -> Arm:
    """
    The arm of an experiment, with the value of its tuned option.

    That is the value with the least compute among those that lose less than 0.2 points on average over the tuning tasks and
    their seeds; and if all lose more, the one that loses least.

    Args:
        plan ([`Plan`]): that the experiment is of.
        experiment ([`Experiment`]): whose arm it is.
        out (`Path`): results so far; the runs on the tuning tasks have to be among them.
    """
    arm = experiment.arm
    if not arm.tune:
        return arm
    results: dict[tuple[str, str, int], Result] = {
        (e.task.name, e.arm.name, e.seed): e.result(out) for e in plan.needs(experiment)
    }
    candidates = []
    for value in arm.tuned_option[1]:
        tried = arm.with_value(value)
        runs = [
            (result, results[task, "full", seed])
            for (task, name, seed), result in results.items()
            if name == tried.name
        ]
        lost = mean(points(full) - points(result) for result, full in runs)
        candidates.append((lost >= MEAN_LOST, mean(flops(r) / flops(full) for r, full in runs), lost, tried))
    if all(loses for loses, *_ in candidates):
        return min(candidates, key=lambda c: c[2])[3]
    return min((c for c in candidates if not c[0]), key=lambda c: c[1:3])[3]
