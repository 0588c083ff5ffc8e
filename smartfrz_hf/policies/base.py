"""What a policy is told, and what it answers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ..signals.probe_history import ProbeHistory
from ..signals.schedule import LearningRates
from ..signals.weights import WeightHistory


@dataclass(frozen=True)
class Observation:
    """
    What a policy sees at a freezing stage.

    Attributes:
        step (`int`): optimizer steps done.
        max_steps (`int`): optimizer steps of the run.
        depth (`int`): frozen units.
        trainable (`list[bool]`): per unit, whether it had anything to train at the start of the run.
        rates ([`LearningRates`]): before each step of the run.
        history ([`WeightHistory`], *optional*): given to a policy that asks for it.
        front ([`ProbeHistory`], *optional*): given to a policy that asks for it, where the model has one.
    """

    step: int
    max_steps: int
    depth: int
    trainable: list[bool]
    rates: LearningRates
    history: WeightHistory | None = None
    front: ProbeHistory | None = None

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
    The answer.

    Attributes:
        depth (`int`): wanted depth, not below the current one.
        reason (`str`): why, for the ledger.
    """

    depth: int
    reason: str


class Policy(ABC):
    """
    Decides how deep to freeze.

    Attributes:
        history_size (`tuple[int, int]`, *optional*): snapshots a history, and weights a snapshot, to be recorded for
            it. Nothing is recorded for a policy that does not ask.
        front_probe (`bool`): whether it asks for looks of the front probe.
    """

    history_size: tuple[int, int] | None = None
    front_probe: bool = False

    @abstractmethod
    def decide(self, observation: Observation) -> Decision:
        """Answer a freezing stage; called once before the first step, too."""
