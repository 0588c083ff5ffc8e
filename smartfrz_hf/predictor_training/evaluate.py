"""How well a predictor, or a simple rule, says of runs it has not seen what may freeze when."""

from functools import partial

import numpy as np
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from .held_out import PREDICTOR, HeldOut
from .labels import at_probes

# What freezing may cost on average: by the rewind test, the share of how far a run has moved the logits. In
# `benchmarks/predictor/method_card.md`, freezes of at most 1 % lost no accuracy, and of 1 to 3 % lost 0.9 points.
COSTS = {"conservative": 0.003, "balanced": 0.01, "aggressive": 0.03}
FROZEN_AT = 0.03


def path_cost(held_out: HeldOut, moments: np.ndarray) -> np.ndarray:
    """
    What a path of freezes would cost, by the rewind test: the dearest of its freezes, as a share of how far the run has
    moved the logits. Not the loss: where a run overfits, or gains next to nothing, a share of its gain means nothing.

    Args:
        held_out ([`HeldOut`]): the stages and runs.
        moments (`np.ndarray` of shape `(runs, units)`): when each unit freezes, as [`HeldOut.moments`] gives it.

    Returns:
        `np.ndarray` of shape `(runs,)`.
    """
    found = []
    for run, when in zip(held_out.stages.runs, moments, strict=True):
        tensors, units = run.tensors, len(run.units)
        steps = tensors["probe_steps"]
        shifts = at_probes(tensors["rewind_shifts"], tensors["rewind_steps"], steps).numpy()
        probes = np.abs(steps.numpy()[:, None] / int(steps[-1]) - when[:units]).argmin(0)
        found.append(shifts[probes, np.arange(units)].max())
    return np.array(found)


def operating_points(held_out: HeldOut) -> dict[str, dict[str, float]]:
    """
    Thresholds for each attitude to risk, each the lowest at which the mean cost of a run keeps within `COSTS`.

    Returns:
        `dict`: by name, `threshold`; and, on runs of each fold with the threshold chosen on the others, `cost` and
        `worst_cost` (mean and highest over the runs, by the rewind test) and `frozen`
        (mean share of units and time).
    """
    probabilities = held_out.probabilities()
    grid = np.append(np.linspace(0.02, 0.98, 49), [0.985, 0.99, 0.995, 0.998, 0.999])
    moments = np.stack([held_out.moments(probabilities >= threshold) for threshold in grid])
    costs = np.stack([path_cost(held_out, when) for when in moments])
    run = held_out.stages.columns["run"].numpy()

    def lowest(rows: np.ndarray, most: float) -> float:
        within = costs[:, np.unique(run[rows])].mean(1) <= most
        return float(grid[within].min()) if within.any() else 1.0

    found = {}
    for name, most in COSTS.items():
        chosen = held_out.moments(probabilities >= held_out.elsewhere(partial(lowest, most=most))[:, None])
        paid = path_cost(held_out, chosen)
        found[name] = _rounded(
            {
                "threshold": lowest(np.ones(len(run), dtype=bool), most),
                "cost": paid.mean(),
                "worst_cost": paid.max(),
                "frozen": np.nanmean(1 - chosen),
            }
        )
    return found


def frozen_share(held_out: HeldOut, scores: np.ndarray, most: float = FROZEN_AT) -> float:
    """
    How much a score lets freeze at a given cost, with the one threshold for all runs that lets freeze most.

    This is what a predictor is for: ROC AUC and average precision weigh all rows alike, though one freeze too early costs
    more than many too late.

    Args:
        held_out ([`HeldOut`]): the stages and runs.
        scores (`np.ndarray` of shape `(rows, units)`): higher where a unit seems converged.
        most (`float`): the mean over the runs of what [`path_cost`] may be.

    Returns:
        `float`: mean share of units and time.
    """
    grid = np.quantile(scores[held_out.active], np.linspace(0.3, 0.999, 71))
    moments = [held_out.moments(scores >= threshold) for threshold in grid]
    return max([float(np.nanmean(1 - when)) for when in moments if path_cost(held_out, when).mean() <= most] or [0.0])


