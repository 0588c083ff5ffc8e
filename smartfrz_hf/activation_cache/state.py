"""What the output of a frozen front depends on besides its inputs: weights, settings of its modules, hooks."""

import hashlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from .._compat import (
    CHECKPOINT_FUNCTION,
    OUTPUTS_RECORDED,
    forward_hooks,
    has_global_forward_hooks,
    is_compiled,
    records_outputs,
    tensor_tables,
    tensor_version,
)
from ..model.forward_patch import ForwardPatch
from ..model.nested import tensors_in
from ..model.units import BlockStack
from .calls import as_integers

# Fields of every module; what others a module has are its settings.
# `FrozenWeights` puts `__getstate__` there.
COMMON_FIELDS = frozenset(vars(nn.Module())) - {"training"} | {OUTPUTS_RECORDED, CHECKPOINT_FUNCTION, "__getstate__"}
SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype)
# In each call, at most about so many elements of the weights are compared with what they were, evenly spread; of small fronts all.
PROBED_ELEMENTS = 2**18


class FrontState:
    """
    Looks, before each call of the backbone, at all that can change what its frozen front returns.

    Weights are compared in three ways: by place in memory and version, which shows most changes; by some of their elements, since
    a change through `.data` has no version; and by checksums of all elements whenever the first two differ, and when the
    model goes from training to evaluation or back, which is where averaged weights are exchanged.

    Args:
        stack ([`BlockStack`]): the units of the model.
        entry (`torch.nn.Module`): the module whose forward pass runs the front.

    Attributes:
        obstacle (`str`, *optional*): why the front must run as a whole, for all rows: somebody's hook on one of its
            modules, or a part of it that trains.
        variant (`bytes`): what differs among the plain attributes of its modules (modes, active adapters, their scaling) from
            what they were when their unit froze. Rows of another variant are kept beside each other.
        fronts (`dict[int, int]`): for each digest of weights and attributes of units `0` to `depth - 1`, that `depth`. Rows that
            were computed by a front which is not among them are not used.
    """

    def __init__(self, stack: BlockStack, entry: nn.Module):
        self.obstacle: str | None = None
        self.variant = b""
        self.fronts: dict[int, int] = {}
        self._stack, self._entry, self._depth = stack, entry, 0
        self._patches: dict[nn.Module, ForwardPatch] = {}
        self._modules: list[tuple[str, nn.Module, int]] = []
        self._children: list[list[int]] = []
        self._first_settings: list[dict] = []
        self._settings: list[dict] = []
        self._functions: list[int] = []
        self._functions_changed = 0
        self._training: bool | None = None
        self._tensors: list[list[torch.Tensor]] = []
        self._versions: list[tuple[int, int]] = []
        self._sums: list[int] = []
        self._probes: list[list[torch.Tensor]] = []
        self._probed: list[torch.Tensor] = []

    @property
    def front(self) -> int:
        """The digest of the whole front as it is now."""
        return next(reversed(self.fronts))

    def watch(self, depth: int, patches: dict[nn.Module, ForwardPatch]) -> None:
        """
        Watch the front of `depth` units from now on.

        Args:
            depth (`int`): units of the front.
            patches (`dict[torch.nn.Module, ForwardPatch]`): the cache's own, by block.
        """
        self._depth, self._patches = depth, patches
        self._list_modules()
        self._functions = []
        self.look()
        self._first_settings += self._settings[len(self._first_settings) :]
        self._compare_settings()

    def look(self) -> bool:
        """Look at everything. Returns whether the front is another one than at the last look."""
        if [[*map(id, module.children())] for _, module, _ in self._modules] != self._children:
            self._list_modules()
        changed = self._read_modules()
        everything, self._training = self._training != self._entry.training, self._entry.training
        changed |= self._read_weights(everything)
        if changed or not self.fronts:
            self._name_fronts()
        return changed

    def accept_weights(self) -> None:
        """Take the weights as they are for those of the last look, as after they were moved to host memory or back."""
        self._read_modules()
        flat = [tensor for tensors in self._tensors for tensor in tensors]
        self._versions = [_version(tensor) for tensor in flat]
        self._set_probes(flat)

    def _list_modules(self) -> None:
        units = enumerate(self._stack.units[: self._depth])
        listed = {module: i for i, unit in units for module in unit.submodules()}
        blocks = set(self._stack.blocks)
        self._modules, self._children = [], []
        for name, module in self._entry.named_modules():
            # Modules around the blocks belong to the front, too: their own code runs between the blocks.
            if module in listed or not blocks.isdisjoint(module.modules()) and module not in blocks:
                self._modules.append((name, module, listed.get(module, 0)))
                self._children.append([*map(id, module.children())])
        self._sums = []

    def _read_modules(self) -> bool:
        """Read the settings and find the tensors and hooks of all modules. Returns whether a setting has changed."""
        self.obstacle = "somebody has put forward hooks on all modules" if has_global_forward_hooks() else None
        settings: list[dict] = [{} for _ in range(self._depth)]
        tensors: list[list[torch.Tensor]] = [[*self._stack.stem.own.values()], *([] for _ in range(self._depth - 1))]
        functions: list[int] = []
        configs: dict[int, PreTrainedConfig] = {}
        for name, module, unit in self._modules:
            for table in tensor_tables(module):
                tensors[unit].extend(tensor for tensor in table.values() if tensor is not None)
            for field, value in vars(module).items():
                if field in COMMON_FIELDS:
                    continue
                if isinstance(value, torch.Tensor):
                    tensors[unit].append(value)
                elif isinstance(value, PreTrainedConfig):
                    configs[id(value)] = value
                elif callable(value) and not isinstance(value, nn.Module):
                    functions.append(id(value))
                else:
                    tensors[unit].extend(_tensors_of(value))
                    settings[unit][name, field] = _plain(value)
            if module is not self._entry and not all(records_outputs(hook) for hook in forward_hooks(module)):
                self.obstacle = f"somebody has put a forward hook on {name}"
            if is_compiled(module):
                self.obstacle = f"{name or 'the model'} is compiled"
            if module in self._patches and vars(module).get("forward") is not self._patches[module]:
                self.obstacle = f"somebody has replaced the forward pass of {name}"
        for config in configs.values():
            # Names in it are filled in by some models on their way.
            numbers = {field: v for field, v in vars(config).items() if isinstance(v, bool | int | float)}
            settings[0] |= {("", field): v for field, v in numbers.items() if field != "use_cache"}
        if torch.is_grad_enabled() and any(tensor.requires_grad for part in tensors for tensor in part):
            self.obstacle = self.obstacle or "a part of the front trains"
        if functions != self._functions:
            self._functions_changed += bool(self._functions)
            self._functions = functions
        settings[0]["", "functions"] = self._functions_changed
        self._tensors = tensors
        if settings == self._settings:
            return False
        self._settings = settings
        self._compare_settings()
        return True

    def _compare_settings(self) -> None:
        changes = {
            repr((key[1], before.get(key), now.get(key)))
            for now, before in zip(self._settings, self._first_settings, strict=False)
            if now != before
            for key in now.keys() | before.keys()
            if now.get(key) != before.get(key)
        }
        self.variant = repr(sorted(changes)).encode() if changes else b""

    def _read_weights(self, everything: bool) -> bool:
        """Returns whether an element has changed, as far as can be seen; `everything` has all elements looked at."""
        flat = [tensor for tensors in self._tensors for tensor in tensors]
        versions = [_version(tensor) for tensor in flat]
        if not everything and versions == self._versions:
            if all(torch.equal(now, before) for now, before in zip(self._gather(), self._probed, strict=True)):
                return False
            everything = True  # through `.data`
        if everything or len(self._sums) != len(flat):
            self._versions, sums = [(0, 0)] * len(flat), [0] * len(flat)
        else:
            sums = list(self._sums)
        which = [i for i, (now, before) in enumerate(zip(versions, self._versions, strict=True)) if now != before]
        for i, checksum in zip(which, _checksums([flat[i] for i in which]), strict=True):
            sums[i] = checksum
        changed, self._sums, self._versions = sums != self._sums, sums, versions
        self._set_probes(flat)
        return changed

    def _name_fronts(self) -> None:
        self.fronts, digest, place = {}, hashlib.blake2b(digest_size=8), 0
        for depth, (tensors, settings) in enumerate(zip(self._tensors, self._settings, strict=True), start=1):
            digest.update(repr((self._sums[place : place + len(tensors)], settings)).encode())
            place += len(tensors)
            self.fronts[int.from_bytes(digest.digest(), "little")] = depth

    def _set_probes(self, flat: list[torch.Tensor]) -> None:
        count = max(64, PROBED_ELEMENTS // max(1, len(flat)))
        views: dict[tuple, list[torch.Tensor]] = {}
        for tensor in flat:
            if tensor.numel() and _is_dense(tensor):
                bits = as_integers(tensor.detach().as_strided((tensor.numel(),), (1,))).reshape(-1)
                step = -(-len(bits) // count)
                views.setdefault((bits.dtype, bits.device), []).append(bits[::step])
        self._probes = list(views.values())
        self._probed = self._gather()

    def _gather(self) -> list[torch.Tensor]:
        return [torch.cat(views) for views in self._probes]


def _tensors_of(value: Any) -> list[torch.Tensor]:
    """Tensors in a container, nested, or in the attributes of an object."""
    if isinstance(value, (*SIMPLE, nn.Module)):
        return []
    if isinstance(value, deque):
        return tensors_in(list(value))
    return tensors_in(value if isinstance(value, list | tuple | dict) else getattr(value, "__dict__", None))


def _plain(value: Any) -> Any:
    """Plain values, alone, nested, or as attributes of an object; the name of the type for anything else."""
    if isinstance(value, SIMPLE):
        return value
    if isinstance(value, np.generic | np.ndarray):
        return value.tobytes()
    if isinstance(value, list | tuple | deque | set | frozenset | dict) and len(value) <= 64:
        parts = value.items() if isinstance(value, dict) else sorted(value, key=repr) if _is_set(value) else value
        return tuple(_plain(part) for part in parts)
    fields = getattr(value, "__dict__", {}) if not isinstance(value, torch.Tensor | nn.Module) else {}
    plain = ((name, field) for name, field in fields.items() if isinstance(field, SIMPLE))
    return type(value).__name__, *sorted(plain, key=repr)


def _is_set(value: Any) -> bool:
    return isinstance(value, set | frozenset)


def _version(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor_version(tensor)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements lie in memory without gaps, in whatever order."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return last + 1 == tensor.numel()


def _checksums(tensors: list[torch.Tensor]) -> list[int]:
    sums = [as_integers(tensor.detach().contiguous().reshape(-1)).sum(dtype=torch.int64) for tensor in tensors]
    return [int(value) for value in _to_host(sums)]


def _to_host(values: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Numbers from one or several devices, with one transfer per device."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for value in values:
        by_device.setdefault(value.device, []).append(value)
    moved = {device: iter(torch.stack(group).cpu()) for device, group in by_device.items()}
    for value in values:
        yield next(moved[value.device])
