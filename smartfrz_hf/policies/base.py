"""What a policy is told, and what it answers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..front_history import FrontHistory
from ..history import WeightHistory

TINY = 1e-300


class LearningRates:
    """
    The learning rate over a run, relative to its peak, and how much of it is spent.

    Args:
        rates (`Sequence[float]`): at equal distances from the start of the run to its end, in any unit.

    Attributes:
        relative (`torch.Tensor` of shape `(len(rates),)`): each rate as a fraction of the peak.
        spent (`torch.Tensor` of shape `(len(rates),)`): share of the summed rate that lies before each.
    """

    def __init__(self, rates: Sequence[float]):
        values = torch.tensor(rates, dtype=torch.float64)
        before = values.cumsum(0) - values
        self.relative = (values / values.max().clamp(min=TINY)).float()
        self.spent = (before / values.sum().clamp(min=TINY)).float()

    @property
    def restarts(self) -> list[int]:
        """
        Steps before which the rate rises again: it had fallen below half of its last peak, and has come to twice its lowest
        since and to a tenth of that peak.
        """
        found, peak, lowest = [], 0.0, float("inf")
        for step, rate in enumerate(self.relative.tolist()):
            if lowest < peak / 2 and rate >= max(2 * lowest, peak / 10):
                found.append(step)
                peak, lowest = rate, rate
            elif rate > peak:
                peak, lowest = rate, rate
            lowest = min(lowest, rate)
        return found

    @classmethod
    def planned(cls, scheduler: LRScheduler | None, max_steps: int) -> "LearningRates":
        """
        The rate before each step of a run, as far as it is known in advance.

        Args:
            scheduler (`torch.optim.lr_scheduler.LRScheduler`): the run's. Schedules of Transformers are `LambdaLR`s and
                tell their future; any other one is taken as constant.
            max_steps (`int`): optimizer steps of the run; there is one more rate than steps.
        """
        scheduler = getattr(scheduler, "scheduler", scheduler)  # Accelerate's wrapper
        if isinstance(scheduler, LambdaLR):
            return cls([float(scheduler.lr_lambdas[0](step)) for step in range(max_steps + 1)])
        return cls([1.0] * (max_steps + 1))


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
        front ([`FrontHistory`], *optional*): given to a policy that asks for it, where the model has one.
    """

    step: int
    max_steps: int
    depth: int
    trainable: list[bool]
    rates: LearningRates
    history: WeightHistory | None = None
    front: FrontHistory | None = None

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
