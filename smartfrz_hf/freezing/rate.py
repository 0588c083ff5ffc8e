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
        self._raised: list[tuple[dict[str, Any], Any]] = []

    def before_step(self) -> None:
        """To be called right before a step."""
        self.after_step()  # one that was interrupted
        for group in self.optimizer.param_groups if self.factor != 1.0 else ():
            if group["lr"] is not None:  # Adafactor may choose it by itself
                self._raised.append((group, group["lr"]))
                group["lr"] = group["lr"] * self.factor

    def after_step(self) -> None:
        """To be called right after a step, and when the run ends, as a step may have been interrupted."""
        while self._raised:
            group, rate = self._raised.pop()
            group["lr"] = rate
