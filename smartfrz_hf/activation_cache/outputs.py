"""The module that runs the front, and what its blocks take and return."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn

from ..model.discovery import stack_of
from ..model.units import BlockStack


@dataclass(frozen=True)
class Shape:
    """Stands for a tensor in what a block has returned; `shape` is `None` if it is shaped as the hidden states that entered."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device
    by_row: bool


def entry_of(stack: BlockStack, depth: int = 0) -> nn.Module:
    """
    The innermost module that runs the whole front and has a forward pass of its own.

    Args:
        stack ([`BlockStack`]): the units of the model.
        depth (`int`, *optional*, defaults to `0`): units of the front. At least the first stack is taken, such as an encoder.
    """
    first = stack_of(stack.names[1])
    front = [unit for i, unit in enumerate(stack.units) if i < depth or i == 0 or stack_of(unit.name) == first]
    names = [name for unit in front for name in unit.modules]
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    while common:
        module = stack.model.get_submodule(".".join(common))
        if not stack.stem.own and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            return module
        if module is stack.backbone:
            return module
        common.pop()
    return stack.model


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and device."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def find_hidden(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The hidden states among the arguments of a block."""
    values = [kwargs.get("hidden_states"), *args, *kwargs.values()]
    return next((value for value in values if isinstance(value, torch.Tensor)), None)


def replace_hidden(output: Any, hidden: torch.Tensor | None) -> Any:
    """Put hidden states in the place of the first tensor."""
    first = iter([hidden])
    return recursively_apply(lambda tensor: next(first, tensor), output)
