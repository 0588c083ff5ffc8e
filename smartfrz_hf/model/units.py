"""Finding the units of a model: the stem and the blocks, in the order in which they run."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from ..distributed.fsdp import is_sharded, reshard

logger = logging.get_logger(__name__)

STEM = "stem"
BY_HAND = (
    "Name the blocks by hand in execution order, with dotted names or shell patterns, such as "
    '`SmartFRZConfig(blocks=["encoder.layer.*"])`.'
)


@dataclass(frozen=True)
class Unit:
    """
    What can freeze as one.

    Attributes:
        name (`str`): `"stem"`, or the dotted name of the block in the unwrapped model.
        modules (`dict[str, torch.nn.Module]`): its outermost modules by dotted name. A block has itself, and what
            runs between it and the next block.
        own (`dict[str, torch.nn.Parameter]`): parameters that no module of `modules` holds, such as a position
            table that belongs to the backbone itself.
        runs_once (`bool`): whether its block is known to run once in a forward pass, unlike ALBERT's shared layer.
    """

    name: str
    modules: dict[str, nn.Module]
    own: dict[str, nn.Parameter] = field(default_factory=dict)
    runs_once: bool = False

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by dotted name in the unwrapped model, each once."""
        parameters = {
            f"{prefix}.{name}": parameter
            for prefix, module in self.modules.items()
            for name, parameter in module.named_parameters()
        }
        return parameters | self.own

    @property
    def trainable(self) -> bool:
        """Whether any parameter asks for a gradient now."""
        return any(parameter.requires_grad for parameter in self.named_parameters().values())


@dataclass(frozen=True)
class BlockStack:
    """
    The units of a model in execution order.

    Attributes:
        model ([`~torch.nn.Module`]): the unwrapped model.
        backbone ([`~torch.nn.Module`]): the part of it that holds stem and blocks.
        units (`tuple[Unit]`): unit 0 is the stem, units 1 to n are the blocks.
    """

    model: nn.Module
    backbone: nn.Module
    units: tuple[Unit, ...]

    def __len__(self) -> int:
        return len(self.units)

    @property
    def stem(self) -> Unit:
        """Everything the first block needs."""
        return self.units[0]

    @property
    def names(self) -> list[str]:
        """Names of the units: `"stem"`, then the dotted names of the blocks."""
        return [unit.name for unit in self.units]

    @property
    def blocks(self) -> list[nn.Module]:
        """The block modules, without what else belongs to their units."""
        return [unit.modules[unit.name] for unit in self.units[1:]]


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP, `torch.compile` and PEFT."""
    inner: Any = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False, recursive=True)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run without gradients in evaluation mode, draw no random number, and leave every module in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def find_blocks(model: nn.Module, blocks: Sequence[str] | None = None) -> BlockStack:
    """
    Find the stem and the blocks of a model.

    Blocks are the outermost [`~transformers.modeling_layers.GradientCheckpointingLayer`]s where the model has them,
    else the members of its largest `ModuleList` (MPNet's layers, ALBERT's shared layer, the stages of ConvNeXt and
    ResNet). One tiny forward pass in evaluation mode shows the order in which they run, and what else runs before
    each of them: whatever has run before the first block is stem, and whatever runs between two blocks belongs to
    the earlier one. Where a model cannot be run so, its order of registration stands in.

    Args:
        model ([`~torch.nn.Module`]): the model, wrapped (DDP, `torch.compile`, PEFT) or not.
        blocks (`list[str]`, *optional*): dotted names or shell patterns of the blocks in execution order.

    Returns:
        [`BlockStack`]

    Raises:
        ValueError: the model has no linear order of blocks, or `blocks` names none of its modules.

    Example:

    ```python
    >>> from transformers import BertConfig, BertModel
    >>> from smartfrz_hf import find_blocks

    >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=24, num_attention_heads=2, intermediate_size=32))
    >>> find_blocks(model).names
    ['stem', 'encoder.layer.0', 'encoder.layer.1']
    ```
    """
    outermost, model = model, unwrap_model(model)
    if blocks is None:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder: its decoder blocks read the encoder's end, so there is "
                f"no linear order of blocks in which a prefix could freeze. {BY_HAND}"
            )
        names = _discover(model)
    else:
        names = _match(model, blocks)
    backbone = _backbone(model, names)
    order, once = _trace(backbone, outermost)
    modules = dict(model.named_modules())
    if all(modules[name] in order for name in names):
        names.sort(key=lambda name: order[modules[name]])
    else:
        order = {}
    return BlockStack(model, backbone, _assign(model, backbone, names, order, once))


def _discover(model: nn.Module) -> list[str]:
    """Dotted names of the blocks in order of registration."""
    names = _outermost(name for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer))
    towers = [(parent, list(group)) for parent, group in groupby(names, key=_parent)]
    if len(towers) > 1:
        raise ValueError(
            f"{type(model).__name__} has {len(towers)} separate stacks of blocks "
            f"({', '.join(parent for parent, _ in towers)}), so no linear order. {BY_HAND}"
        )
    if towers:
        return towers[0][1]
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    sizes = {name: sum(p.numel() for p in lists[name].parameters()) for name in _outermost(lists)}
    if not sizes or not max(sizes.values()):
        raise ValueError(f"{type(model).__name__} has no repeated blocks that could freeze one by one. {BY_HAND}")
    first, *others = sorted(sizes, key=sizes.__getitem__, reverse=True)
    # A second stack of comparable size runs beside the first one or after it: its place is unknown.
    if others and sizes[others[0]] > sizes[first] / 4:
        raise ValueError(
            f"{type(model).__name__} has several stacks of blocks ({first}, {others[0]}), so no linear order. {BY_HAND}"
        )
    return [f"{first}.{name}" for name, _ in lists[first].named_children()]


def _match(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Dotted names of the modules that the patterns name, in the order of the patterns."""
    names: list[str] = []
    for pattern in patterns:
        found = _outermost(name for name, _ in model.named_modules() if name and fnmatchcase(name, pattern))
        if not found:
            children = ", ".join(repr(name) for name, _ in model.named_children())
            raise ValueError(
                f"`blocks` names {pattern!r}, and {type(model).__name__} has no such module. Its outermost modules "
                f"are {children}; `model.named_modules()` lists all."
            )
        names.extend(name for name in found if name not in names)
    nested = [name for name in names if name not in _outermost(names)]
    if nested:
        raise ValueError(f"`blocks` names {nested[0]!r} inside another block; blocks must not overlap.")
    return names


