"""What predictors and simple rules say of runs that they have not seen."""

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
from ..predictor.features import CONTEXT
from ..signals.probe_history import LAGS
from .dataset import INPUTS, FreezingStages
from .fit import FitOptions, fit
from .table import RecordedRun

PREDICTOR = "predictor"
MIN_SLOPE = 1e-3


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
    moved = columns["context"][..., CONTEXT:]
    if moved.shape[-1]:
        # Since the last stage.
        found["change of what leaves the unit"] = -moved[..., 0]
        found["change of what the model says"] = -moved[..., len(LAGS)]
    return {name: value.double().numpy() for name, value in found.items()}


def _regressors(stages: FreezingStages, context: int) -> torch.Tensor:
    """The last snapshot's quantities, their means over the window, and the first `context` numbers of the context."""
    features, usable = stages.columns["features"], stages.columns["usable"].unsqueeze(-1)
    mean = (features * usable).sum(2) / usable.sum(2).clamp(min=1)
    return torch.cat([features[:, :, -1], mean, stages.columns["context"][..., :context]], dim=-1).double()


def _regression(train: FreezingStages, test: FreezingStages, context: int) -> np.ndarray:
    """What logistic regression says of `test`, fitted to `train`: `(rows, units)`."""
    model, active = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)), train.columns["active"]
    model.fit(_regressors(train, context)[active], train.columns["labels"][active] >= 0.5)
    seen = _regressors(test, context)
    return model.decision_function(seen.flatten(0, 1)).reshape(seen.shape[:2])


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

    def calibration(self, rows: np.ndarray) -> dict[str, float]:
        """The `offset` and `temperature` that make the label likeliest on some rows (Platt, 1999)."""
        score, wanted = (x[rows][self.active[rows]] for x in (self.scores[PREDICTOR], self.labels))
        found = LogisticRegression(C=np.inf).fit(score[:, None], wanted)
        temperature = 1 / max(found.coef_.item(), MIN_SLOPE)
        return {"offset": -found.intercept_.item() * temperature, "temperature": temperature}

    def probabilities(self) -> np.ndarray:
        """The predictor's that the label holds, each fold's as calibrated on the others: `(rows, units)`."""
        found = np.zeros_like(self.scores[PREDICTOR])
        for fold in np.unique(self.folds):
            here = self.folds == fold
            fitted = self.calibration(~here)
            found[here] = expit((self.scores[PREDICTOR][here] - fitted["offset"]) / fitted["temperature"])
        return found

    def moments(self, freeze: np.ndarray) -> np.ndarray:
        """
        When each unit of each run freezes: the front, up to the first unit that is not to be.

        Args:
            freeze (`np.ndarray` of shape `(rows, units)`, `bool`): which units may.

        Returns:
            `np.ndarray` of shape `(runs, units)`: fraction of the run; 1 for never, NaN for units there are not.
        """
        columns = self.stages.columns
        run, progress = columns["run"].numpy(), columns["progress"].numpy()
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
    told = {"logistic regression": judged.columns["context"].shape[-1]}
    if told["logistic regression"] > CONTEXT:
        told["logistic regression, not told of the front probe"] = CONTEXT
    scores |= {name: np.zeros(scores["depth"].shape) for name in (PREDICTOR, *told)}
    for fold in tqdm(sorted(set(groups)), desc=description):
        train, test = stages.select(torch.from_numpy(known != fold), as_in_use=True), folds == fold
        part = judged.select(torch.from_numpy(test))
        scores[PREDICTOR][test] = logits(fit(train, config, options), part)
        for name, context in told.items():
            scores[name][test] = _regression(train, part, context)
    return HeldOut(judged, folds, scores)
