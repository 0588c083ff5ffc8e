"""Models that `torch.compile` compiles: each freezing stage makes a new graph."""

import torch
from torch import nn
from transformers import TrainingArguments

LIMITS = ("recompile_limit", "accumulated_recompile_limit")


def is_compiled(model: nn.Module, args: TrainingArguments) -> bool:
    """Whether the training loop calls a compiled model: one that the Trainer compiles, or that came compiled."""
    return bool(args.torch_compile) or any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()
    )


class GraphLimits:
    """
    Lets `torch.compile` make as many graphs after each freezing stage as it may in a whole run without one. Where there
    are more, it goes on uncompiled.

    Args:
        wanted (`bool`): whether there is something to compile; without it nothing is changed.
    """

    def __init__(self, wanted: bool):
        self._found = {name: getattr(torch._dynamo.config, name) for name in LIMITS} if wanted else {}
        self._raised = False

    def extend(self) -> None:
        """To be called at each freezing stage."""
        for name, value in self._found.items():
            setattr(torch._dynamo.config, name, getattr(torch._dynamo.config, name) + value)
            self._raised = True

    def restore(self) -> None:
        """Put the limits back, and let go of all graphs: more than the limit would be the last that could be made."""
        for name, value in self._found.items():
            setattr(torch._dynamo.config, name, value)
        if self._raised:
            torch._dynamo.reset()
        self._found, self._raised = {}, False
