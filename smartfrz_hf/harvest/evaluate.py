"""How well a predictor, or a simple rule, says of runs it has not seen what may freeze when."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from ..predictor import SmartFRZPredictor, SmartFRZPredictorConfig
from ..predictor.inputs import CONTEXT
from .dataset import INPUTS, FreezingStages
from .fit import FitOptions, fit
from .labels import at_probes
from .table import RecordedRun

PREDICTOR = "predictor"
# What freezing may cost on average: by the rewind test, the share of how far a run has moved the logits.
COSTS = {"conservative": 0.01, "balanced": 0.03, "aggressive": 0.1}
TEMPERATURES = np.geomspace(0.25, 8, 61)


@torch.no_grad()
def logits(predictor: SmartFRZPredictor, stages: FreezingStages, batch_size: int = 256) -> np.ndarray:
    """Log-odds of each stage and unit: `np.ndarray` of shape `(rows, units)`."""
    parts = []
    for begin in range(0, len(stages), batch_size):
        batch = {key: stages.columns[key][begin : begin + batch_size].to(predictor.device) for key in INPUTS}
        parts.append(predictor.eval()(**batch).logits.cpu())
    return torch.cat(parts).double().numpy()


def rule_inputs(stages: FreezingStages) -> dict[str, np.ndarray]:
    """The quantities that simple rules go by, by rule, higher where a unit seems converged: `(rows, units)`."""
    columns = stages.columns
    depth, progress, _, rest = columns["context"][..., :CONTEXT].unbind(-1)
    found = {
        "relative weight change": -columns["weight_change"],
        "change of gradient norm (AutoFreeze)": -columns["gradient_change"],
        "self-CKA": columns["self_cka"],
        "depth": -depth,
        "progress": progress,
        "progress and depth": progress - depth,
        "learning rate left": -rest,
    }
    return {name: value.double().numpy() for name, value in found.items()}


def _regressors(stages: FreezingStages) -> torch.Tensor:
    """What logistic regression sees: the last snapshot's quantities, their means over the window, and the context."""
    features, usable = stages.columns["features"], stages.columns["usable"].unsqueeze(-1)
    mean = (features * usable).sum(2) / usable.sum(2).clamp(min=1)
    return torch.cat([features[:, :, -1], mean, stages.columns["context"]], dim=-1).double()


@dataclass
class HeldOut:
    """
    What was said of each run by those who had not seen it.

    Attributes:
        stages ([`FreezingStages`]): the freezing stages of all runs.
        folds (`np.ndarray` of shape `(rows,)`): name of the fold in which the stage was held out.
        scores (`dict[str, np.ndarray]`): of the predictor, log-odds, and of each rule, `(rows, units)`.
    """

    stages: FreezingStages
    folds: np.ndarray
    scores: dict[str, np.ndarray]

    @property
    def active(self) -> np.ndarray:
        """Which units there are: `(rows, units)`, `bool`."""
        return self.stages.columns["active"].numpy()

    @property
    def labels(self) -> np.ndarray:
        """Which have converged: `(rows, units)`, `bool`."""
        return self.stages.columns["labels"].numpy() >= 0.5

    def elsewhere(self, choose: Callable[[np.ndarray], float]) -> np.ndarray:
        """
        A number for each row, chosen on the other folds.

        Args:
            choose (`Callable[[np.ndarray], float]`): makes it from a mask of rows, `(rows,)`.

        Returns:
            `np.ndarray` of shape `(rows,)`.
        """
        found = np.zeros(len(self.folds))
        for fold in np.unique(self.folds):
            found[self.folds == fold] = choose(self.folds != fold)
        return found

    def temperature(self, rows: np.ndarray) -> float:
        """The temperature that makes the predictor's probabilities on some rows likeliest (Guo et al., 2017)."""
        score, wanted = (x[rows][self.active[rows]] for x in (self.scores[PREDICTOR], self.labels))

        def cost(temperature: float) -> float:
            z = score / temperature
            return float(np.mean(np.logaddexp(0, z) - wanted * z))

        return float(min(TEMPERATURES, key=cost))

    def probabilities(self) -> np.ndarray:
        """The predictor's, each fold's with the temperature fitted on the others: `(rows, units)`."""
        return 1 / (1 + np.exp(-self.scores[PREDICTOR] / self.elsewhere(self.temperature)[:, None]))

    def moments(self, freeze: np.ndarray) -> np.ndarray:
        """
        When each unit of each run freezes: the front, up to the first unit that is not to be.

        Args:
            freeze (`np.ndarray` of shape `(rows, units)`, `bool`): which units may.

        Returns:
            `np.ndarray` of shape `(runs, units)`: fraction of the run; 1 for never, NaN for units there are not.
        """
        columns = self.stages.columns
        run, progress = columns["run"].numpy(), columns["context"][:, 0, 1].numpy()
        front = np.logical_and.accumulate(freeze | ~self.active, axis=1)
        found = np.full((run.max() + 1, front.shape[1]), np.nan)
        for index in np.unique(run):
            here = run == index
            when = np.where(front[here], progress[here, None], 1.0).min(0)
            found[index] = np.where(self.active[here][0], when, np.nan)
        return found


