"""The weights of frozen units: in which precision they compute, and where they are while nothing computes with them."""

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .._compat import without_torch_function
from ..model.forward_patch import ForwardPatch, LeftBehind
from ..model.nested import tensors_in
from ..model.units import Unit

logger = logging.get_logger(__name__)

# The layers that autocast runs in lower precision, too.
LAYERS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class _Held:
    """The data of a parameter, while a replacement is in its place."""

    original: torch.Tensor
    device: torch.device
    dtype: torch.dtype


# What tells of a parameter without reading its weights.
_TELLS = {
    getattr(torch.Tensor, name).__get__
    for name in (
        "device",
        "dtype",
        "grad",
        "is_leaf",
        "layout",
        "ndim",
        "requires_grad",
        "shape",
        "_version",
    )
} | {
    torch.Tensor.data_ptr,
    torch.Tensor.dim,
    torch.Tensor.element_size,
    torch.Tensor.is_complex,
    torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_inference,
    torch.Tensor.numel,
    torch.Tensor.requires_grad_,
    torch.Tensor.size,
    torch.Tensor.stride,
}


class OffloadedParameter(nn.Parameter):
    """
    The class of a parameter while its weights are in host memory only. Whoever reads it, such as a moving average of the model,
    gets all of them back first.
    """

    bring_back: Callable[[], None]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function not in _TELLS:
            for tensor in tensors_in((args, kwargs or {})):
                if isinstance(tensor, OffloadedParameter):
                    tensor.bring_back()
        with without_torch_function():
            return function(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        self.bring_back()  # makes it a plain parameter
        return copy.deepcopy(self, memo)


class FrozenWeights:
    """
    Replaces frozen weights by something smaller, and brings them back.

    The weights themselves are in host memory meanwhile. `state_dict`, copies and pickles of the model give them bit for bit, and
    loading other weights into a module brings its own back first. A parameter that two modules share, or that trains, is left
    alone.

    Args:
        model (`torch.nn.Module`): holds the units.
        dtype (`torch.dtype`, *optional*):
            Precision in which linear and convolution layers of frozen units compute, as under autocast. The model's own when
            it is not given.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None):
        self.dtype = dtype
        self._owners = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
        self._held: dict[nn.Parameter, _Held] = {}
        self._offloaded: set[nn.Parameter] = set()
        self._read = False
        self._hooked: dict[nn.Module, list[torch.utils.hooks.RemovableHandle]] = {}
        self._patches: dict[nn.Module, ForwardPatch] = {}

    @property
    def offloaded(self) -> bool:
        """Whether some weights are in host memory only."""
        return bool(self._offloaded)

    def original(self, parameter: nn.Parameter) -> torch.Tensor:
        """The data of a parameter, also while it is replaced."""
        return self._held[parameter].original if parameter in self._held else parameter.data

    def cast(self, unit: Unit) -> None:
        """Let a frozen unit compute in `dtype`. Its inputs and outputs keep their type."""
        if self.dtype is None:
            return
        for module in unit.modules.values():
            layers = [child for child in module.modules() if isinstance(child, LAYERS)]
            larger = [
                (layer, parameter)
                for layer in layers
                for parameter in self._replaceable(layer)
                if parameter.is_floating_point() and parameter.itemsize > self.dtype.itemsize
            ]
            for layer, parameter in larger:
                self._hold(layer, parameter, self.dtype)
                parameter.data = parameter.data.to(self.dtype)
            if larger:
                self._patches[module] = ForwardPatch(module, self._run)

    def restore(self, unit: Unit) -> None:
        """Undo everything for one unit."""
        for module in unit.modules.values():
            for child in module.modules():
                self._bring_back(child)
                for hook in self._hooked.pop(child, []):
                    hook.remove()
                child.__dict__.pop("__getstate__", None)
            if module in self._patches:
                self._patches.pop(module).remove()

    def offload(self, modules: Iterable[nn.Module]) -> None:
        """
        Keep the weights of modules that do not run in host memory only. NaN that takes no memory replaces them. Does nothing
        once somebody has read weights that were away, since they would come back each time.
        """
        if self._read:
            return
        for child in {child for module in modules for child in module.modules()}:
            for parameter in self._replaceable(child):
                self._hold(child, parameter, parameter.dtype)
                blank = parameter.data.new_full((), float("nan") if parameter.is_floating_point() else 0)
                parameter.data = blank.expand(parameter.shape)
                parameter.__class__ = OffloadedParameter
                vars(parameter)["bring_back"] = self._bring_all_back
                self._offloaded.add(parameter)

    def reload(self) -> None:
        """Bring offloaded weights back."""
        for parameter in self._offloaded:
            held = self._held[parameter]
            _make_plain(parameter)
            parameter.data = held.original.to(held.device, held.dtype)
            if held.dtype == held.original.dtype:
                del self._held[parameter]
        self._offloaded.clear()

    def _replaceable(self, module: nn.Module) -> list[nn.Parameter]:
        parameters = module.parameters(recurse=False)
        return [
            p
            for p in parameters
            if self._owners[p] == 1 and p.device.type != "meta" and not p.requires_grad and type(p) is nn.Parameter
        ]

    def _bring_all_back(self) -> None:
        if not self._read:
            self._read = True
            logger.warning(
                "`offload_frozen`: the weights of the frozen front are read outside the forward pass, so they stay on the device."
            )
        self.reload()

    def _hold(self, module: nn.Module, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        if parameter not in self._held:
            self._held[parameter] = _Held(parameter.data.cpu(), parameter.device, dtype)
        if module not in self._hooked:
            self._hooked[module] = [
                module.register_state_dict_pre_hook(LeftBehind(lambda module, *_: self._mark(module, nn.Parameter))),
                module.register_state_dict_post_hook(LeftBehind(self._give_originals)),
                module.register_load_state_dict_pre_hook(LeftBehind(lambda module, *_: self._bring_back(module))),
            ]
            module.__dict__["__getstate__"] = functools.partial(self._state_of_copy, module)

    def _state_of_copy(self, module: nn.Module) -> dict[str, Any]:
        """The attributes of a module for a copy or a pickle of it: those that it has without any of this."""
        state = {key: value for key, value in module.__dict__.items() if key != "__getstate__"}
        state["_parameters"] = {
            name: parameter if parameter not in self._held else self._copied(parameter)
            for name, parameter in state["_parameters"].items()
        }
        return state

    def _copied(self, parameter: nn.Parameter) -> nn.Parameter:
        held = self._held[parameter]
        return nn.Parameter(held.original.to(held.device), requires_grad=parameter.requires_grad)

    def _give_originals(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in self._held and prefix + name in state_dict:
                state_dict[prefix + name] = self._held[parameter].original
        self._mark(module, OffloadedParameter)

    def _mark(self, module: nn.Module, kind: type[nn.Parameter]) -> None:
        """Have the offloaded weights of one module bring themselves back when they are read, or not."""
        for parameter in self._offloaded.intersection(module.parameters(recurse=False)):
            parameter.__class__ = kind

    def _bring_back(self, module: nn.Module) -> None:
        """Give a module its own weights."""
        for parameter in module.parameters(recurse=False):
            held = self._held.pop(parameter, None)
            if held is not None:
                _make_plain(parameter)
                parameter.data = held.original.to(held.device)
                self._offloaded.discard(parameter)

    def _run(self, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of a frozen module."""
        tensors = tensors_in((args, kwargs))
        dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())
        device = tensors[0].device.type
        if torch.is_autocast_enabled(device):
            return original(*args, **kwargs)
        with torch.autocast(device, self.dtype):
            output = original(*args, **kwargs)
        return recursively_apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, output)


def _make_plain(parameter: nn.Parameter) -> None:
    parameter.__class__ = nn.Parameter
    vars(parameter).pop("bring_back", None)
