"""Metrics of predictors and simple rules on held-out runs."""

from collections.abc import Iterable
from functools import partial

import numpy as np
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from .cross_validation import PREDICTOR, HeldOut
from .labels import rewind_shifts

# Mean cost of freezing that each operating point allows, by the rewind test: the share of the run's change of the
# logits. In `benchmarks/predictor/method_card.md`, freezes of up to 1 % lost no accuracy, those of 1 to 3 % 0.9 points.
COSTS = {"conservative": 0.003, "balanced": 0.01, "aggressive": 0.03}
FROZEN_AT = 0.03


def path_cost(held_out: HeldOut, moments: np.ndarray) -> np.ndarray:
    """
    Cost of a series of freezes by the rewind test: the highest cost of any of them, as a share of the change of the
    logits over the run. The loss is not used, because a share of its gain means little for a run that overfits or
    gains little.

    Args:
        held_out ([`HeldOut`]): the freezing stages and runs.
        moments (`np.ndarray` of shape `(runs, units)`): when each unit freezes, see [`HeldOut.moments`].

    Returns:
        `np.ndarray` of shape `(runs,)`.
    """
    costs = []
    for run, when in zip(held_out.stages.runs, moments, strict=True):
        units, steps = len(run.units), run.tensors["probe_steps"].numpy()
        probes = np.abs(steps[:, None] / int(steps[-1]) - when[:units]).argmin(0)
        costs.append(rewind_shifts(run.tensors).numpy()[probes, np.arange(units)].max())
    return np.array(costs)


def operating_points(held_out: HeldOut) -> dict[str, dict[str, float]]:
    """
    For each operating point, the lowest threshold with which the mean cost of the runs is at most that of [`COSTS`].

    Returns:
        `dict`: by name, `threshold`; and for the runs of each fold, with the threshold chosen on the other folds,
        `cost` and `worst_cost` (mean and maximum over the runs, by the rewind test) and `frozen` (mean share of units
        and time).
    """
    probabilities = held_out.probabilities()
    grid = np.append(np.linspace(0.02, 0.98, 49), [0.985, 0.99, 0.995, 0.998, 0.999])
    costs = np.stack([path_cost(held_out, held_out.moments(probabilities >= threshold)) for threshold in grid])
    run = held_out.stages.columns["run"].numpy()

    def lowest(rows: np.ndarray, max_cost: float) -> float:
        allowed = costs[:, np.unique(run[rows])].mean(1) <= max_cost
        return float(grid[allowed].min()) if allowed.any() else 1.0

    points = {}
    for name, max_cost in COSTS.items():
        thresholds = held_out.choose_on_other_folds(partial(lowest, max_cost=max_cost))
        moments = held_out.moments(probabilities >= thresholds[:, None])
        cost = path_cost(held_out, moments)
        points[name] = _rounded(
            {
                "threshold": lowest(np.ones(len(run), dtype=bool), max_cost),
                "cost": cost.mean(),
                "worst_cost": cost.max(),
                "frozen": np.nanmean(1 - moments),
            }
        )
    return points


def frozen_share(held_out: HeldOut, scores: np.ndarray, max_cost: float = FROZEN_AT) -> float:
    """
    Share that a score allows to freeze at a given cost, with the one threshold for all runs that freezes most.

    This measures the purpose of a predictor. ROC AUC and average precision weigh all rows alike, though one freeze
    that is too early costs more than many that are too late.

    Args:
        held_out ([`HeldOut`]): the freezing stages and runs.
        scores (`np.ndarray` of shape `(rows, units)`): higher where a unit seems converged.
        max_cost (`float`, *optional*, defaults to `0.03`): maximum of the mean of [`path_cost`] over the runs.

    Returns:
        `float`: mean share of units and time.
    """
    grid = np.quantile(scores[held_out.active], np.linspace(0.3, 0.999, 71))
    paths = [held_out.moments(scores >= threshold) for threshold in grid]
    allowed = (moments for moments in paths if path_cost(held_out, moments).mean() <= max_cost)
    return max((float(np.nanmean(1 - moments)) for moments in allowed), default=0.0)


