"""Freezing a prefix of units so that it costs no backward work, and undoing it exactly."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.utils import logging

from .._compat import disable_input_grads, has_input_grads, require_checkpoint_grads, uses_reentrant_checkpointing
from ..distributed.consensus import checksum
from ..distributed.fsdp import gather_for_backward, is_sharded
from ..model.forward_patch import LeftBehind, MethodPatch
from ..model.nested import float_tensors
from ..model.tracing import leaves, set_modes
from ..model.units import BlockStack, Unit
from .kept import adapter_parameters, idle_features, kept_parameters, tied_names
from .weights import FrozenWeights

logger = logging.get_logger(__name__)

MAX_NAMES = 3


@dataclass
class _Before:
    """What a unit was like before it froze."""

    requires_grad: dict[nn.Parameter, bool]
    training: dict[nn.Module, bool]
    adapters: set[nn.Parameter]
    patches: list[MethodPatch] = field(default_factory=list)


class Freezer:
    """
    Freezes the front of a model, unit by unit, and undoes it.

    Parameters of a frozen unit require no gradient, hold none, and lose their optimizer state, but stay in the optimizer's
    groups, so that checkpoints load. Its dropout is off and its running statistics stand still, whatever `model.train()`
    says. Nothing in front of the first active unit requires a gradient, so the backward pass ends there. Under FSDP2, frozen
    weights are gathered for the forward pass only.

    Some parameters train on in a frozen unit: those that the user has picked to be trained (see
    [`~smartfrz_hf.freezing.kept.kept_parameters`]), and those that somebody makes trainable while they are frozen. The
    backward pass then reaches down to them, and a warning says so.

    Copies and pickles of the model are plain models, whose frozen parameters require no gradient.

    Args:
        stack ([`BlockStack`]): the units of the model.
        optimizer (`torch.optim.Optimizer`, *optional*): drops its state of frozen parameters.
        dtype (`torch.dtype`, *optional*): precision in which frozen blocks compute. Their own by default.

    Attributes:
        weights ([`FrozenWeights`]): holds the weights of frozen units in another precision, or in host memory.
        kept (`dict[str, torch.nn.Parameter]`): parameters of frozen units that go on training, by dotted name.
    """

    def __init__(self, stack: BlockStack, optimizer: Optimizer | None = None, dtype: torch.dtype | None = None):
        self.stack, self.optimizer = stack, optimizer
        self.weights = FrozenWeights(stack.model, dtype)
        self.kept: dict[str, nn.Parameter] = {}
        self._before: list[_Before] = []
        self._frozen: dict[nn.Parameter, str] = {}
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._mode_hook: torch.utils.hooks.RemovableHandle | None = None
        self._frozen_modules: list[nn.Module] = []
        self._undo_checkpoint_grads: Callable[[], None] = lambda: None
        self._pretrained = [module for module in stack.model.modules() if isinstance(module, PreTrainedModel)]
        self._with_input_grads: list[PreTrainedModel] = []
        self._explained: set[str] = set()

    @property
    def depth(self) -> int:
        """How many units of the front are frozen."""
        return len(self._before)

    @property
    def frozen_parameters(self) -> int:
        """Number of elements of the parameters that required a gradient before they froze."""
        flags = {p: flag for before in reversed(self._before) for p, flag in before.requires_grad.items()}
        return sum(parameter.numel() for parameter, flag in flags.items() if flag)

    @property
    def frozen_adapters(self) -> list[nn.Parameter]:
        """Parameters of PEFT's adapters that are frozen now and trained before."""
        flags = {p: flag for before in self._before for p, flag in before.requires_grad.items()}
        return [p for before in self._before for p in before.adapters if p in self._frozen and flags.get(p)]

    def freeze_to(self, depth: int) -> list[Unit]:
        """
        Freeze all units in front of `depth`.

        Args:
            depth (`int`): number of units to be frozen in all, not below the current one.

        Returns:
            `list[Unit]`: the units that froze now.

        Raises:
            ValueError: `depth` is below the current one, or above the number of units.
        """
        if not self.depth <= depth <= len(self.stack):
            raise ValueError(
                f"Cannot freeze to depth {depth}: {self.depth} of {len(self.stack)} units are frozen. "
                "Use `unfreeze_to` to go back."
            )
        new = list(self.stack.units[self.depth : depth])
        if new:
            self._disable_input_grads()
            kept = {name: p for unit in new for name, p in kept_parameters(unit).items()}
            self.kept |= kept
            for unit in new:
                self._freeze(unit)
            self._update_boundary()
            if tied := tied_names(self.stack, new, self._frozen):
                logger.warning(f"Freezing the front also freezes {', '.join(tied)}, which is the same parameter.")
            if kept:
                self._warn_of_kept(kept, "stays trainable, as it was picked to be trained")
            for unit in new:
                for idle in idle_features(unit):
                    logger.warning(f"{idle} has no effect any more, as {unit.name} is frozen and in evaluation mode.")
        return new

    def unfreeze_to(self, depth: int = 0) -> list[Unit]:
        """
        Undo freezing from `depth` on. Every flag is again what it was; the optimizer state starts anew.

        Args:
            depth (`int`, *optional*, defaults to `0`): number of units that stay frozen.

        Returns:
            `list[Unit]`: the units that train again.
        """
        units = list(self.stack.units[depth : self.depth])
        while self.depth > depth:
            before, unit = self._before[-1], self.stack.units[self.depth - 1]
            self.weights.restore(unit)
            for patch in before.patches:
                patch.remove()
            set_modes(before.training)
            for parameter, flag in before.requires_grad.items():
                parameter.requires_grad_(flag)
                self._frozen.pop(parameter, None)
            self.kept = {name: p for name, p in self.kept.items() if name not in unit.named_parameters()}
            self._before.pop()
        self._update_boundary()
        while not depth and self._with_input_grads:
            self._with_input_grads.pop().enable_input_require_grads()
        return units

    def check(self) -> list[str]:
        """
        See whether somebody has made frozen parameters trainable. They train from now on, and one warning says so.

        To be called before each optimizer step: PEFT's adapters, which every `with model.disable_adapter()` makes trainable,
        are frozen again here, before they can change.

        Returns:
            `list[str]`: dotted names of the parameters that train from now on. If there are any, DDP's reducer has to be
            rebuilt, and outputs of the frozen front are no longer constant.
        """
        self._check_gradients()
        thawed = {name: parameter for parameter, name in self._frozen.items() if parameter.requires_grad}
        if not thawed:
            return []
        adapters = set(self.frozen_adapters)
        for name, parameter in list(thawed.items()):
            if parameter in adapters:
                parameter.requires_grad_(False)
                parameter.grad = None
                del thawed[name]
        for parameter in thawed.values():
            del self._frozen[parameter]
            for before in self._before:
                before.requires_grad.pop(parameter, None)
        if thawed:
            self.kept |= thawed
            self._warn_of_kept(thawed, "was made trainable while it was frozen, and trains from now on")
        return list(thawed)

    def _check_gradients(self) -> None:
        """Say once for each depth if no unit behind the frozen front has a gradient, as in Reformer's reversible blocks."""
        place = f"gradients at depth {self.depth}"
        known = not self.depth or place in self._explained
        if not known and any(p.grad is not None for p in self.stack.model.parameters()):
            self._explained.add(place)
            active = [p for unit in self.stack.units[self.depth :] for p in unit.named_parameters().values()]
            if any(p.requires_grad for p in active) and all(p.grad is None for p in active):
                logger.warning(
                    f"No unit behind the frozen front of {type(self.stack.model).__name__} gets a gradient, so only its head "
                    'trains now: its blocks need an input that requires one. Train it with `SmartFRZConfig(policy="never")`.'
                )

    def checksum(self) -> int:
        """A number that is the same in all processes as long as the frozen parameters are. Zero under FSDP2."""
        return 0 if is_sharded(self.stack.model) else checksum(self.weights.original(p) for p in self._frozen)

    def _freeze(self, unit: Unit) -> None:
        parameters = {name: p for name, p in unit.named_parameters().items() if name not in self.kept}
        modules = [child for module in unit.modules.values() for child in module.modules()]
        before = _Before(
            {parameter: parameter.requires_grad for parameter in parameters.values()},
            {module: module.training for module in modules},
            set(adapter_parameters(unit)),
        )
        self._before.append(before)  # first, so that an exception below leaves nothing that cannot be undone
        for name, parameter in parameters.items():
            self._frozen[parameter] = name
            parameter.requires_grad_(False)
            parameter.grad = None
            if self.optimizer is not None:
                self.optimizer.state.pop(parameter, None)
        for module in unit.modules.values():
            module.eval()
            # The Trainer calls `model.train()` at each step.
            before.patches.append(MethodPatch(module, "train", lambda mode=True, module=module: module))
        if unit is not self.stack.stem:  # some models read the type of their inputs from the stem's weights
            self.weights.cast(unit)

    def _disable_input_grads(self) -> None:
        # `activation_checkpointing_enable` makes the embeddings' output require a gradient, for the sake of adapters. The
        # backward pass would then recompute every frozen block on its way down to it.
        for model in self._pretrained:
            if has_input_grads(model):
                if model not in self._with_input_grads:
                    self._with_input_grads.append(model)
                disable_input_grads(model)

    def _update_boundary(self) -> None:
        tops = [module for unit in self.stack.units[: self.depth] for module in unit.modules.values()]
        frozen = self._frozen_modules = [child for module in tops for child in module.modules()]
        gather_for_backward(self.stack.model, set(frozen))
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._mode_hook is None and frozen:
            hook = LeftBehind(self._before_backbone)
            self._mode_hook = self.stack.backbone.register_forward_pre_hook(hook)
        elif self._mode_hook is not None and not frozen:
            self._mode_hook.remove()
            self._mode_hook = None
        self._undo_checkpoint_grads()
        self._undo_checkpoint_grads = lambda: None
        block = self._first_active_block
        if block is not None:
            self._hook = block.register_forward_pre_hook(LeftBehind(self._enter_active), with_kwargs=True)
        self._require_checkpoint_grads()

    @property
    def _first_active_block(self) -> nn.Module | None:
        """`None` where the block reads its own output, which requires a gradient of course."""
        if not 0 < self.depth < len(self.stack):
            return None
        unit = self.stack.units[self.depth]
        return unit.modules[unit.name] if unit.runs_once else None

    def _require_checkpoint_grads(self) -> None:
        block = self._first_active_block
        undo = None if block is None else require_checkpoint_grads(block)
        self._undo_checkpoint_grads = undo or self._undo_checkpoint_grads

    def _before_backbone(self, *_: Any) -> None:
        """
        Models may have a `train` of their own, which sets the modes of all modules by itself. TRL turns activation checkpointing
        off and on again around each pass of a reference model and each generation.
        """
        if not torch.compiler.is_compiling():
            for module in self._frozen_modules:
                module.training = False
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

    def _explain(self, asking: list[torch.Tensor]) -> None:
        """Say once for each depth why the backward pass does not end at the frozen front."""
        unit = self.stack.units[self.depth].name
        if self.kept or unit in self._explained or torch.compiler.is_compiling():
            return
        names: dict[torch.Tensor, str] = {p: name for name, p in self.stack.model.named_parameters()}
        # Of frozen parameters, `check` tells. A unit may hold what feeds its block, such as the embeddings of a decoder.
        known = {*self._frozen, *self.stack.units[self.depth].named_parameters().values()}
        unnamed = "a tensor that is no parameter of the model"
        sources = [names.get(leaf, unnamed) for leaf in leaves(asking) if leaf not in known]
        if sources:
            self._explained.add(unit)
            logger.warning(
                f"The input of {unit}, the first unit that trains, requires a gradient because of {_listed(sources)}. It gets "
                "one, so the backward pass goes on through the frozen units, and freezing saves less. What should freeze with "
                "the stem can be named with `SmartFRZConfig(stem=[...])`."
            )

    def _warn_of_kept(self, kept: dict[str, nn.Parameter], why: str) -> None:
        logger.warning(
            f"{_listed(list(kept))} in the frozen front {why}. The backward pass goes on through the frozen units to reach "
            "it, so freezing saves less, and no activations are cached."
        )


def _listed(names: list[str]) -> str:
    """A few names, and how many more there are."""
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
