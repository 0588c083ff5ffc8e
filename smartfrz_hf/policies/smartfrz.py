"""The policy `smartfrz`: a predictor decides (SmartFRZ, ICLR 2023, arXiv 2401.16720)."""

from typing import Any

import torch
from transformers.utils import logging

from ..predictor import SmartFRZPredictor, build_inputs
from ..signals.pilot_signals import PilotSignals
from ..signals.weights import WeightHistory
from .base import Decision, Observation, Policy

logger = logging.get_logger(__name__)

MIN_SNAPSHOTS = 3
PILOT = 0.03  # fraction of the run
# Of the compute, that a front which freezes from the start must save: the patch embedding of a ViT saves nothing, and may cost points.
LEAST_SAVING = 0.01
# Nothing freezes in this fraction of the run while the learning rate is at or above this fraction of its peak.
EARLY, PEAK = 0.2, 0.8
# Once a front has frozen from the start, no more does before this fraction of the run: at a third of it, a sixth of the blocks cost
# 0.4 points in 22 runs, at two thirds a half of them cost 0.1. The predictor has seen no such runs, and is too sure in MiniLM.
EARLY_AFTER_START = 0.65
LOWERED_SHARE = 5 / 6  # of the blocks; those behind them freeze at the usual threshold
MUCH_RAISED = 1.25  # of the learning rate, from which the threshold is lower