def cross_validate(
    stages: FreezingStages,
    config: SmartFRZPredictorConfig,
    key: Callable[[RecordedRun], str],
    options: FitOptions | None = None,
    description: str = "folds",
    judged: FreezingStages | None = None,
) -> HeldOut:
    """
    Leave each group of runs out once, fit to the others, and let predictor and rules speak of those left out.

    Args:
        stages ([`FreezingStages`]): of all runs.
        config ([`SmartFRZPredictorConfig`]): form and sizes.
        key (`Callable`): names the group of a run.
        options ([`FitOptions`], *optional*): how predictors are fitted.
        description (`str`): for the progress bar.
        judged ([`FreezingStages`], *optional*): of the same runs, to be judged in their place. Defaults to those of
            `stages` with the closest snapshots.

    Raises:
        ValueError: there is one group only.
    """
    groups = np.array([key(run) for run in stages.runs])
    if len(set(groups)) < 2:
        raise ValueError(f"All runs are of {groups[0]}: there is nothing to hold out.")
    if judged is None:
        judged = stages.select(stages.columns["spacing"] == stages.columns["spacing"].min())
    known, folds = groups[stages.columns["run"].numpy()], groups[judged.columns["run"].numpy()]
    scores = rule_inputs(judged)
    scores[PREDICTOR], scores["logistic regression"] = (np.zeros(scores["depth"].shape) for _ in range(2))
    for fold in tqdm(sorted(set(groups)), desc=description):
        train, test = stages.select(torch.from_numpy(known != fold), drop_front=True), folds == fold
        part = judged.select(torch.from_numpy(test))
        scores[PREDICTOR][test] = logits(fit(train, config, options), part)
        regression, active = (
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
            train.columns["active"],
        )
        regression.fit(_regressors(train)[active], train.columns["labels"][active] >= 0.5)
        flat = _regressors(part).flatten(0, 1)
        scores["logistic regression"][test] = regression.decision_function(flat).reshape(scores["depth"][test].shape)
    return HeldOut(judged, folds, scores)


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
    grid = np.append(np.linspace(0.02, 0.98, 49), [0.985, 0.99, 0.995])
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


def frozen_share(held_out: HeldOut, scores: np.ndarray, most: float = COSTS["balanced"]) -> float:
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
        [`frozen_share`]), `rules` and `folds`, by name, and `reliability`, by tenths of predicted probability.
    """
    active, labels = held_out.active, held_out.labels[held_out.active]
    probabilities = held_out.probabilities()
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
                **ranking(labels, probabilities[active]),
                "brier": brier_score_loss(labels, probabilities[active]),
                "moment_error": moment_error(held_out, probabilities),
                "frozen": frozen_share(held_out, probabilities),
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
