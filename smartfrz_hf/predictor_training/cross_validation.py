"""Cross-validation: what predictors and simple rules predict for runs that they were not fitted to."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from ..predictor import SmartFRZPredictor, SmartFRZPredictorConfig
from ..predictor.configuration import CONTEXT_SIZE
from ..signals.probe_history import LAGS
from .dataset import INPUTS, FreezingStages
from .fit import FitOptions, fit
from .table import RecordedRun

PREDICTOR = "predictor"
REGRESSION = "logistic regression"
REGRESSION_WITHOUT_PROBE = "logistic regression without the front probe"
MIN_SLOPE = 1e-3
BATCH = 256  # rows


@torch.no_grad()
def logits(predictor: SmartFRZPredictor, stages: FreezingStages) -> np.ndarray:
    """Log-odds of each freezing stage and unit: `np.ndarray` of shape `(rows, units)`."""
    parts = []
    for begin in range(0, len(stages), BATCH):
        batch = {key: stages.columns[key][begin : begin + BATCH].to(predictor.device) for key in INPUTS}
        parts.append(predictor.eval()(**batch).logits.cpu())
    return torch.cat(parts).double().numpy()


def rule_scores(stages: FreezingStages) -> dict[str, np.ndarray]:
    """Scores of simple rules, by name, higher where a unit seems converged: `np.ndarray` of shape `(rows, units)`."""
    columns = stages.columns
    depth, progress, _, rate_left = columns["context"][..., :CONTEXT_SIZE].unbind(-1)
    scores = {
        "relative weight change": -columns["weight_change"],
        "change of gradient norm (AutoFreeze)": -columns["gradient_change"],
        "self-CKA": columns["self_cka"],
        "depth": -depth,
        "progress": progress,
        "progress and depth": progress - depth,
        "learning rate left": -rate_left,
    }
    probe = columns["context"][..., CONTEXT_SIZE:]
    if probe.shape[-1]:  # changes since the last freezing stage
        scores["change of the unit's output"] = -probe[..., 0]
        scores["change of the model's output"] = -probe[..., len(LAGS)]
    return {name: score.double().numpy() for name, score in scores.items()}


def _regressors(stages: FreezingStages, context: int) -> torch.Tensor:
    """Features of the last snapshot, their means over the window, and the first `context` numbers of the context."""
    features, usable = stages.columns["features"], stages.columns["usable"].unsqueeze(-1)
    mean = (features * usable).sum(2) / usable.sum(2).clamp(min=1)
    return torch.cat([features[:, :, -1], mean, stages.columns["context"][..., :context]], dim=-1).double()


def _regression_scores(train: FreezingStages, test: FreezingStages, context: int) -> np.ndarray:
    """Scores of a logistic regression fitted to `train`, for `test`: `np.ndarray` of shape `(rows, units)`."""
    model, active = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)), train.columns["active"]
    model.fit(_regressors(train, context)[active], train.columns["labels"][active] >= 0.5)
    regressors = _regressors(test, context)
    return model.decision_function(regressors.flatten(0, 1)).reshape(regressors.shape[:2])


def check_classes(stages: FreezingStages, folds: np.ndarray) -> None:
    """
    Refuse runs from which nothing can be learned once a fold is held out. Rules, calibration and thresholds of each fold come
    from the other folds, where some units must have converged and others not.

    Args:
        stages ([`FreezingStages`]): the freezing stages of all runs.
        folds (`np.ndarray` of shape `(rows,)`): name of the fold of each row.

    Raises:
        ValueError: without one of the folds, all labels are the same.
    """
    active, labels = stages.columns["active"].numpy(), stages.columns["labels"].numpy() >= 0.5
    for fold in np.unique(folds):
        others = active & (folds != fold)[:, None]
        classes = np.unique(labels[others])
        if len(classes) < 2:
            always = "always" if classes.all() else "never"
            raise ValueError(
                f"If {fold} is held out, the label {stages.label!r} has only one class in the other runs "
                f"({', '.join(sorted(set(folds[folds != fold])))}): their units have {always} converged. Record more runs, "
                "of other families and data sets, with `smartfrz harvest`, or choose another label."
            )


@dataclass
class HeldOut:
    """
    Predictions for runs that were held out.

    Attributes:
        stages ([`FreezingStages`]): the freezing stages of all runs.
        folds (`np.ndarray` of shape `(rows,)`): name of the fold in which the row was held out.
        scores (`dict[str, np.ndarray]`): log-odds of the predictor, and scores of each rule, of shape `(rows, units)`.
    """

    stages: FreezingStages
    folds: np.ndarray
    scores: dict[str, np.ndarray]

    @property
    def active(self) -> np.ndarray:
        """Which units exist: `np.ndarray` of shape `(rows, units)`, `bool`."""
        return self.stages.columns["active"].numpy()

    @property
    def labels(self) -> np.ndarray:
        """Which units have converged: `np.ndarray` of shape `(rows, units)`, `bool`."""
        return self.stages.columns["labels"].numpy() >= 0.5

    def choose_on_other_folds(self, choose: Callable[[np.ndarray], float]) -> np.ndarray:
        """
        Choose a number, such as a threshold, for the rows of each fold on the rows of all other folds.

        Args:
            choose (`Callable[[np.ndarray], float]`): chooses the number for a mask of rows, `(rows,)`.

        Returns:
            `np.ndarray` of shape `(rows,)`.
        """
        chosen = np.zeros(len(self.folds))
        for fold in np.unique(self.folds):
            chosen[self.folds == fold] = choose(self.folds != fold)
        return chosen

    def calibration(self, rows: np.ndarray) -> dict[str, float]:
        """The `offset` and `temperature` with the highest likelihood of the labels of some rows (Platt, 1999)."""
        scores, labels = (x[rows][self.active[rows]] for x in (self.scores[PREDICTOR], self.labels))
        regression = LogisticRegression(C=np.inf).fit(scores[:, None], labels)
        temperature = 1 / max(regression.coef_.item(), MIN_SLOPE)
        return {"offset": -regression.intercept_.item() * temperature, "temperature": temperature}

    def probabilities(self) -> np.ndarray:
        """Calibrated probabilities, each fold fitted on the others: `np.ndarray` of shape `(rows, units)`."""
        probabilities = np.zeros_like(self.scores[PREDICTOR])
        for fold in np.unique(self.folds):
            here = self.folds == fold
            fitted = self.calibration(~here)
            probabilities[here] = expit((self.scores[PREDICTOR][here] - fitted["offset"]) / fitted["temperature"])
        return probabilities

    def moments(self, freeze: np.ndarray) -> np.ndarray:
        """
        When each unit of each run freezes, if units freeze from the front, up to the first one that may not.

        Args:
            freeze (`np.ndarray` of shape `(rows, units)`, `bool`): which units may freeze.

        Returns:
            `np.ndarray` of shape `(runs, units)`: fraction of the run; 1 for never, NaN for units that do not exist.
        """
        columns = self.stages.columns
        run, progress = columns["run"].numpy(), columns["progress"].numpy()
        front = np.logical_and.accumulate(freeze | ~self.active, axis=1)
        moments = np.full((run.max() + 1, front.shape[1]), np.nan)
        for index in np.unique(run):
            here = run == index
            first = np.where(front[here], progress[here, None], 1.0).min(0)
            moments[index] = np.where(self.active[here][0], first, np.nan)
        return moments


def cross_validate(
    stages: FreezingStages,
    config: SmartFRZPredictorConfig,
    key: Callable[[RecordedRun], str],
    options: FitOptions | None = None,
    description: str = "folds",
    test_stages: FreezingStages | None = None,
) -> HeldOut:
    """
    Hold out each group of runs once, fit predictors and rules to the others, and score the held-out runs.

    Args:
        stages ([`FreezingStages`]): freezing stages of all runs.
        config ([`SmartFRZPredictorConfig`]): form and sizes of the predictors.
        key (`Callable`): gives the group of a run.
        options ([`FitOptions`], *optional*): training options of the predictors.
        description (`str`, *optional*, defaults to `"folds"`): shown with the progress bar.
        test_stages ([`FreezingStages`], *optional*):
            Freezing stages of the same runs that are scored. Defaults to those of `stages` with the smallest spacing.

    Returns:
        [`HeldOut`]

    Raises:
        ValueError: there is only one group, or without one of them all labels are the same.
    """
    groups = np.array([key(run) for run in stages.runs])
    if len(set(groups)) < 2:
        raise ValueError(
            f"All runs belong to {groups[0]}, so there is nothing to hold out; record runs of another one."
        )
    if test_stages is None:
        test_stages = stages.select(stages.columns["spacing"] == stages.columns["spacing"].min())
    train_folds, folds = groups[stages.columns["run"].numpy()], groups[test_stages.columns["run"].numpy()]
    check_classes(stages, train_folds)
    check_classes(test_stages, folds)
    scores = rule_scores(test_stages)
    regressions = {REGRESSION: test_stages.columns["context"].shape[-1]}
    if regressions[REGRESSION] > CONTEXT_SIZE:
        regressions[REGRESSION_WITHOUT_PROBE] = CONTEXT_SIZE
    scores |= {name: np.zeros(scores["depth"].shape) for name in (PREDICTOR, *regressions)}
    for fold in tqdm(sorted(set(groups)), desc=description):
        train, here = stages.select(torch.from_numpy(train_folds != fold), augment=True), folds == fold
        test = test_stages.select(torch.from_numpy(here))
        scores[PREDICTOR][here] = logits(fit(train, config, options), test)
        for name, context in regressions.items():
            scores[name][here] = _regression_scores(train, test, context)
    return HeldOut(test_stages, folds, scores)
