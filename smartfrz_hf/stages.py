"""Freezing stages: the policy decides, the processes agree, units freeze or train again, and the ledger keeps the reason."""

from operator import index

from transformers.utils import logging

from .config import SmartFRZConfig
from .cost.ledger import Ledger
from .cost.stages import Stage, StartStage
from .distributed.consensus import Ranks
from .freezing.boundary import front_of
from .front import Front
from .model.units import Unit
from .policies import Decision, Observation, Policy
from .signals.observer import Observer
from .signals.pilot import is_regression, labels_positions
from .signals.schedule import LearningRates

logger = logging.get_logger(__name__)


class StageRunner:
    """
    Holds the freezing stages of a run. All methods are to be called in all processes.

    Args:
        config ([`SmartFRZConfig`]): of the run.
        policy ([`Policy`]): decides; that of process 0 for all.
        front ([`Front`]): what is frozen.
        observer ([`Observer`]): what the policy is shown.
        rates ([`LearningRates`]): of the run.
        ranks ([`Ranks`]): the processes of the run.
        ledger ([`Ledger`]): keeps what froze when and why.
        total_steps (`int`): optimizer steps of the run.

    Attributes:
        due (`range`): the steps after which there is a freezing stage, besides the one at the end of the pilot.
        most (`int`): the most units that may ever freeze.
        should_stop (`bool`): whether nothing is left to train and `when_all_frozen="stop"` asks to stop then.
    """

    def __init__(
        self,
        config: SmartFRZConfig,
        policy: Policy,
        front: Front,
        observer: Observer,
        rates: LearningRates,
        ranks: Ranks,
        ledger: Ledger,
        total_steps: int,
    ):
        self._config, self._policy, self._front, self._observer = config, policy, front, observer
        self._rates, self._ranks, self._ledger, self._total_steps = rates, ranks, ledger, total_steps
        self._trainable = [unit.trainable for unit in front.stack]
        self._deepest = front.stack.deepest_safe_depth()
        self._unfamiliar = is_regression(front.stack.model) or labels_positions(front.stack.model)
        first, every = config.steps("first_decision", total_steps), config.steps("decide_every", total_steps)
        self.due = range(first, total_steps, every)
        self._most = len(front.stack) if config.max_depth is None else min(config.max_depth, len(front.stack))
        last = self.due[-1] / total_steps if self.due else 0.0  # there is a stage before the first step, too
        self.most = min(self._most, self._deepest, policy.most(len(front.stack), last))
        self.should_stop = False

    def is_due(self, step: int) -> bool:
        """Whether there is a stage after this step. There is none in the pilot, in which everything trains."""
        if self._observer.pilot is not None:
            return self._pilot_is_over(step)
        return step in self.due

    def hold(self, step: int) -> None:
        """Hold a stage. One at the end of the pilot freezes units with the weights of the start of the run."""
        front, observer = self._front, self._observer
        pilot = observer.pilot if self._pilot_is_over(step) else None
        if front.depth < len(front.stack):
            observer.before_decision(step)
        observation = Observation(
            step=step,
            max_steps=self._total_steps,
            depth=front.depth,
            trainable=self._trainable,
            apart=front.freezer.apart,
            order=self._config.order,
            # A policy that would freeze all ends the run, with "stop".
            limit=self._most if self._config.when_all_frozen == "stop" else min(self._most, self._deepest),
            rates=self._rates,
            history=observer.history,
            probe=observer.probe,
            pilot=None if pilot is None else pilot.signals(self._rates.relative[:step]),
            savings=None if pilot is None else front.meter.savings(),
            unfamiliar=self._unfamiliar,
        )
        decision = self._policy.decide(observation)
        if not isinstance(decision, Decision):
            raise TypeError(f"`decide` of {type(self._policy).__name__} gave {decision!r}; it must give a `Decision`.")
        self._ledger.record(step, decision.probabilities)
        wanted, unfreeze = self._agree(decision, step)
        if unfreeze and front.freezer.frozen:
            self.unfreeze(step, decision.reason)
        wanted = self._with_idle_units(wanted | front.freezer.frozen)
        if front_of(wanted) > self._deepest:  # else nothing would be left to train
            self.should_stop = self._config.when_all_frozen == "stop"
        wanted = {unit for unit in wanted if unit < self._deepest}
        front.check_consistency(step)
        if wanted - front.freezer.frozen:
            before, reason = front.depth, decision.reason
            units = front.freeze(wanted, pilot, observation.pilot)
            if pilot is not None and front.depth > before:
                reason += f"; the rest trains at {front.rate.factor:.2f} times the learning rate"
            self._note(step, units, reason)
            self._note_attentions(decision, observation.depth)
        if observation.savings is not None:
            lost = None if decision.points_lost is None else [float(points) for points in decision.points_lost]
            self._ledger.start = StartStage(
                step, front.depth, decision.reason, front.rate.factor, observation.savings, lost
            )
            observer.pilot = None

    def unfreeze(self, step: int, reason: str) -> None:
        """Train everything again."""
        self._note(step, self._front.unfreeze(), reason)

    def _pilot_is_over(self, step: int) -> bool:
        return self._observer.pilot is not None and step >= self._observer.pilot_steps

    def _agree(self, decision: Decision, step: int) -> tuple[set[int], bool]:
        """The units that process 0 freezes, and whether everything trains again first, in all processes."""
        units = len(self._front.stack)
        try:
            depth, apart = max(0, min(index(decision.depth), units)), {index(unit) for unit in decision.apart}
        except TypeError:
            depth, apart = 0, {-1}
        if not apart <= set(range(units)):
            raise ValueError(
                f"`decide` of {type(self._policy).__name__} gave depth={decision.depth!r} and apart={decision.apart!r}; `depth` "
                f"must be a whole number of units, and `apart` a set of indices of units, from 0 to {units - 1}."
            )
        wanted = {*range(depth), *(apart if self._config.order == "independent" else ())}
        mine = [unit for unit in sorted(wanted) if unit < self._most], bool(decision.unfreeze)
        frozen, unfreeze = self._ranks.gather(mine, f"the freezing stage of step {step}")[0]
        return set(frozen), unfreeze

    def _with_idle_units(self, wanted: set[int]) -> set[int]:
        """
        With the units that have nothing to train and no unit that trains in front of them, such as the stem under LoRA, if a unit
        behind them freezes: they would keep it out of the front, although the backward pass does not reach it.
        """
        trains = (unit for unit, trainable in enumerate(self._trainable) if trainable and unit not in wanted)
        front = next(trains, len(self._trainable))
        return wanted.union(range(max((unit for unit in wanted if unit < front), default=0)))

    def _note(self, step: int, units: list[Unit], reason: str) -> None:
        """Enter a change of what is frozen into the ledger and the log."""
        stack, depth = self._front.stack, self._front.depth
        names, apart = [unit.name for unit in units], [stack[unit].name for unit in sorted(self._front.freezer.apart)]
        self._ledger.stages.append(Stage(step, depth, names, reason, apart))
        self._front.update_ledger(self._ledger)
        frozen = depth + len(apart)
        gap = f", {len(apart)} of them behind units that train" if apart else ""
        what = (
            f"froze {', '.join(names)}; {frozen} of {len(stack)} units are frozen now{gap}"
            if frozen
            else "all units train again"
        )
        logger.info(f"Step {step}: {what} ({reason}).")

    def _note_attentions(self, decision: Decision, depth: int) -> None:
        """Enter what the predictor attended to when it froze the units of the last stage: units times window numbers in a run."""
        stage, active = self._ledger.stages[-1], self._front.stack.names[depth:]
        by_unit, steps = dict(zip(active, decision.attentions or (), strict=False)), decision.snapshot_steps
        if steps and all(len(by_unit.get(unit, ())) == len(steps) for unit in stage.units):
            stage.attentions = [[round(float(weight), 3) for weight in by_unit[unit]] for unit in stage.units]
            stage.snapshot_steps = [int(step) for step in steps]
