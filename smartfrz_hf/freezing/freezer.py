"""Freezing units so that they cost no more backward work than they must, and undoing it exactly."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.utils import logging

from ..distributed.consensus import checksum
from ..distributed.fsdp import is_sharded
from ..model.forward_patch import MethodPatch
from ..model.tracing import set_modes
from ..model.units import BlockStack, Unit
from .boundary import Boundary, front_of
from .explain import Explanations
from .kept import adapter_parameters, idle_features, kept_parameters, tied_names
from .weights import FrozenWeights

logger = logging.get_logger(__name__)


@dataclass
class _Before:
    """What a unit was like before it froze."""

    requires_grad: dict[nn.Parameter, bool]
    training: dict[nn.Module, bool]
    adapters: set[nn.Parameter]
    patches: list[MethodPatch] = field(default_factory=list)


class Freezer:
    """
    Freezes units of a model, and undoes it.

    Parameters of a frozen unit require no gradient, hold none, and lose their optimizer state, but stay in the optimizer's
    groups, so that checkpoints load. Its dropout is off and its running statistics stand still, whatever `model.train()`
    says. Nothing in front of the first active unit requires a gradient, so the backward pass ends there. Under FSDP2, the
    weights of this front are gathered for the forward pass only.

    A unit may also be frozen *apart*, behind one that trains. No gradient of its weights is computed, but the backward pass
    runs through it to reach the units in front. Once all of these are frozen, it is a part of the front.

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
        self._before: dict[int, _Before] = {}  # by index of the frozen unit, in the order in which they froze
        self._frozen: dict[nn.Parameter, str] = {}
        self._explanations = Explanations(stack)
        self._boundary = Boundary(stack, self._explain)

    @property
    def frozen(self) -> frozenset[int]:
        """Indices of all frozen units."""
        return frozenset(self._before)

    @property
    def depth(self) -> int:
        """How many units of the front are frozen."""
        return front_of(self._before)

    @property
    def apart(self) -> frozenset[int]:
        """Indices of the units that are frozen behind units that train."""
        return self.frozen.difference(range(self.depth))

    @property
    def frozen_parameters(self) -> int:
        """Number of elements of the parameters that required a gradient before they froze."""
        flags = {p: flag for before in reversed(self._before.values()) for p, flag in before.requires_grad.items()}
        return sum(parameter.numel() for parameter, flag in flags.items() if flag)

    @property
    def frozen_adapters(self) -> list[nn.Parameter]:
        """Parameters of PEFT's adapters that are frozen now and trained before."""
        flags = {p: flag for before in self._before.values() for p, flag in before.requires_grad.items()}
        return [p for before in self._before.values() for p in before.adapters if p in self._frozen and flags.get(p)]

    def freeze_to(self, depth: int) -> list[Unit]:
        """
        Freeze all units in front of `depth`.

        Args:
            depth (`int`): number of units of the front to be frozen in all, not below the current one.

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
        return self.freeze(range(depth))

    def freeze(self, units: Iterable[int]) -> list[Unit]:
        """
        Freeze units wherever they are. Those that are frozen already stay so.

        Args:
            units (`Iterable[int]`): indices of units.

        Returns:
            `list[Unit]`: the units that froze now.

        Raises:
            ValueError: there is no unit with such an index.
        """
        indices = sorted(set(units) - self.frozen)
        if outside := [index for index in indices if not 0 <= index < len(self.stack)]:
            raise ValueError(f"There is no unit {outside[0]}; the units have the numbers 0 to {len(self.stack) - 1}.")
        new = [self.stack.units[index] for index in indices]
        if new:
            kept = {name: p for unit in new for name, p in kept_parameters(unit).items()}
            self.kept |= kept
            for index in indices:
                self._freeze(index)
            self._boundary.update(self.frozen)
            trained = {p for index in indices for p, flag in self._before[index].requires_grad.items() if flag}
            if tied := tied_names(self.stack, new, trained):
                logger.warning(f"Freezing the front also freezes {', '.join(tied)}, which is the same parameter.")
            if kept:
                self._explanations.kept(list(kept), "stays trainable, as it was picked to be trained")
            for unit in new:
                for idle in idle_features(unit):
                    logger.warning(f"{idle} has no effect any more, as {unit.name} is frozen and in evaluation mode.")
        return new

    def unfreeze_to(self, depth: int = 0) -> list[Unit]:
        """
        Undo freezing from `depth` on. Every flag is again what it was; the optimizer state starts anew.

        Args:
            depth (`int`, *optional*, defaults to `0`): number of units of the front that stay frozen.

        Returns:
            `list[Unit]`: the units that train again.
        """
        indices = [index for index in self._before if index >= depth]
        for index in reversed(indices):
            before, unit = self._before[index], self.stack.units[index]
            self.weights.restore(unit)
            for patch in before.patches:
                patch.remove()
            set_modes(before.training)
            for parameter, flag in before.requires_grad.items():
                parameter.requires_grad_(flag)
                self._frozen.pop(parameter, None)
            self.kept = {name: p for name, p in self.kept.items() if name not in unit.named_parameters()}
            del self._before[index]
        self._boundary.update(self.frozen)
        return [self.stack.units[index] for index in sorted(indices)]

    def check(self) -> list[str]:
        """
        See whether somebody has made frozen parameters trainable. They train from now on, and one warning says so.

        To be called before each optimizer step: PEFT's adapters, which every `with model.disable_adapter()` makes trainable,
        are frozen again here, before they can change.

        Returns:
            `list[str]`: dotted names of the parameters that train from now on. If there are any, DDP's reducer has to be
            rebuilt, and outputs of the frozen front are no longer constant.
        """
        self._explanations.no_gradients(self.depth)
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
            for before in self._before.values():
                before.requires_grad.pop(parameter, None)
        if thawed:
            self.kept |= thawed
            why = "was made trainable while it was frozen, and trains from now on"
            self._explanations.kept(list(thawed), why)
        return list(thawed)

    def checksum(self) -> int:
        """A number that is the same in all processes as long as the frozen parameters are. Zero under FSDP2."""
        return 0 if is_sharded(self.stack.model) else checksum(self.weights.original(p) for p in self._frozen)

    def _freeze(self, index: int) -> None:
        unit = self.stack.units[index]
        parameters = {name: p for name, p in unit.named_parameters().items() if name not in self.kept}
        before = _Before(
            {parameter: parameter.requires_grad for parameter in parameters.values()},
            {module: module.training for module in unit.submodules()},
            set(adapter_parameters(unit)),
        )
        self._before[index] = before  # first, so that an exception below leaves nothing that cannot be undone
        for name, parameter in parameters.items():
            self._frozen[parameter] = name
            parameter.requires_grad_(False)
            parameter.grad = None
            if self.optimizer is not None:
                self.optimizer.state.pop(parameter, None)
        for module in unit.modules.values():
            module.eval()
            # The Trainer calls `model.train()` at each step.
            before.patches.append(MethodPatch(module, "train", lambda original, mode=True, module=module: module))
        if unit is not self.stack.stem:  # some models read the type of their inputs from the stem's weights
            self.weights.cast(unit)

    def _explain(self, asking: list[torch.Tensor]) -> None:
        if not self.kept:
            self._explanations.input_requires_grad(self.stack.units[self.depth], asking, set(self._frozen))
