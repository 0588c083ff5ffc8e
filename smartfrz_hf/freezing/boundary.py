"""Where the backward pass has to go: modes, hooks and checkpointing of frozen units and of those next to them."""

from collections.abc import Callable, Collection
from itertools import count
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .._compat import disable_input_grads, has_input_grads, require_checkpoint_grads, uses_reentrant_checkpointing
from ..distributed.fsdp import gather_for_backward
from ..model.forward_patch import LeftBehind
from ..model.nested import float_tensors
from ..model.units import BlockStack
from .checkpointing import CheckpointedModules


def front_of(units: Collection[int]) -> int:
    """How many units from the first one on are among `units`, without a gap."""
    return next(depth for depth in count() if depth not in units)


class Boundary:
    """
    Has the backward pass end at the frozen front, and run through units that are frozen behind units that train.

    Args:
        stack ([`BlockStack`]): the units of the model.
        explain (`Callable[[list[torch.Tensor]], None]`):
            Called with the inputs of the first unit that trains which require a gradient, so that the pass goes on.
    """

    def __init__(self, stack: BlockStack, explain: Callable[[list[torch.Tensor]], None]):
        self._stack, self._explain = stack, explain
        self._frozen: frozenset[int] = frozenset()
        self._depth = 0
        self._modules: list[nn.Module] = []
        self._entry_hook: torch.utils.hooks.RemovableHandle | None = None
        self._mode_hook: torch.utils.hooks.RemovableHandle | None = None
        self._checkpointed = CheckpointedModules(())
        self._undo_checkpoint_grads: list[Callable[[], None]] = []
        self._pretrained = [module for module in stack.model.modules() if isinstance(module, PreTrainedModel)]
        self._with_input_grads: list[PreTrainedModel] = []

    def update(self, frozen: frozenset[int]) -> None:
        """
        Follow what is frozen now.

        Args:
            frozen (`frozenset[int]`): indices of the frozen units.
        """
        units = self._stack.units
        self._frozen, self._depth = frozen, front_of(frozen)
        front = [module for unit in units[: self._depth] for module in unit.submodules()]
        apart = [module for index in frozen if index > self._depth for module in units[index].submodules()]
        self._modules = [*front, *apart]
        for module in self._modules:
            module.training = False
        gather_for_backward(self._stack.model, set(front))
        self._checkpointed.remove()
        self._checkpointed = CheckpointedModules(apart)
        if self._entry_hook is not None:
            self._entry_hook.remove()
            self._entry_hook = None
        if 0 < self._depth < len(units) and units[self._depth].runs_once:
            block = units[self._depth].modules[units[self._depth].name]
            self._entry_hook = block.register_forward_pre_hook(LeftBehind(self._enter_active), with_kwargs=True)
        if self._mode_hook is None and frozen:
            hook = LeftBehind(self._before_backbone)
            self._mode_hook = self._stack.backbone.register_forward_pre_hook(hook)
        elif self._mode_hook is not None and not frozen:
            self._mode_hook.remove()
            self._mode_hook = None
        while self._undo_checkpoint_grads:
            self._undo_checkpoint_grads.pop()()
        self._require_checkpoint_grads()
        self._disable_input_grads()
        while not self._depth and self._with_input_grads:
            self._with_input_grads.pop().enable_input_require_grads()

    def _disable_input_grads(self) -> None:
        # `activation_checkpointing_enable` makes the embeddings' output require a gradient, for the sake of adapters. The
        # backward pass would then recompute every frozen block on its way down to it.
        for model in self._pretrained if self._depth else ():
            if has_input_grads(model):
                if model not in self._with_input_grads:
                    self._with_input_grads.append(model)
                disable_input_grads(model)

    def _require_checkpoint_grads(self) -> None:
        """
        For blocks that train and whose input may require no gradient: the first one, and with units frozen behind it any one,
        since the embeddings of a decoder may be frozen with the last block of its encoder.
        """
        behind = self._stack.units[max(1, self._depth) :] if self._frozen else ()
        active = [unit for index, unit in enumerate(behind, max(1, self._depth)) if index not in self._frozen]
        for unit in active if len(self._frozen) > self._depth else active[:1]:
            # A block that runs more than once reads its own output, which requires a gradient of course.
            undo = require_checkpoint_grads(unit.modules[unit.name]) if unit.runs_once else None
            self._undo_checkpoint_grads += [undo] if undo is not None else []

    def _before_backbone(self, *_: Any) -> None:
        """
        Models may have a `train` of their own, which sets the modes of all modules by itself. TRL turns activation checkpointing
        off and on again around each pass of a reference model and each generation.
        """
        if not torch.compiler.is_compiling():
            for module in self._modules:
                module.training = False
            self._checkpointed.before_pass(self._stack.backbone.training)
            self._disable_input_grads()
            self._require_checkpoint_grads()

    def _enter_active(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Runs before the first active block."""
        # Reentrant checkpointing gives the block inputs of its own, and before Transformers 5.23 this sees those.
        if not torch.is_grad_enabled() or uses_reentrant_checkpointing(module):
            return
        asking = [tensor for tensor in float_tensors((args, kwargs)) if tensor.requires_grad]
        if asking and module.training:
            self._explain(asking)
