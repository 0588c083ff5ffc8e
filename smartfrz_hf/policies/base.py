"""What a policy is given, and what it answers."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..signals.pilot_signals import PilotSignals
from ..signals.probe_history import ProbeHistory
from ..signals.schedule import LearningRates
from ..signals.steps import BeforeUpdate
from ..signals.weights import WeightHistory


def require(name: str, value: float, legal: bool, wanted: str) -> None:
    """
    Refuse a setting of a policy that cannot work.

    Raises:
        ValueError: it is not `legal`.
    """
    if not legal:
        raise ValueError(f"`{name}` is {value}; it must be {wanted}.")


@dataclass(frozen=True)
class Observation:
    """
    What a policy sees at a freezing stage.

    Attributes:
        step (`int`): optimizer steps done.
        max_steps (`int`): optimizer steps of the run.
        depth (`int`): frozen units of the front.
        trainable (`list[bool]`): per unit, whether it had anything to train at the start of the run.
        rates ([`LearningRates`]): learning rate before each step of the run.
        history ([`WeightHistory`], *optional*): given to a policy that sets `history_size`.
        probe ([`ProbeHistory`], *optional*): given to a policy that sets `front_probe`, where the probe works.
        pilot ([`PilotSignals`], *optional*): given once to a policy that sets `pilot`, at the end of the pilot.
        savings (`list[float]`, *optional*):
            With `pilot`: for each depth from 0 to all units, the share of a training step's FLOPs that freezing so many
            units saves, without an activation cache.
        order (`str`): `"front"`, or `"independent"` where units may freeze behind units that train.
        apart (`frozenset[int]`): indices of the units that are frozen behind units that train.
        limit (`int`, *optional*): the most units that may freeze, by `max_depth` and as something has to train.
        unfamiliar (`bool`):
            Whether the shipped predictor has learned from no model with such an output: a single one, or one for each token or
            frame.
    """

    step: int
    max_steps: int
    depth: int
    trainable: list[bool]
    rates: LearningRates
    history: WeightHistory | None = None
    probe: ProbeHistory | None = None
    pilot: PilotSignals | None = None
    savings: list[float] | None = None
    order: str = "front"
    apart: frozenset[int] = frozenset()
    limit: int | None = None
    unfamiliar: bool = False

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.trainable)

    @property
    def progress(self) -> float:
        """Fraction of the run that is done."""
        return self.step / max(1, self.max_steps)


@dataclass(frozen=True)
class Decision:
    """
    What a policy answers.

    Attributes:
        depth (`int`): units of the front to freeze. A depth below the current one changes nothing, and one beyond the number of
            units freezes all of them.
        reason (`str`): why, for the ledger and the log.
        unfreeze (`bool`): whether all units train again first.
        probabilities (`list[float]`, *optional*): that each active unit has converged, front first, for the report.
        points_lost (`list[float]`, *optional*):
            At the end of the pilot, the points that freezing is predicted to cost, by depth from 0 on, for the report.
        attentions (`list[list[float]]`, *optional*):
            For each active unit, front first, the predictor's attention to each snapshot of the weight history, oldest first. Each
            list sums to 1. The report shows those of the units that freeze.
        snapshot_steps (`list[int]`, *optional*): the optimizer steps at which these snapshots were taken.
        apart (`Collection[int]`):
            Indices of units to freeze behind units that train, with `order="independent"`. Units that are frozen already
            stay frozen; once all units in front of one are frozen, it belongs to the front.
    """

    depth: int
    reason: str
    unfreeze: bool = False
    probabilities: list[float] | None = None
    points_lost: list[float] | None = None
    attentions: list[list[float]] | None = None
    snapshot_steps: list[int] | None = None
    apart: Collection[int] = ()


class Policy(ABC):
    """
    Decides how many units of the front are frozen. Subclass it and implement `decide`; pass an instance as
    `SmartFRZCallback(policy=...)`, or give it a name with [`register_policy`].

    Attributes:
        history_size (`tuple[int, int]`, *optional*): snapshots in the weight history that it needs, and weights in each
            snapshot. Without it no history is recorded.
        front_probe (`bool`): whether it needs the front probe.
        min_probe_examples (`int`):
            Examples that the probe has at least. By default there is no probe where it would take more than 1 % of a run.
        pilot (`float`):
            Length of the pilot, as a fraction of the run; 0 for none. When it ends, the policy is asked with
            `observation.pilot`, and units of the front that it freezes then go back to the weights that they had at the start.
            There is no other freezing stage in the pilot.
        by_unit (`bool`): whether it can freeze units behind units that train, as `order="independent"` asks for.
        decides_once (`bool`): whether it freezes nothing after the first step, which the line at the start of a run says.

    Example:

    ```python
    >>> from smartfrz_hf import Decision, Policy


    >>> class Halfway(Policy):
    ...     def decide(self, observation):
    ...         depth = 3 if observation.progress >= 0.5 else 0
    ...         return Decision(depth, f"{observation.progress:.0%} of the run is done")
    ```
    """

    history_size: tuple[int, int] | None = None
    front_probe: bool = False
    min_probe_examples: int = 0
    pilot: float = 0.0
    by_unit: bool = False
    decides_once: bool = False

    @abstractmethod
    def decide(self, observation: Observation) -> Decision:
        """
        Answer at a freezing stage. Called once before the first step, too. With several processes each one asks its own
        policy, and all take the answer of process 0.
        """

    def most(self, units: int, progress: float = 1.0) -> int:
        """
        The most units that may ever freeze, which the line at the start of a run says.

        Args:
            units (`int`): number of units.
            progress (`float`, *optional*, defaults to `1.0`): fraction of the run that is done at the last freezing stage.
        """
        return units

    def before_update(self, now: BeforeUpdate) -> None:  # noqa: B027
        """
        Look at the gradients and weights before each optimizer step. Nothing is observed unless a policy implements it.

        Args:
            now ([`~smartfrz_hf.signals.steps.BeforeUpdate`]): the gradients and weights of the active units.
        """

    def rate_factors(self, progress: float, units: int) -> list[float]:
        """
        What the learning rate of each unit is multiplied with in the next step. It must be the same in all processes.

        Args:
            progress (`float`): fraction of the run that is done.
            units (`int`): number of units.

        Returns:
            `list[float]`: one factor a unit, the stem first. The head keeps the learning rate of the schedule.
        """
        return [1.0] * units

    def reset(self) -> None:  # noqa: B027
        """Forget what an earlier run has shown. Called when a run is made, as a policy may serve several, one after the other."""

    def state_dict(self) -> dict[str, Any]:
        """What the policy has to remember when a run resumes: plain JSON values and tensors. Empty by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from what `state_dict` gave."""
