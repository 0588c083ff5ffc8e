"""The predictor decides: SmartFRZ (ICLR 2023, arXiv 2401.16720)."""

import torch
from transformers.utils import logging

from ..predictor import SmartFRZPredictor, build_inputs
from ..signals.weights import WeightHistory
from .base import Decision, Observation, Policy

logger = logging.get_logger(__name__)

MIN_SNAPSHOTS = 3
EARLY, PEAK = 0.2, 0.8


class SmartFRZPolicy(Policy):
    """
    Freezes the front up to the first unit that the predictor does not call converged.

    In the first fifth of a run nothing freezes while the learning rate is near its peak. The weights of the front move
    most there, and are worse to keep than those before and after; and a schedule that starts at its peak is one on which
    the predictor has not been trained.

    Args:
        predictor ([`SmartFRZPredictor`]): scores the units.
        threshold (`float`): probability from which a unit counts as converged.
    """

    def __init__(self, predictor: SmartFRZPredictor, threshold: float):
        self.predictor, self.threshold = predictor.eval(), threshold
        self.history_size = (predictor.config.window, predictor.config.weights_per_unit)
        self.front_probe = predictor.config.front_probe
        self._warned = False

    def decide(self, observation: Observation) -> Decision:
        """
        Score the active units and freeze the converged ones in front.

        A history with NaN or infinity in it means that training has diverged: nothing freezes, and one warning says so.
        """
        history, depth = observation.history, observation.depth
        if history is None or history.filled < MIN_SNAPSHOTS or depth == observation.units:
            return Decision(depth, "not enough history")
        if observation.progress < EARLY and observation.rates.relative[observation.step] >= PEAK:
            return Decision(depth, "early in the run and near the peak of the learning rate")
        snapshots = history.snapshots()[depth:]
        if not torch.isfinite(snapshots.sum()):
            if not self._warned:
                self._warned = True
                logger.warning("The weight history holds NaN or infinite values: SmartFRZ freezes nothing.")
            return Decision(depth, "weights are not finite")
        probabilities = self.score(observation, history, snapshots)
        reached = depth
        while reached < observation.units and (
            probabilities[reached - depth] >= self.threshold or not observation.trainable[reached]
        ):
            reached += 1
        listed = ", ".join(f"{p:.3f}" for p in probabilities[: max(1, reached - depth)])
        return Decision(reached, f"probability {listed} against {self.threshold:g}")

    @torch.no_grad()
    def score(self, observation: Observation, history: WeightHistory, snapshots: torch.Tensor) -> list[float]:
        """Probability, per active unit with these snapshots, that it has converged."""
        device, rates, front = self.predictor.device, observation.rates, observation.probe
        inputs = build_inputs(
            self.predictor.config,
            snapshots[:, -history.filled :].to(device),
            history.start[observation.depth :].to(device),
            rates.spent[history.steps[-history.filled :]].to(device),
            rates.relative[observation.step],
            observation.progress,
            None if front is None else front.changes,
            observation.depth,
        )
        return self.predictor(*inputs).probabilities.tolist()
