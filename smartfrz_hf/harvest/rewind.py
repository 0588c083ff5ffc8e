"""The rewind test: what becomes of the finished model when its front goes back to what it was?"""

from collections.abc import Callable
from typing import TypeVar

import torch

from ..blocks import BlockStack, Unit

T = TypeVar("T")


class Rewinder:
    """
    Keeps each unit's weights at some moments of a run.

    Args:
        stack ([`BlockStack`]): the units.
    """

    def __init__(self, stack: BlockStack):
        self.stack = stack
        self._kept: list[list[dict[str, torch.Tensor]]] = []

    def keep(self) -> None:
        """Keep what the weights are now, in host memory."""
        self._kept.append(self._now())

    @torch.no_grad()
    def outcomes(self, evaluate: Callable[[], T]) -> list[list[T]]:
        """
        What comes of the model as it is now with its front put back to each moment kept. The model stays as it is.

        This is a cautious measure of what freezing the front then would have cost, since the units behind it could not
        adapt.

        Args:
            evaluate (`Callable`): gives what comes of the model, such as its loss, on rows that it was not trained on.

        Returns:
            `list[list]`: entry `[m][u]` is what came of it with units 0 to u of moment m.
        """
        end = self._now()
        found = []
        for moment in self._kept:
            row = []
            for unit, weights in zip(self.stack.units, moment, strict=True):
                _put(unit, weights)
                row.append(evaluate())
            found.append(row)
            for unit, weights in zip(self.stack.units, end, strict=True):
                _put(unit, weights)
        return found

    def _now(self) -> list[dict[str, torch.Tensor]]:
        return [
            {name: value.detach().to("cpu", copy=True) for name, value in _tensors(unit).items()}
            for unit in self.stack.units
        ]


def _tensors(unit: Unit) -> dict[str, torch.Tensor]:
    """Parameters and buffers (running statistics) of a unit."""
    buffers = {
        f"{prefix}.{name}": value for prefix, module in unit.modules.items() for name, value in module.named_buffers()
    }
    return {**unit.named_parameters(), **buffers}


def _put(unit: Unit, weights: dict[str, torch.Tensor]) -> None:
    for name, value in _tensors(unit).items():
        value.data.copy_(weights[name])
