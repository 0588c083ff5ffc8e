"""Models that `torch.compile` compiles: each freezing stage makes a new graph."""

import torch
from torch import nn

from .. import _compat

LIMITS = ("recompile_limit", "accumulated_recompile_limit")


def is_compiled(model: nn.Module) -> bool:
    """Whether a model, or a part of it, is compiled."""
    return any(_compat.is_compiled(module) for module in model.modules())


class GraphLimits:
    """
    Lets `torch.compile` make as many graphs after each freezing stage as it may make in a whole run otherwise. Beyond that
    number it would stop compiling.

    Args:
        wanted (`bool`): whether something is compiled; if not, nothing is changed.
    """

    def __init__(self, wanted: bool):
        self._limits = {name: getattr(_compat.compile_settings(), name) for name in LIMITS} if wanted else {}
        self._raised = False

    def extend(self) -> None:
        """To be called at each freezing stage."""
        settings = _compat.compile_settings()
        for name, limit in self._limits.items():
            setattr(settings, name, getattr(settings, name) + limit)
        self._raised = bool(self._limits)

    def restore(self) -> None:
        """Put the limits back. All graphs are dropped, since there are more of them than the limit allows."""
        for name, limit in self._limits.items():
            setattr(_compat.compile_settings(), name, limit)
        if self._raised:
            torch.compiler.reset()
        self._limits, self._raised = {}, False
