"""Freezing a prefix of units so that it costs no backward work, and undoing it exactly."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.utils import logging

from ..distributed.fsdp import gather_for_backward
from ..model.units import BlockStack, Unit
from .weights import FrozenWeights

logger = logging.get_logger(__name__)


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for `module.train` while it is frozen: `Trainer` calls `model.train()` at each step."""
    return module


def _detach(value: Any, requires_grad: bool) -> Any:
    """Cut tensors, alone or nested, from what computed them."""
    if isinstance(value, torch.Tensor):
        if requires_grad and value.is_floating_point():
            return value.detach().requires_grad_()
        return value.detach() if value.requires_grad else value
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_detach(item, requires_grad) for item in value)
    if type(value) is dict:
        return {key: _detach(item, requires_grad) for key, item in value.items()}
    return value


def _is_reentrant(block: nn.Module) -> bool:
    """Whether the block runs under reentrant activation checkpointing, which drops all gradients of a block none of
    whose inputs asks for one (transformers#21381).
    """
    checkpoint = getattr(block, "_gradient_checkpointing_func", None)
    return bool(
        getattr(block, "gradient_checkpointing", False)
        and isinstance(checkpoint, partial)
        and checkpoint.keywords.get("use_reentrant")
    )


@dataclass
class _Found:
    """What a unit was like before it froze."""

    requires_grad: dict[nn.Parameter, bool]
    training: dict[nn.Module, bool]


class Freezer:
    """
    Freezes the front of a model, unit by unit, and undoes it.

    What freezing a unit does: its parameters ask for no gradient, hold none, and lose their optimizer state, but stay
    in the optimizer's groups, so that checkpoints load; its dropout is off and its running statistics stand still,
    whatever `model.train()` says; activation checkpointing is off in it; and the autograd graph is cut where the first
    active block starts, so that no backward work reaches it. Under FSDP2 its weights are gathered for the forward pass only.

    Args:
        stack ([`BlockStack`]): the units of the model.
        optimizer (`torch.optim.Optimizer`, *optional*): whose state of frozen parameters is dropped.
        dtype (`torch.dtype`, *optional*): precision in which frozen units compute, if not their own.

    Attributes:
        weights ([`FrozenWeights`]): where the weights of frozen units are.
    """

    def __init__(self, stack: BlockStack, optimizer: Optimizer | None = None, dtype: torch.dtype | None = None):
        self.stack, self.optimizer = stack, optimizer
        self.weights = FrozenWeights(stack.model, dtype)
        self._found: list[_Found] = []
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._had_input_grads = False

    @property
    def depth(self) -> int:
        """How many units of the front are frozen."""
        return len(self._found)

    @property
    def frozen_parameters(self) -> int:
        """How many parameters that asked for a gradient are frozen."""
        flags: dict[nn.Parameter, bool] = {}
        for found in self._found:
            for parameter, flag in found.requires_grad.items():
                flags.setdefault(parameter, flag)
        return sum(parameter.numel() for parameter, flag in flags.items() if flag)

    def freeze_to(self, depth: int) -> list[Unit]:
        """
        Freeze all units in front of `depth`.

        Args:
            depth (`int`): units of the front to be frozen, from the current depth to the number of units.

        Returns:
            `list[Unit]`: the units that froze now.

        Raises:
            ValueError: `depth` is below the current one, or beyond the last unit.
        """
        if not self.depth <= depth <= len(self.stack):
            raise ValueError(
                f"Cannot freeze to depth {depth}: {self.depth} of {len(self.stack)} units are frozen. "
                "Use `unfreeze_to` to go back."
            )
        new = list(self.stack.units[self.depth : depth])
        if new:
            self._disable_input_grads()
            for unit in new:
                self._found.append(self._freeze(unit))
            self._say_what_is_tied(new)
            self._cut()
            self._spare_gathers()
        return new

    def unfreeze_to(self, depth: int = 0) -> list[Unit]:
        """
        Undo freezing behind `depth`: every flag is again what it was. The optimizer state starts anew.

        Args:
            depth (`int`, *optional*, defaults to `0`): units of the front that stay frozen.

        Returns:
            `list[Unit]`: the units that are active again.
        """
        units = list(self.stack.units[depth : self.depth])
        while self.depth > depth:
            found = self._found.pop()
            self.weights.restore(self.stack.units[self.depth])
            for module in self.stack.units[self.depth].modules.values():
                module.__dict__.pop("train", None)
            for module, mode in found.training.items():
                module.training = mode
            for parameter, flag in found.requires_grad.items():
                parameter.requires_grad_(flag)
        self._cut()
        self._spare_gathers()
        if not self.depth and self._had_input_grads:
            model: Any = self.stack.model
            model.enable_input_require_grads()
            self._had_input_grads = False
        return units

    def _freeze(self, unit: Unit) -> _Found:
        parameters = unit.named_parameters().values()
        found = _Found(
            {parameter: parameter.requires_grad for parameter in parameters},
            {child: child.training for module in unit.modules.values() for child in module.modules()},
        )
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
            if self.optimizer is not None:
                self.optimizer.state.pop(parameter, None)
        for module in unit.modules.values():
            module.eval()
            module.__dict__["train"] = partial(_stay, module)
        if unit is not self.stack.stem:  # whose weights tell some models the type of their inputs
            self.weights.cast(unit)
        return found

    def _disable_input_grads(self) -> None:
        # `activation_checkpointing_enable` makes the embeddings' output ask for a gradient, and then backward
        # recomputes every frozen block on its way down to it.
        model: Any = self.stack.model
        if getattr(model, "_require_grads_hooks", None):
            self._had_input_grads = True
            model.disable_input_require_grads()

    def _cut(self) -> None:
        """Detach whatever enters the first active block."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if not 0 < self.depth < len(self.stack):
            return
        unit = self.stack.units[self.depth]

        def cut(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            requires_grad = torch.is_grad_enabled() and _is_reentrant(module)
            return _detach(args, requires_grad), _detach(kwargs, requires_grad)

        # A block that runs again reads its own output there, which must not be cut: behind a frozen stem nothing asks
        # for a gradient anyway.
        if unit.runs_once:
            self._hook = unit.modules[unit.name].register_forward_pre_hook(cut, with_kwargs=True)

    def _spare_gathers(self) -> None:
        frozen = [module for unit in self.stack.units[: self.depth] for module in unit.modules.values()]
        gather_for_backward(self.stack.model, {child for module in frozen for child in module.modules()})

    def _say_what_is_tied(self, units: list[Unit]) -> None:
        frozen = {p: name for unit in units for name, p in unit.named_parameters().items()}
        inside = {name for unit in self.stack.units for name in unit.named_parameters()}
        tied = [
            f"{name} (tied to {frozen[p]})"
            for name, p in self.stack.model.named_parameters(remove_duplicate=False)
            if p in frozen and name not in inside
        ]
        if tied:
            logger.warning(f"Freezing the front also freezes {', '.join(tied)}, which is the same parameter.")
