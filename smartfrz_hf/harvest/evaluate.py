"""How well a predictor, or a simple rule, tells the settled units from the others."""

from collections.abc import Iterator

import numpy as np
import torch
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from ..predictor import SmartFRZPredictor
from ..predictor.modeling import dynamics
from .dataset import INPUTS, HistoryRows


@torch.no_grad()
def predict(predictor: SmartFRZPredictor, rows: HistoryRows, batch_size: int = 512) -> np.ndarray:
    """Probability of each row: `np.ndarray` of shape `(rows,)`."""
    parts = []
    for begin in range(0, len(rows), batch_size):
        batch = {key: rows.columns[key][begin : begin + batch_size].to(predictor.device) for key in INPUTS}
        parts.append(predictor.eval()(**batch).probabilities.cpu())
    return torch.cat(parts).numpy()


def scores(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """
    Area under the ROC curve, average precision, and Brier score where the values are probabilities.

    Raises:
        ValueError: all labels are the same, so that nothing can be told apart.
    """
    if len(np.unique(labels)) < 2:
        raise ValueError("All labels are the same: choose another CKA threshold, or hold out other runs.")
    result = {"auc": roc_auc_score(labels, probabilities), "ap": average_precision_score(labels, probabilities)}
    if probabilities.min() >= 0 and probabilities.max() <= 1:
        result["brier"] = brier_score_loss(labels, probabilities)
    return {key: round(float(value), 4) for key, value in result.items()}


def rules(rows: HistoryRows) -> Iterator[tuple[str, np.ndarray]]:
    """Simple rules to be measured against: name, and a score that is higher where the unit seems settled."""
    columns = rows.columns
    mask = columns["mask"]
    usable = mask & torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)
    change = dynamics(columns["snapshots"], columns["start"], usable)[:, -1, 0]
    depth, progress, rate, rest = columns["context"].T
    yield "small relative weight change", -change.numpy()
    yield "near the front", -depth.numpy()
    yield "late in the run", progress.numpy()
    yield "near the front and late in the run", (progress - depth).numpy()
    yield "little learning rate left", -rest.numpy()


def evaluate(predictor: SmartFRZPredictor, rows: HistoryRows) -> dict:
    """
    Scores of the predictor and of the simple rules on the same rows.

    Returns:
        `dict`: `rows`, `positive` (share of settled rows), `auc`, `ap`, `brier`, and `rules`, by name.
    """
    labels = rows.columns["labels"].numpy()
    return {
        "rows": len(rows),
        "positive": round(float(labels.mean()), 4),
        **scores(labels, predict(predictor, rows)),
        "rules": {
            name: {key: value for key, value in scores(labels, values).items() if key != "brier"}
            for name, values in rules(rows)
        },
    }