def _outermost(names: Iterable[str]) -> list[str]:
    """The names that lie inside no other one of them, in the given order."""
    names = list(names)
    known = set(names)

    def inside(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:i]) in known for i in range(1, len(parts)))

    return [name for name in names if not inside(name)]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _ancestors(name: str) -> list[str]:
    """`a.b.c` gives `["", "a", "a.b"]`."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _backbone(model: nn.Module, names: list[str]) -> nn.Module:
    """The base model if all blocks lie in it, else the whole model."""
    backbone = getattr(model, "base_model", model) if isinstance(model, PreTrainedModel) else model
    inside = set(backbone.modules())
    return backbone if all(model.get_submodule(name) in inside for name in names) else model


def _dummy_batch(backbone: Any) -> dict[str, torch.Tensor]:
    """The smallest input that runs the backbone."""
    if backbone.main_input_name == "pixel_values":
        # A network without positions takes any size that its strides do not bring to nothing.
        size = getattr(backbone.config, "image_size", 64)
        height, width = (size, size) if isinstance(size, int) else size
        shape = (1, backbone.config.num_channels, height, width)
        return {"pixel_values": torch.zeros(shape, device=backbone.device, dtype=backbone.dtype)}
    return {name: value.to(backbone.device) for name, value in backbone.dummy_inputs.items()}


def _trace(backbone: nn.Module, outermost: nn.Module) -> tuple[dict[nn.Module, int], set[nn.Module]]:
    """
    When each module of the backbone first starts in a forward pass, as its rank among all of them, and which modules
    start only once.

    Draws no random number, changes no mode and no running statistic. Both are empty when the model cannot be run on a
    dummy batch. FSDP2 has the whole model run, on all ranks.
    """
    if not isinstance(backbone, PreTrainedModel):
        return {}, set()
    runs = outermost if is_sharded(outermost) else backbone
    starts: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda module, _: starts.append(module)) for m in backbone.modules()]
    try:
        with evaluation_mode(runs):
            runs(**_dummy_batch(backbone))
    except Exception as error:  # the model's own code runs here, on a batch it may not expect
        logger.debug(f"{type(backbone).__name__} did not run on a dummy batch, order of registration is used: {error}")
        starts = []
        if isinstance(runs, FSDPModule):
            runs.reset_iter_state()
    finally:
        for hook in hooks:
            hook.remove()
        reshard(runs)
    counts = Counter(starts)
    return {module: rank for rank, module in enumerate(counts)}, {m for m, count in counts.items() if count == 1}


def _assign(
    model: nn.Module, backbone: nn.Module, names: list[str], order: dict[nn.Module, int], once: set[nn.Module]
) -> tuple[Unit, ...]:
    """Give each module of the backbone that lies beside the blocks to the unit after whose start it runs."""
    modules = dict(model.named_modules())
    prefix = next(name for name, module in modules.items() if module is backbone)
    spine = {ancestor for name in names for ancestor in _ancestors(name) if f"{ancestor}.".startswith(prefix)}
    starts = [order[modules[name]] for name in names] if order else []
    members: list[dict[str, nn.Module]] = [{}, *({name: modules[name]} for name in names)]
    own: dict[str, nn.Parameter] = {}
    for parent in sorted(spine, key=list(modules).index):
        before = True
        for child, module in modules[parent].named_children():
            name = f"{parent}.{child}".lstrip(".")
            if name in spine or name in names:
                before = False
                continue
            ranks = [order[m] for m in module.modules() if m in order]
            if ranks:
                unit = sum(start < min(ranks) for start in starts)
            else:  # it did not run: what is registered before the blocks feeds them, and so do shared tables
                tables = any(isinstance(m, nn.Embedding) for m in module.modules())
                unit = 0 if before or tables else len(names)
            if unit < len(names):
                members[unit][name] = module
        own |= {f"{parent}.{name}".lstrip("."): p for name, p in modules[parent].named_parameters(recurse=False)}
    blocks = [Unit(name, members[i], runs_once=modules[name] in once) for i, name in enumerate(names, start=1)]
    return Unit(STEM, members[0], own), *blocks
