"""Tensors in nested lists, tuples and dictionaries, as models take and return them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import recursively_apply


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of nested lists, tuples and dictionaries, each with the innermost key that leads to it."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from named_tensors(part, str(key))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from named_tensors(part, name)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors of nested lists, tuples and dictionaries, in order."""
    return [tensor for _, tensor in named_tensors(value)]


def float_tensors(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors with at least one dimension, in order."""
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point() and tensor.dim()]


def block_input(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments of a block: the first one, or the one of that name."""
    candidates = float_tensors(args) or float_tensors(kwargs.get("hidden_states")) or float_tensors(kwargs)
    return candidates[0]


def batch_size(inputs: Any) -> int:
    """Number of rows of a batch: the length that most of its tensors have."""
    lengths = [len(tensor) for tensor in tensors_in(inputs) if tensor.dim()]
    return max(lengths, key=lengths.count, default=0)


def first_rows(inputs: Any, count: int) -> Any:
    """
    A copy of the first rows of a batch.

    Args:
        inputs (`Any`): nested tensors; those whose length is not the batch size are copied whole.
        count (`int`): the largest number of rows.
    """
    rows = batch_size(inputs)
    return recursively_apply(lambda t: t[:count].clone() if t.dim() and len(t) == rows else t.clone(), inputs)


def to_state(value: Any) -> Any:
    """
    Nested inputs as a state dict: dictionaries whose values are JSON values and tensors.

    A container becomes `{"dict" | "list" | "tuple": {key or index: part}}`, and so does one of a subclass, such as `torch.Size`;
    anything else stays as it is.

    Raises:
        TypeError: there is something else among the inputs.
    """
    if isinstance(value, Mapping):
        return {"dict": {key: to_state(part) for key, part in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: {str(i): to_state(part) for i, part in enumerate(value)}}
    if value is None or isinstance(value, torch.Tensor | bool | int | float | str):
        return value
    raise TypeError(f"an input of type {type(value).__name__}, which a checkpoint cannot hold")


def from_state(state: Any) -> Any:
    """The nested inputs that [`to_state`] was given, in plain containers."""
    if not isinstance(state, Mapping):
        return state
    ((kind, parts),) = state.items()
    if kind == "dict":
        return {key: from_state(part) for key, part in parts.items()}
    values = [from_state(parts[str(i)]) for i in range(len(parts))]
    return values if kind == "list" else tuple(values)


def main_input_elements(model: Any, inputs: Any) -> int:
    """
    How many elements (tokens, pixels) a model is given.

    Args:
        model (`torch.nn.Module`): its `main_input_name` says which tensor counts, by default `"input_ids"`.
        inputs (`Any`): nested inputs. Without a tensor of that name the largest one counts, and without any tensor 1.
    """
    name = getattr(model, "main_input_name", None) or "input_ids"
    tensors = list(named_tensors(inputs))
    sizes = [tensor.numel() for key, tensor in tensors if key == name]
    return sizes[0] if sizes else max((tensor.numel() for _, tensor in tensors), default=1)
