"""One pass through the backbone, and the tensors in it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn


@dataclass(frozen=True)
class Shape:
    """What is known of a tensor that nobody reads."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Shape":
        """What is known of `tensor`."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device)

    def blank(self, rows: int | None) -> torch.Tensor:
        """A tensor that holds no number and next to no memory, with another number of rows if given."""
        nothing = torch.full((), float("nan") if self.dtype.is_floating_point else 0, dtype=self.dtype).to(self.device)
        return nothing.expand(self.shape if rows is None else (rows, *self.shape[1:]))


@dataclass
class Pass:
    """
    One pass through the backbone.

    Attributes:
        layout (`tuple`): what shapes inside the model depend on, but for the number of rows.
        rows (`int`): how many there are.
        end (`int`): units in front of the boundary.
        skip (`int`): units of the front that do not run.
        enters (`torch.Tensor`, *optional*): what enters unit `skip` in their place.
        stop (`bool`): whether the pass ends at the boundary.
        on_boundary (`Callable`, *optional*): told what crosses the boundary.
        hidden (`torch.Tensor`, *optional*): what has crossed it.
        starts (`Counter`): how often each module of the front, and the block behind it, has started.
        outputs (`dict`, *optional*): filled with what the front's modules gave, as shapes.
    """

    layout: tuple
    rows: int
    end: int
    skip: int = 0
    enters: torch.Tensor | None = None
    stop: bool = False
    on_boundary: Callable[[torch.Tensor], None] | None = None
    hidden: torch.Tensor | None = None
    starts: Counter = field(default_factory=Counter)
    outputs: dict[nn.Module, list[Shape]] = field(default_factory=dict)


def leaves(value: Any, kind: type = torch.Tensor) -> list[Any]:
    """All tensors, or all of another type, in nested tuples, lists and mappings."""
    found: list[Any] = []
    recursively_apply(found.append, value, test_type=lambda leaf: isinstance(leaf, kind))
    return found


def find_hidden(args: tuple, kwargs: dict[str, Any]) -> int | str | None:
    """Where the hidden states are among the arguments of a block."""
    if isinstance(kwargs.get("hidden_states"), torch.Tensor):
        return "hidden_states"
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return next((place for place, value in places if isinstance(value, torch.Tensor)), None)


def replace_first(output: Any, hidden: torch.Tensor | None) -> Any:
    """Put hidden states in the place of the first tensor."""
    first = iter([hidden])
    return recursively_apply(lambda tensor: next(first, tensor), output)


def equal(a: torch.Tensor, b: torch.Tensor, length: int | None, ends: list[int]) -> bool:
    """Whether two outputs agree to the last bit, but for padding."""
    if a.shape != b.shape:
        return False
    if length is not None and a.shape[:2] == (len(ends), length):
        return all(torch.equal(a[row, :end], b[row, :end]) for row, end in enumerate(ends))
    return torch.equal(a, b)
