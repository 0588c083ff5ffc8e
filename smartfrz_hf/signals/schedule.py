"""Learning rates over a run."""

from collections.abc import Sequence

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

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