def ranking(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """
    Area under the ROC curve and average precision.

    Raises:
        ValueError: all labels are the same, so that nothing can be told apart.
    """
    if len(np.unique(labels)) < 2:
        raise ValueError("All labels are the same: choose another label, or other runs.")
    return {"auc": roc_auc_score(labels, scores), "ap": average_precision_score(labels, scores)}


def moment_error(held_out: HeldOut, scores: np.ndarray) -> float:
    """
    Mean distance, as a fraction of the run, of the moment at which each unit freezes to that at which its label says so.

    The threshold that makes a score a decision is, for each fold, the best one on the other folds.

    Args:
        held_out ([`HeldOut`]): the stages and labels.
        scores (`np.ndarray` of shape `(rows, units)`): higher where a unit seems converged.
    """
    run, wanted = held_out.stages.columns["run"].numpy(), held_out.moments(held_out.labels)
    grid = np.quantile(scores[held_out.active], np.linspace(0.02, 0.98, 49))
    errors = np.stack([np.abs(held_out.moments(scores >= threshold) - wanted) for threshold in grid])

    def best(rows: np.ndarray) -> float:
        return grid[np.nanmean(errors[:, np.unique(run[rows])], axis=(1, 2)).argmin()]

    chosen = held_out.moments(scores >= held_out.elsewhere(best)[:, None])
    return float(np.nanmean(np.abs(chosen - wanted)))


def summarize(held_out: HeldOut) -> dict:
    """
    Scores of predictor and rules, over all held-out rows together and for each fold.

    Returns:
        `dict`: `runs`, `rows`, `positive` (share of converged rows), `auc`, `ap`, `brier`, `moment_error`, `frozen` (see
        [`frozen_share`]), `frozen_at_most`, the same of what is to be learned, had it been known, `rules` and `folds`, by name, and `reliability`, by tenths of predicted probability.
    """
    active, labels = held_out.active, held_out.labels[held_out.active]
    scores, probabilities = held_out.scores[PREDICTOR], held_out.probabilities()
    rules = {
        name: _rounded(
            {
                **ranking(labels, values[active]),
                "moment_error": moment_error(held_out, values),
                "frozen": frozen_share(held_out, values),
            }
        )
        for name, values in held_out.scores.items()
        if name != PREDICTOR
    }
    folds = {}
    for fold in np.unique(held_out.folds):
        here = held_out.folds == fold
        inside = held_out.labels[here][active[here]]
        if len(np.unique(inside)) > 1:
            folds[str(fold)] = {"rows": int(active[here].sum())} | _rounded(
                ranking(inside, probabilities[here][active[here]])
            )
    tenth = np.minimum((probabilities[active] * 10).astype(int), 9)
    return {
        "runs": len(held_out.stages.runs),
        "rows": int(active.sum()),
        "positive": round(float(labels.mean()), 4),
        **_rounded(
            {
                **ranking(labels, scores[active]),
                "brier": brier_score_loss(labels, probabilities[active]),
                "moment_error": moment_error(held_out, scores),
                "frozen": frozen_share(held_out, scores),
                "frozen_at_most": frozen_share(held_out, held_out.stages.columns["targets"].double().numpy()),
            }
        ),
        "rules": rules,
        "folds": folds,
        "reliability": [
            {
                "rows": int((tenth == i).sum()),
                **_rounded(
                    {
                        "predicted": probabilities[active][tenth == i].mean(),
                        "observed": labels[tenth == i].mean(),
                    }
                ),
            }
            for i in range(10)
            if (tenth == i).any()
        ],
    }


def _rounded(values: dict[str, float], digits: int = 4) -> dict[str, float]:
    return {key: round(float(value), digits) for key, value in values.items()}
