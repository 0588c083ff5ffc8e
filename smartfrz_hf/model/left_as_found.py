"""Running a model now and then beside its training, without a trace."""

import contextlib
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .._compat import TorchDispatchMode, written_arguments

CONTAINERS = (list, dict, OrderedDict, set, deque)
# The tables of every module but those of forward hooks: in its first pass, FSDP2 puts hooks and parameters into them, to stay.
TABLES = {name for name in vars(nn.Module()) if not name.startswith("_forward")}


@contextlib.contextmanager
def attributes_left_as_found(model: nn.Module) -> Iterator[None]:
    """Undo what the model's own code does to its attributes, hooks and buffers in its forward pass: counters, queues, statistics."""
    # Kernels of batch norm do not say that they write to their statistics, so these are copied beforehand.
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    attributes = [(vars(module), vars(module).copy()) for module in model.modules()]
    held = [value for _, fields in attributes for name, value in fields.items() if name not in TABLES]
    contents = [(container, container.copy()) for container in _containers(held)]
    try:
        yield
    finally:
        for fields, before in attributes:
            if len(fields) != len(before) or any(fields.get(name) is not value for name, value in before.items()):
                fields.clear()
                fields.update(before)
        for value, copied in contents:
            value.clear()
            value.extend(copied) if isinstance(value, list | deque) else value.update(copied)
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                if getattr(module, name) is not buffer:
                    setattr(module, name, buffer)
                if not _equal(buffer, values):
                    # Through `.data`, as batch norm writes: a backward pass that is still to come may have saved the buffer.
                    buffer.data.copy_(values)


def _containers(values: list[Any]) -> list[Any]:
    """Lists, dictionaries, sets and queues among some values, and those in them."""
    found, waiting = {}, values
    while waiting:
        value = waiting.pop()
        if type(value) in CONTAINERS and id(value) not in found:
            found[id(value)] = value
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return [*found.values()]


def _equal(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal. Those that cannot be compared, sparse ones or ones without data, count as equal."""
    try:
        return torch.equal(tensor, other)
    except RuntimeError:
        return True


@contextlib.contextmanager
def model_left_as_found(model: nn.Module) -> Iterator[None]:
    """Run without gradients, and undo what the model's own code does to its weights, too, such as teachers that follow it."""
    parameters = [(parameter, parameter.detach()) for parameter in model.parameters()]
    watch = _CopyOnWrite(data for _, data in parameters)
    try:
        with attributes_left_as_found(model), torch.no_grad(), watch:
            yield
    finally:
        # Autocast keeps weights that it has cast; torch 2.7 gives those that were cast without a graph to the pass that is under
        # way, and its weights would get no gradient.
        torch.clear_autocast_cache()
        with torch.no_grad():
            for parameter, data in parameters:
                if parameter.data_ptr() != data.data_ptr():
                    parameter.data = data
            for written, values in watch.copies.values():
                written.copy_(values)


class _CopyOnWrite(TorchDispatchMode):
    """Copies each of some tensors just before an operation writes to it for the first time."""

    def __init__(self, tensors):
        super().__init__()
        self._tensors = {tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}
        self.copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for value in written_arguments(function, args, kwargs):
            for tensor in value if isinstance(value, list | tuple) else [value]:
                self._keep(tensor)
        return function(*args, **kwargs)

    def _keep(self, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            place = tensor.untyped_storage().data_ptr()
            for start, whole in self._tensors.items():
                if start not in self.copies and whole.untyped_storage().data_ptr() == place:
                    self.copies[start] = whole, whole.clone()