class SmartFRZPolicy(Policy):
    """
    Freezes the front up to the first unit whose probability of having converged is below a threshold. With
    `order="independent"` it freezes every unit whose own probability reaches the threshold, wherever it is, as in the paper.

    The predictor was trained on fronts: the odds against freezing a front are the sum of those of its units. The probability of a
    unit on its own leaves out the units in front of it, so it is at least as high, and no run with such a unit frozen behind
    others that train was among those that it was trained on.

    Once a block has frozen from the start of the run, nothing more freezes before 65 % of it. From then on the first five sixths of the
    blocks freeze at a threshold of their own.

    Where the model has a single output, or one for each token or frame, the threshold is at least that of `"conservative"`: the
    predictor has learned from classifiers, and of tokens the front probe sees two in a row, hardly any with a rare label.

    In the first fifth of a run, nothing freezes while the learning rate is near its peak: the weights change most there, so
    a front that froze then would cost more accuracy than one frozen before or after. Few of the runs that the predictor was
    trained on have a schedule that starts at its peak.

    Args:
        predictor ([`SmartFRZPredictor`]): gives the probabilities.
        threshold (`float`): probability from which a unit counts as converged, in `[0, 1]`.
        start (`dict[str, float]`, *optional*):
            What limits a front that freezes from the start of the run, at the end of the pilot: one entry of `start_limits` in
            [`SmartFRZPredictorConfig`]. Without it nothing freezes from the start.
        target_saving (`float`, *optional*): share of the compute to be saved, in place of these limits.
        threshold_after_start (`float`, *optional*):
            The threshold once a front has frozen from the start. What trains at a higher rate loses less if it freezes early. Where
            the rate could not rise, it is at least that of `"conservative"`. Without it, `threshold` holds everywhere.
    """

    by_unit = True

    def __init__(
        self,
        predictor: SmartFRZPredictor,
        threshold: float,
        start: dict[str, float] | None = None,
        target_saving: float | None = None,
        threshold_after_start: float | None = None,
    ):
        self.predictor, self.threshold = predictor.eval(), threshold
        self.limits, self.target_saving = start, target_saving
        if target_saving is not None or (start is not None and predictor.start is not None):
            self.pilot = PILOT
        self.history_size = (predictor.config.window, predictor.config.weights_per_unit)
        self.front_probe = predictor.config.front_probe
        self.threshold_after_start = threshold_after_start
        self.reset()

    def reset(self) -> None:
        """Forget whether a front has frozen from the start."""
        self._started = self._raised = self._warned = False

    def decide(self, observation: Observation) -> Decision:
        """
        Freeze the converged units at the front of the active ones, or all converged units. Units that have nothing to train
        freeze with the front.

        Nothing freezes if the weight history holds NaN or infinite values, since training has diverged then. This is
        logged once.

        Args:
            observation ([`Observation`]): with a weight history and, where it works, the front probe.

        Returns:
            [`Decision`]: the reason gives the probabilities of the units that freeze, or that of the first active unit.
        """
        history, depth = observation.history, observation.depth
        if not depth:  # another run of the same policy, or everything trains again
            self._started = self._raised = False
        if observation.pilot is not None:
            decision = self.start(observation, observation.pilot)
            # The stem alone, unit 0, tells nothing of the blocks.
            self._started = any(observation.trainable[max(depth, 1) : decision.depth])
            # The lower threshold was measured for fronts only.
            measured = self._started and observation.order == "front"
            self._raised = measured and observation.pilot.rate_factor(decision.depth) >= MUCH_RAISED
            return decision
        if history is None or history.filled < MIN_SNAPSHOTS or depth == observation.units:
            return Decision(depth, "not enough history")
        if self._started and observation.progress < EARLY_AFTER_START:
            waits = f"nothing more freezes before {EARLY_AFTER_START:.0%} of the run"
            return Decision(depth, f"after a front has frozen from the start, {waits}")
        if observation.progress < EARLY and observation.rates.relative[observation.step] >= PEAK:
            return Decision(depth, "early in the run and near the peak of the learning rate")
        snapshots = history.snapshots()[depth:]
        if not torch.isfinite(snapshots.sum()):
            if not self._warned:
                self._warned = True
                logger.warning(
                    "The weights hold NaN or infinite values, as training has diverged. SmartFRZ freezes nothing."
                )
            return Decision(depth, "weights are not finite")
        probabilities, attentions = self.score(observation, history, snapshots)
        score = dict(enumerate(probabilities, depth))
        thresholds = {unit: self.threshold_of(unit, observation) for unit in score}
        freezes = {unit for unit, p in score.items() if p >= thresholds[unit] or not observation.trainable[unit]}
        reached = next(unit for unit in range(depth, observation.units + 1) if unit not in freezes)
        apart: set[int] = set()
        if observation.order == "independent":
            apart = {unit for unit in freezes if unit > reached and observation.trainable[unit]}
        named = {*range(depth, reached), *(apart - observation.apart)} or {depth}
        listed = ", ".join(f"{score[unit]:.3f}" for unit in sorted(named))
        against = " and ".join(f"{threshold:g}" for threshold in sorted({thresholds[unit] for unit in named}))
        reason = f"probability {listed} against {against}"
        return Decision(
            reached,
            reason,
            probabilities=probabilities,
            attentions=attentions.tolist(),  # of the same forward pass
            snapshot_steps=history.steps[-history.filled :],
            apart=apart,
        )

    def threshold_of(self, unit: int, observation: Observation) -> float:
        """
        The probability from which a unit freezes now.

        Args:
            unit (`int`): its index.
            observation ([`Observation`]): of this freezing stage.
        """
        careful = self.predictor.config.operating_points["conservative"]
        if self.threshold_after_start is None:
            return self.threshold
        if observation.unfamiliar:
            return max(self.threshold, careful)
        if not self._started:
            return self.threshold
        thresholds = [self.threshold_after_start]
        if not self._raised:
            thresholds.append(careful)
        if unit > LOWERED_SHARE * (observation.units - 1):
            thresholds.append(self.threshold)
        return max(thresholds)

    @torch.no_grad()
    def start(self, observation: Observation, pilot: PilotSignals) -> Decision:
        """
        Freeze a front from the start of the run on: the deepest one that the predictor finds cheap enough, or the one that saves
        as much compute as was asked for.

        Args:
            observation ([`Observation`]): at the end of the pilot.
            pilot ([`PilotSignals`]): what the pilot has shown.

        Returns:
            [`Decision`]: the reason says what is expected to be saved and lost.
        """
        assert observation.savings is not None
        savings = [(1 - observation.progress) * saving for saving in observation.savings]
        limit = observation.units if observation.limit is None else observation.limit
        if self.target_saving is not None:
            if not savings[-1] > 0:  # a loss scaler has left out all steps of the pilot
                return Decision(observation.depth, "no step of the pilot was counted")
            if not pilot.finite:
                return Decision(observation.depth, pilot.problem or "")
            enough = (depth for depth, saving in enumerate(savings) if saving >= self.target_saving)
            wanted = next(enough, observation.units - 1)  # the last block trains in any case
            depth = max(min(wanted, limit), observation.depth)
            held = ", as no more units may freeze" if depth < wanted else ""
            return Decision(depth, f"from the start, to save {savings[depth]:.0%} of the compute{held}")
        if pilot.objection is not None:
            return Decision(observation.depth, pilot.objection)
        assert self.predictor.start is not None and self.limits is not None
        blocks = observation.units - 1
        lost = [0.0, *self.predictor.start.predict(pilot).tolist()]
        values = {
            "points": lost,
            "share": [0.0, *pilot.front_shares.tolist()],
            "blocks": [0.0, *(block / blocks for block in range(observation.units))],
        }
        beyond = [
            [name for name, found in values.items() if found[depth] > self.limits[name]]
            for depth in range(min(pilot.pretrained, limit) + 1)
        ]
        depth = max(observation.depth, *(depth for depth, names in enumerate(beyond) if not names))
        held = (
            f" (the next unit is beyond the limit of {' and '.join(beyond[depth + 1])})"
            if depth + 1 < len(beyond)
            else ""
        )
        if depth > observation.depth and savings[depth] < LEAST_SAVING:
            why = f"what may freeze from the start would save less than {LEAST_SAVING:.0%} of the compute"
            return Decision(observation.depth, why, points_lost=lost)
        return Decision(
            depth,
            f"from the start: expected to save {savings[depth]:.0%} of the compute and to lose {lost[depth]:.1f} points{held}",
            points_lost=lost,
        )

    @torch.no_grad()
    def score(
        self, observation: Observation, history: WeightHistory, snapshots: torch.Tensor
    ) -> tuple[list[float], torch.Tensor]:
        """
        The probability that each active unit and all units in front of it have converged, or with `order="independent"` that the
        unit has; and what the predictor attended to.

        Args:
            observation ([`Observation`]): of this freezing stage.
            history ([`WeightHistory`]): of all units.
            snapshots (`torch.Tensor` of shape `(units, window, weights_per_unit)`): those of the units behind the frozen front.

        Returns:
            `tuple`: one probability per unit behind the frozen front, 1 for those that are frozen already, and the attention of
            each of these units to each recorded snapshot, a `torch.Tensor` of shape `(units, snapshots)`.
        """
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
        active = [unit not in observation.apart for unit in range(observation.depth, observation.units)]
        output = self.predictor(
            *inputs,
            active=torch.tensor(active, device=device),
            by_unit=observation.order == "independent",
        )
        probabilities = [p if trains else 1.0 for p, trains in zip(output.probabilities.tolist(), active, strict=True)]
        return probabilities, output.attentions[:, -history.filled :]

    def state_dict(self) -> dict[str, Any]:
        """`started`: whether a front froze from the start of the run. `raised`: whether the learning rate of the rest rose much."""
        return {"started": self._started, "raised": self._raised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._started, self._raised = state["started"], state["raised"]
