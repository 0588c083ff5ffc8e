"""AdaLoRA's `update_and_allocate` beside a frozen front."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..model.forward_patch import MethodPatch


def leave_frozen_ranks(model: nn.Module, frozen: Callable[[], Iterable[nn.Parameter]]) -> list[MethodPatch]:
    """
    Have AdaLoRA allocate ranks among the adapters that train, and leave those of the frozen front as they are.

    `update_and_allocate` scores each adapter by its gradient, which frozen ones have not, and sets singular values to zero. It
    finds a gradient of zero for them here, and they get their values back.

    Args:
        model (`torch.nn.Module`): the model that the training loop calls.
        frozen (`Callable`): gives the parameters that are frozen now.

    Returns:
        `list[MethodPatch]`: to be removed at the end. Empty for a model without AdaLoRA.
    """

    def allocate(original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        values = {parameter: parameter.detach().clone() for parameter in frozen() if parameter.grad is None}
        try:
            for parameter in values:
                parameter.grad = torch.zeros_like(parameter)
            return original(*args, **kwargs)
        finally:
            for parameter, value in values.items():
                parameter.grad = None
                if not torch.equal(parameter, value):
                    parameter.data.copy_(value)

    tuners = [module for module in model.modules() if hasattr(module, "rankallocator")]
    return [MethodPatch(tuner, "update_and_allocate", allocate) for tuner in tuners]
