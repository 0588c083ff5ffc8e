"""In which precision the weights of frozen units compute, and where they are while nobody computes with them."""

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..model.forward_patch import ForwardPatch
from ..model.units import Unit

# What autocast runs in lower precision, too.
LAYERS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class _Held:
    """What a parameter is, while something else is in its place."""

    original: torch.Tensor
    device: torch.device
    dtype: torch.dtype


class FrozenWeights:
    """
    Puts something smaller in the place of frozen weights, and what they were back.

    The weights themselves lie in host memory meanwhile. They are what `state_dict` gives, to the last bit, and loading
    other weights into a module puts it back first. A parameter that two modules share stays as it is. A deep copy of the
    model has what stands in for the weights, not the weights.

    Args:
        model (`torch.nn.Module`): holds the units.
        dtype (`torch.dtype`, *optional*):
            Precision in which linear and convolution layers of frozen units compute, as under autocast. That of the
            model when it is not given.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None):
        self.dtype = dtype
        self._owners = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
        self._held: dict[nn.Parameter, _Held] = {}
        self._offloaded: set[nn.Parameter] = set()
        self._hooked: dict[nn.Module, list[torch.utils.hooks.RemovableHandle]] = {}
        self._patches: dict[nn.Module, ForwardPatch] = {}

    @property
    def offloaded(self) -> bool:
        """Whether some weights are in host memory only."""
        return bool(self._offloaded)

    def cast(self, unit: Unit) -> None:
        """Let a frozen unit compute in `dtype`; what enters and leaves it has the type it had."""
        if self.dtype is None:
            return
        for module in unit.modules.values():
            found = False
            for layer in (child for child in module.modules() if isinstance(child, LAYERS)):
                for parameter in self._movable(layer):
                    if parameter.is_floating_point() and parameter.itemsize > self.dtype.itemsize:
                        self._hold(layer, parameter, self.dtype)
                        parameter.data = parameter.data.to(self.dtype)
                        found = True
            if found:
                patch = ForwardPatch(module, lambda *args, **kwargs: None)
                patch.forward = functools.partial(self._run, patch)
                self._patches[module] = patch

    def restore(self, unit: Unit) -> None:
        """Undo all of it for a unit."""
        for module in unit.modules.values():
            for child in module.modules():
                self._lift(child)
                for hook in self._hooked.pop(child, []):
                    hook.remove()
            if module in self._patches:
                self._patches.pop(module).remove()

    def offload(self, modules: Iterable[nn.Module]) -> None:
        """Leave the weights of modules that do not run in host memory only; NaN without memory stands in for them."""
        for child in {child for module in modules for child in module.modules()}:
            for parameter in self._movable(child):
                self._hold(child, parameter, parameter.dtype)
                blank = torch.full((), float("nan") if parameter.is_floating_point() else 0, dtype=parameter.dtype)
                parameter.data = blank.to(parameter.device).expand(parameter.shape)
                self._offloaded.add(parameter)

    def reload(self) -> None:
        """Bring offloaded weights back."""
        for parameter in self._offloaded:
            held = self._held[parameter]
            parameter.data = held.original.to(held.device, held.dtype)
            if held.dtype == held.original.dtype:
                del self._held[parameter]
        self._offloaded.clear()

    def _movable(self, module: nn.Module) -> list[nn.Parameter]:
        return [p for p in module.parameters(recurse=False) if self._owners[p] == 1 and p.device.type != "meta"]

    def _hold(self, module: nn.Module, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        if parameter not in self._held:
            self._held[parameter] = _Held(parameter.data.cpu(), parameter.device, dtype)
        if module not in self._hooked:
            self._hooked[module] = [
                # Functions, since torch marks what it is given, and no method can be marked.
                module.register_state_dict_post_hook(lambda *found: self._give_originals(*found)),
                module.register_load_state_dict_pre_hook(lambda module, *_: self._lift(module)),
            ]

    def _give_originals(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in self._held and prefix + name in state_dict:
                state_dict[prefix + name] = self._held[parameter].original

    def _lift(self, module: nn.Module) -> None:
        """Put a module's own weights back."""
        for parameter in module.parameters(recurse=False):
            held = self._held.pop(parameter, None)
            if held is not None:
                parameter.data = held.original.to(held.device)
                self._offloaded.discard(parameter)

    def _run(self, patch: ForwardPatch, *args, **kwargs) -> Any:
        """A frozen module's forward pass."""
        found: list[torch.Tensor] = []
        recursively_apply(found.append, (args, kwargs))
        dtype = next((tensor.dtype for tensor in found if tensor.is_floating_point()), torch.get_default_dtype())
        device = found[0].device.type
        if torch.is_autocast_enabled(device):
            return patch.original(*args, **kwargs)
        with torch.autocast(device, self.dtype):
            output = patch.original(*args, **kwargs)
        return recursively_apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, output)
