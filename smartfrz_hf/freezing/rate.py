"""A higher learning rate for what still trains, in the optimizer's steps only."""

from typing import Any

from torch.optim import Optimizer


class RateFactor:
    """
    Multiplies the learning rate during each step of an optimizer. Between the steps the rate is what it was, so that
    schedulers, logs and checkpoints do not see it.

    Args:
        optimizer (`torch.optim.Optimizer`): not wrapped.

    Attributes:
        factor (`float`): what the learning rate is multiplied with.
    """

    def __init__(self, optimizer: Optimizer):
        self.optimizer, self.factor = optimizer, 1.0
        self._rates: list[Any] = []

    def before_step(self) -> None:
        """To be called right before a step."""
        self._rates = []
        if self.factor != 1.0:
            self._rates = [group["lr"] for group in self.optimizer.param_groups]
            for group in self.optimizer.param_groups:
                if group["lr"] is not None:  # Adafactor may choose it by itself
                    group["lr"] = group["lr"] * self.factor

    def after_step(self) -> None:
        """To be called right after a step."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []
