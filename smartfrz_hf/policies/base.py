"""What a policy is told, and what it answers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..history import WeightHistory


@dataclass(frozen=True)
class Observation:
    """
    What a policy sees at a freezing stage.

    Attributes:
        step (`int`): optimizer steps done.
        max_steps (`int`): optimizer steps of the run.
        depth (`int`): frozen units.
        trainable (`list[bool]`): per unit, whether it had anything to train at the start of the run.
        history ([`WeightHistory`], *optional*): given to a policy that asks for it.
        learning_rate (`float`): now, as a fraction of the run's peak.
        learning_rate_left (`float`): share of the run's summed learning rate that is still to come.
    """

    step: int
    max_steps: int
    depth: int
    trainable: list[bool]
    history: WeightHistory | None = None
    learning_rate: float = 1.0
    learning_rate_left: float = 1.0

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
    """

    history_size: tuple[int, int] | None = None

    @abstractmethod
    def decide(self, observation: Observation) -> Decision:
        """Answer a freezing stage; called once before the first step, too."""


def planned_rates(scheduler: LRScheduler | None, max_steps: int) -> list[float]:
    """
    The learning rate before each step of a run, as far as it is known in advance.

    Args:
        scheduler (`torch.optim.lr_scheduler.LRScheduler`): the run's. Schedules of Transformers are `LambdaLR`s and
            tell their future; any other one is taken as constant.
        max_steps (`int`): optimizer steps of the run.

    Returns:
        `list[float]`: `max_steps + 1` relative rates.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # Accelerate's wrapper
    if isinstance(scheduler, LambdaLR):
        return [float(scheduler.lr_lambdas[0](step)) for step in range(max_steps + 1)]
    return [1.0] * (max_steps + 1)


def rate_and_rest(rates: list[float], step: int) -> tuple[float, float]:
    """
    `learning_rate` and `learning_rate_left` of an [`Observation`].

    Args:
        rates (`list[float]`): rates at equal distances over the whole run.
        step (`int`): index of the present one.
    """
    peak, total = max(rates), sum(rates)
    return (rates[step] / peak if peak else 0.0, sum(rates[step:]) / total if total else 0.0)
