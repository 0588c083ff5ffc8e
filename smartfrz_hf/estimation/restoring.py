"""Leaves a Trainer as it was found."""

import copy
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer

from .._compat import prepared_objects
from ..model.generators import generators_left_as_found
from ..model.tracing import set_modes

DATA = ("train_dataset", "eval_dataset")  # may be long lists, and nothing changes them


@contextmanager
def restored(trainer: Trainer) -> Iterator[None]:
    """
    Train with a Trainer's model inside, and find everything afterwards as it was before: weights, buffers, gradients, flags,
    optimizer, scheduler, random numbers, and what the Trainer keeps in its attributes.

    The weights are copied to host memory meanwhile.

    Args:
        trainer ([`~transformers.Trainer`]): not training now.
    """
    model: Any = trainer.model
    tensors = [(t, t.detach().to("cpu", copy=True)) for t in (*model.parameters(), *model.buffers())]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = {module: module.training for module in model.modules()}
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # inside Accelerate's wrapper
    before = None if optimizer is None else (_copied(dict(optimizer.state)), _copied(_options(optimizer)))
    scheduler = trainer.lr_scheduler
    schedule: Any = None if scheduler is None else copy.deepcopy(scheduler.state_dict())
    attributes = {key: value if key in DATA else _copied(value) for key, value in vars(trainer).items()}
    state = dict(vars(trainer.state))
    prepared = [(objects, list(objects)) for objects in prepared_objects(trainer.accelerator)]
    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        with generators_left_as_found(trainer.args.device):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in tensors:
                tensor.copy_(value)
        for parameter, flag, gradient in parameters:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        set_modes(modes)
        if optimizer is not None and before is not None:
            optimizer.state.clear()
            optimizer.state.update(before[0])
            for group, options in zip(optimizer.param_groups, before[1], strict=True):
                for key in set(group) - set(options) - {"params"}:
                    del group[key]
                group.update(options)
        if scheduler is not None:
            scheduler.load_state_dict(schedule)
        vars(trainer).clear()
        vars(trainer).update(attributes)
        vars(trainer.state).update(state)
        for objects, values in prepared:
            objects[:] = values


def _options(optimizer: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _copied(value: Any) -> Any:
    """A copy of containers and tensors, through all levels; other objects are the same ones."""
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        return value.detach().clone()
    if type(value) in (list, set, tuple):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, deque):
        return deque((_copied(item) for item in value), value.maxlen)
    if type(value) in (dict, defaultdict):
        new = copy.copy(value)
        new.update({key: _copied(item) for key, item in value.items()})
        return new
    return value
