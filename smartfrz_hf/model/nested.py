"""Batches as models take them: tensors in nested lists, tuples and dictionaries."""

from collections.abc import Callable, Mapping
from typing import Any

import torch


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of nested lists, tuples and dictionaries, with each tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(part, change) for part in value)
    return value


def pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Nested lists, tuples and dictionaries as plain JSON values, with the tensors set apart."""
    if isinstance(value, torch.Tensor):
        tensors[f"input.{len(tensors)}"] = value.contiguous()
        return {"tensor": f"input.{len(tensors) - 1}"}
    if isinstance(value, Mapping):
        return {"mapping": {key: pack(part, tensors) for key, part in value.items()}}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [pack(part, tensors) for part in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"{type(value).__name__} among the model's inputs")


def unpack(packed: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """What [`pack`] was given."""
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "mapping":
        return {key: unpack(part, tensors) for key, part in value.items()}
    if kind == "value":
        return value
    return {"list": list, "tuple": tuple}[kind](unpack(part, tensors) for part in value)


def named_tensors(value: Any, name: str = "") -> list[tuple[str, torch.Tensor]]:
    """All tensors of nested lists, tuples and dictionaries, each with the innermost key."""
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    if isinstance(value, Mapping):
        return [found for key, part in value.items() for found in named_tensors(part, str(key))]
    if isinstance(value, list | tuple):
        return [found for part in value for found in named_tensors(part, name)]
    return []


def float_tensors(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors that have rows."""
    return [tensor for _, tensor in named_tensors(value) if tensor.is_floating_point() and tensor.dim()]


def _rows(inputs: Any) -> int:
    """Rows of a batch: what most of its tensors begin with."""
    sizes = [len(tensor) for _, tensor in named_tensors(inputs) if tensor.dim()]
    return max(sizes, key=sizes.count, default=0)


def first_rows(inputs: Any, most: int) -> Any:
    """The first rows of a batch, in memory of their own."""
    rows = _rows(inputs)
    return map_tensors(inputs, lambda t: t[:most].clone() if t.dim() and len(t) == rows else t.clone())
