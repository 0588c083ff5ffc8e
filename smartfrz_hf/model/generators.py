"""The generators of random numbers that a model may draw from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter of a model is."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def random_state(device: torch.device) -> torch.Tensor:
    """State of the generator from which a model on a device draws."""
    module, place = _generator(device)
    return module.get_rng_state(*place)


def set_random_state(state: torch.Tensor, device: torch.device) -> None:
    """Set what [`random_state`] returns."""
    module, place = _generator(device)
    module.set_rng_state(state, *place)


def random_states(device: torch.device) -> tuple[Any, ...]:
    """All generators that a model may draw from, as values to compare."""
    torch_states = [state.numpy().tobytes() for state in (torch.get_rng_state(), random_state(device))]
    numpy_state = np.random.get_state(legacy=False)["state"]
    return *torch_states, random.getstate(), numpy_state["key"].tobytes(), numpy_state["pos"]


@contextmanager
def generators_left_as_found(device: torch.device) -> Iterator[None]:
    """Draw no random number, as seen from outside."""
    states = torch.get_rng_state(), random_state(device), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        set_random_state(states[1], device)
        random.setstate(states[2])
        np.random.set_state(states[3])


def _generator(device: torch.device) -> tuple[Any, tuple[torch.device, ...]]:
    """What gets and sets the state, and how it is told the device."""
    if device.type in ("cpu", "meta"):
        return torch, ()
    return torch.get_device_module(device), () if device.type == "mps" else (device,)
