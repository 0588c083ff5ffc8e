"""The rewind test: how the finished model changes if its front is reset to what it was at an earlier moment."""

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
    Keeps the weights of each unit at some moments of a run, and resets the front of the finished model to them.

    The units behind the front cannot adapt, so the test overestimates the cost of freezing the front at that moment.

    Args:
        stack ([`BlockStack`]): the units.
    """

    def __init__(self, stack: BlockStack):
        self.stack = stack
        self._moments: list[list[dict[str, torch.Tensor]]] = []

    def keep(self) -> None:
        """Keep a copy of the present weights in host memory."""
        self._moments.append(self._weights())

    @torch.no_grad()
    def evaluate(self, metric: Callable[[], T]) -> list[list[T]]:
        """
        Evaluate the model with its front reset to each kept moment. Afterwards, the model is as it was.

        Args:
            metric (`Callable`): evaluates the model, always on the same held-out rows.

        Returns:
            `list[list]`: entry `[m][u]` is the metric with units 0 to u reset to moment m.
        """
        end = self._weights()
        results = []
        for moment in self._moments:
            row = []
            with _OutputReplay(self.stack) as replay:
                for index, (unit, weights) in enumerate(zip(self.stack.units, moment, strict=True)):
                    _restore(unit, weights)
                    replay.begin(index)
                    row.append(metric())
            results.append(row)
            for unit, weights in zip(self.stack.units, end, strict=True):
                _restore(unit, weights)
        return results

    def _weights(self) -> list[dict[str, torch.Tensor]]:
        return [
            {name: value.detach().to("cpu", copy=True) for name, value in unit.named_tensors().items()}
            for unit in self.stack.units
        ]


class _OutputReplay:
    """
    Skips the blocks in front of the last one that was reset: it replays the outputs that they had on the same rows
    when they were the last one themselves.
    """

    def __init__(self, stack: BlockStack):
        units = [(index, unit) for index, unit in enumerate(stack.units) if index and unit.runs_once]
        self._blocks = {index: unit.modules[unit.name] for index, unit in units}
        self._outputs: dict[int, list[Any]] = {index: [] for index in self._blocks}

    def __enter__(self) -> "_OutputReplay":
        self._patches = [
            ForwardPatch(block, partial(self._run_or_replay, index)) for index, block in self._blocks.items()
        ]
        return self

    def __exit__(self, *_) -> None:
        for patch in self._patches:
            patch.remove()

    def begin(self, last: int) -> None:
        """Prepare for an evaluation in which unit `last` is the last one that was reset."""
        self._last, self._calls = last, Counter[int]()

    def _run_or_replay(self, index: int, run: Callable[..., Any], *args, **kwargs) -> Any:
        if index < self._last:
            self._calls[index] += 1
            return self._outputs[index][self._calls[index] - 1]
        output = run(*args, **kwargs)
        if index == self._last:
            self._outputs[index].append(output)
        return output


def _restore(unit: Unit, weights: dict[str, torch.Tensor]) -> None:
    for name, value in unit.named_tensors().items():
        value.data.copy_(weights[name])
