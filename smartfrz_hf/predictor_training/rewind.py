"""The rewind test: what becomes of the finished model when its front goes back to what it was?"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from ..model.forward_patch import ForwardPatch
from ..model.units import BlockStack, Unit

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
            with _Replay(self.stack) as replay:
                for index, (unit, weights) in enumerate(zip(self.stack.units, moment, strict=True)):
                    _put(unit, weights)
                    replay.begin(index)
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


class _Replay:
    """
    Spares the blocks in front of the last one that was put back: what they put out they have put out before, on the same
    rows in the same order, when they were the last.
    """

    def __init__(self, stack: BlockStack):
        units = [(index, unit) for index, unit in enumerate(stack.units) if index and unit.runs_once]
        self._blocks = {index: unit.modules[unit.name] for index, unit in units}
        self._outputs: dict[int, list[Any]] = {index: [] for index in self._blocks}

    def __enter__(self) -> "_Replay":
        self._patches = []
        for index, block in self._blocks.items():
            patch = ForwardPatch(block, lambda *args, **kwargs: None)
            patch.forward = partial(self._run_or_replay, index, patch.original)
            self._patches.append(patch)
        return self

    def __exit__(self, *_) -> None:
        for patch in self._patches:
            patch.remove()

    def begin(self, last: int) -> None:
        """Get ready for an evaluation in which the front up to unit `last` is put back."""
        self._last, self._calls = last, Counter[int]()

    def _run_or_replay(self, index: int, run: Callable[..., Any], *args, **kwargs) -> Any:
        if index < self._last:
            self._calls[index] += 1
            return self._outputs[index][self._calls[index] - 1]
        output = run(*args, **kwargs)
        if index == self._last:
            self._outputs[index].append(output)
        return output


def _tensors(unit: Unit) -> dict[str, torch.Tensor]:
    """Parameters and buffers (running statistics) of a unit."""
    buffers = {
        f"{prefix}.{name}": value for prefix, module in unit.modules.items() for name, value in module.named_buffers()
    }
    return {**unit.named_parameters(), **buffers}


def _put(unit: Unit, weights: dict[str, torch.Tensor]) -> None:
    for name, value in _tensors(unit).items():
        value.data.copy_(weights[name])
