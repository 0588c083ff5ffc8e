"""Standing in for a module's forward pass."""

import copy
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


class ForwardPatch:
    """
    Stands in for a module's forward pass. A copy of the module, deep or through a pickle, has its own forward pass back.

    Args:
        module (`torch.nn.Module`): whose forward pass is replaced.
        forward (`Callable`): called instead.

    Attributes:
        original (`Callable`): the module's own forward pass.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]):
        functools.update_wrapper(self, module.forward)  # signatures are looked at
        self.module, self.original, self.forward = module, module.forward, forward
        self.before = module.__dict__.get("forward")
        module.__dict__["forward"] = self

    def __call__(self, /, *args, **kwargs):
        """Run in the place of the module's own forward pass."""
        return self.forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.before is not None:
            return copy.deepcopy(self.before, memo)
        return MethodType(type(self.module).forward, memo[id(self.module)])

    def __reduce__(self) -> tuple[Callable, tuple]:
        if self.before is not None:
            return functools.partial, (self.before,)
        return getattr, (self.module, "forward")  # read before the copy has its fields, and so that of its class

    def remove(self) -> None:
        """Give the module its own forward pass back. Under another patch, which came later, this one does nothing more."""
        if self.module.__dict__.get("forward") is not self:
            self.forward = self.original
            return
        del self.module.__dict__["forward"]
        if self.before is not None:
            self.module.__dict__["forward"] = self.before
