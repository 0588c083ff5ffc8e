"""What a step of the optimizer costs."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .trace import TrainableWeights


def count_update(optimizer: Optimizer, weights: TrainableWeights, frozen: int) -> list[float]:
    """
    FLOPs of an optimizer step with nothing frozen, by unit and for the head.

    Args:
        optimizer (`torch.optim.Optimizer`): right after a step.
        weights ([`TrainableWeights`]): which unit each parameter belongs to.
        frozen (`int`): bit mask of the units that were frozen in that step.
    """
    update, elements = [0.0] * (weights.head + 1), 0.0
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        state = optimizer.state.get(parameter, {}).values()
        tensors = sum(isinstance(value, torch.Tensor) and value.shape == parameter.shape for value in state)
        unit = weights.units.get(parameter, weights.head)
        update[unit] += (2 + 5 * tensors) * _updated_here(parameter)
        elements += _updated_here(parameter)
    rate = sum(update) / elements if elements else 0.0
    for parameter, unit in weights.units.items():
        if frozen >> unit & 1:
            update[unit] += rate * _updated_here(parameter)
    return update


def _updated_here(parameter: nn.Parameter) -> float:
    """Elements that this process updates: all, or its share of them under FSDP2."""
    return parameter.numel() / (parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1)
