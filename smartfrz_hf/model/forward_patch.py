"""Replacing a module's forward pass, and hooks, so that copies and files of the model do without them."""

import copy
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """The place of a hook in copies of a model."""


class LeftBehind:
    """
    A hook that belongs to this model only: copies and pickles of the model get [`do_nothing`] in its place.

    Args:
        function (`Callable`): what the hook does.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the hook."""
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return do_nothing

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _same, (do_nothing,)


class MethodPatch:
    """
    Replaces a method of one module. Copies and pickles of the module have the original method.

    Args:
        module (`torch.nn.Module`): the module.
        name (`str`): name of the method.
        replacement (`Callable`): called with the original method, and the arguments.

    Attributes:
        original (`Callable`): the method as it was, bound to the module.
    """

    def __init__(self, module: nn.Module, name: str, replacement: Callable[..., Any]):
        # Signatures are inspected. First, as it copies attributes.
        functools.update_wrapper(self, getattr(module, name))
        self.module, self.name, self.replacement = module, name, replacement
        self.original = getattr(module, name)
        self._previous = module.__dict__.get(name)  # a patch that somebody else has made
        module.__dict__[name] = self

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:  # methods may have an argument `self` of their own
        """Run the replacement."""
        return self.replacement(self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._previous is not None:
            return copy.deepcopy(self._previous, memo)
        # The copy of a module is there before the copies of its attributes are. A method copied alone stays the original's.
        return MethodType(getattr(type(self.module), self.name), memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self._previous is not None:
            return _same, (self._previous,)
        return getattr, (self.module, self.name)  # which has no attributes of its own yet when it is loaded

    def remove(self) -> None:
        """Give the module its own method back. Under a later patch of somebody else's, this one does nothing more."""
        if self.module.__dict__.get(self.name) is not self:
            self.replacement = _run
            return
        del self.module.__dict__[self.name]
        if self._previous is not None:
            self.module.__dict__[self.name] = self._previous


class ForwardPatch(MethodPatch):
    """
    Replaces the forward pass of one module. Copies and pickles of the module have the original one.

    Args:
        module (`torch.nn.Module`): the module.
        forward (`Callable`): called with the original forward pass, and the arguments.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]):
        super().__init__(module, "forward", forward)


def _run(original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


def _same(value: Any) -> Any:
    return value