def ranking(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """
    Area under the ROC curve and average precision.

    Raises:
        ValueError: all labels are the same.
    """
    if len(np.unique(labels)) < 2:
        raise ValueError(
            "All rows have the same label, so scores cannot be ranked: choose another label, or other runs."
        )
    return {"auc": roc_auc_score(labels, scores), "ap": average_precision_score(labels, scores)}


def moment_error(held_out: HeldOut, scores: np.ndarray) -> float:
    """
    Mean distance between the moment at which each unit freezes and that at which its label says so.

    The threshold of each fold is the best one on the other folds.

    Args:
        held_out ([`HeldOut`]): the freezing stages and labels.
        scores (`np.ndarray` of shape `(rows, units)`): higher where a unit seems converged.

    Returns:
        `float`: fraction of the run.
    """
    run, labeled = held_out.stages.columns["run"].numpy(), held_out.moments(held_out.labels)
    grid = np.quantile(scores[held_out.active], np.linspace(0.02, 0.98, 49))
    errors = np.stack([np.abs(held_out.moments(scores >= threshold) - labeled) for threshold in grid])

    def best(rows: np.ndarray) -> float:
        return grid[np.nanmean(errors[:, np.unique(run[rows])], axis=(1, 2)).argmin()]

    moments = held_out.moments(scores >= held_out.choose_on_other_folds(best)[:, None])
    return float(np.nanmean(np.abs(moments - labeled)))


def summarize(held_out: HeldOut) -> dict:
    """
    Metrics of the predictor and the rules, over all held-out rows together and for each fold.

    Returns:
        `dict`: `runs`, `rows`, `positive` (share of converged rows); `auc`, `ap`, `brier`, `moment_error` and `frozen`
        (see [`frozen_share`]) of the predictor; `frozen_at_most`, the same for the learned target itself; `rules` and
        `folds` by name; and `reliability` by tenths of the predicted probability.
    """
    active, labels = held_out.active, held_out.labels[held_out.active]
    probabilities = held_out.probabilities()

    def metrics(scores: np.ndarray) -> dict[str, float]:
        return {
            **ranking(labels, scores[active]),
            "moment_error": moment_error(held_out, scores),
            "frozen": frozen_share(held_out, scores),
        }

    return {
        "runs": len(held_out.stages.runs),
        "rows": int(active.sum()),
        "positive": round(float(labels.mean()), 4),
        **_rounded(
            {
                **metrics(held_out.scores[PREDICTOR]),
                "brier": brier_score_loss(labels, probabilities[active]),
                "frozen_at_most": frozen_share(held_out, held_out.stages.columns["targets"].double().numpy()),
            }
        ),
        "rules": {name: _rounded(metrics(scores)) for name, scores in held_out.scores.items() if name != PREDICTOR},
        "folds": dict(_folds(held_out, probabilities)),
        "reliability": list(_reliability(labels, probabilities[active])),
    }


def _folds(held_out: HeldOut, probabilities: np.ndarray) -> Iterable[tuple[str, dict[str, float]]]:
    for fold in np.unique(held_out.folds):
        here = held_out.active & (held_out.folds == fold)[:, None]
        labels = held_out.labels[here]
        if len(np.unique(labels)) > 1:
            yield str(fold), {"rows": len(labels)} | _rounded(ranking(labels, probabilities[here]))


def _reliability(labels: np.ndarray, probabilities: np.ndarray) -> Iterable[dict[str, float]]:
    tenths = np.minimum((probabilities * 10).astype(int), 9)
    for tenth in np.unique(tenths):
        here = tenths == tenth
        means = {"predicted": probabilities[here].mean(), "observed": labels[here].mean()}
        yield {"rows": int(here.sum())} | _rounded(means)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(float(value), 4) for key, value in values.items()}
