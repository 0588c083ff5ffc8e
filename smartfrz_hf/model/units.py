"""The units of a model: the stem and the blocks, in the order in which they run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from .discovery import NoOrderError, ancestors, describe, find_stacks, hint, match, stack_of
from .stem import STEM, assign
from .tracing import Inputs, Trace, trace


@dataclass(frozen=True, eq=False, repr=False)
class Unit:
    """
    A part of the model that freezes as one.

    Attributes:
        name (`str`): `"stem"`, or the dotted name of the block in the unwrapped model.
        modules (`dict[str, torch.nn.Module]`): the outermost modules of the unit by dotted name. A block's unit has the
            block, and the modules whose output the next block reads without this block.
        own (`dict[str, torch.nn.Parameter]`): parameters that no module of `modules` holds, such as a position table that
            belongs to the backbone itself.
        runs_once (`bool`): whether the block is known to run once in a forward pass, unlike ALBERT's shared layer.
        shared (`frozenset[str]`): names of parameters in `modules` that are an earlier unit's, too, and belong to that.
    """

    name: str
    modules: dict[str, nn.Module]
    own: dict[str, nn.Parameter] = field(default_factory=dict)
    runs_once: bool = False
    shared: frozenset[str] = frozenset()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by dotted name in the unwrapped model, each once."""
        parameters = {
            f"{prefix}.{name}": parameter
            for prefix, module in self.modules.items()
            for name, parameter in module.named_parameters()
            if f"{prefix}.{name}" not in self.shared
        }
        return parameters | self.own

    def submodules(self) -> list[nn.Module]:
        """All modules, at all levels."""
        return [child for module in self.modules.values() for child in module.modules()]

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers, such as running statistics, by dotted name in the unwrapped model."""
        buffers = {
            f"{prefix}.{name}": buffer
            for prefix, module in self.modules.items()
            for name, buffer in module.named_buffers()
        }
        return {**self.named_parameters(), **buffers}

    @property
    def trainable(self) -> bool:
        """Whether any parameter requires a gradient now."""
        return any(parameter.requires_grad for parameter in self.named_parameters().values())

    @property
    def parameter_count(self) -> int:
        """Number of elements of all parameters."""
        return sum(parameter.numel() for parameter in self.named_parameters().values())

    def __repr__(self) -> str:
        return f"{self.name}: {self.parameter_count:,} parameters, {'trainable' if self.trainable else 'frozen'}"


@dataclass(frozen=True, eq=False, repr=False)
class BlockStack:
    """
    The units of a model in execution order: a sequence, which also finds a unit by name.

    Attributes:
        model ([`~torch.nn.Module`]): the unwrapped model.
        backbone ([`~torch.nn.Module`]): the part of it that holds the stem and the blocks.
        units (`tuple[Unit]`): unit 0 is the stem, units 1 to n are the blocks.
        bypassed (`frozenset[str]`): names of parameters that the backbone's main output does not depend on, such as those
            of BERT's pooler. A loss may never reach them.
        problem (`str`): why not all is known about the order in which the model runs. Empty if it is.
    """

    model: nn.Module
    backbone: nn.Module
    units: tuple[Unit, ...]
    bypassed: frozenset[str] = frozenset()
    problem: str = ""

    def __len__(self) -> int:
        return len(self.units)

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.units)

    @overload
    def __getitem__(self, key: int | str) -> Unit: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Unit, ...]: ...
    def __getitem__(self, key):
        if not isinstance(key, str):
            return self.units[key]
        if key not in self.names:
            raise KeyError(f"There is no unit {key!r}; the units are {', '.join(self.names)}.")
        return self.units[self.names.index(key)]

    def __contains__(self, unit: object) -> bool:
        return unit in self.units or unit in self.names

    def __repr__(self) -> str:
        lines = [f"  {index:>3}  {unit}" for index, unit in enumerate(self.units)]
        lines += [f"  {self.problem}"] if self.problem else []
        return "\n".join([f"{len(self)} units of {type(self.model).__name__}", *lines])

    @property
    def stem(self) -> Unit:
        """Everything that the first block reads."""
        return self.units[0]

    @property
    def names(self) -> list[str]:
        """Names of the units: `"stem"`, then the dotted names of the blocks."""
        return [unit.name for unit in self.units]

    @property
    def blocks(self) -> list[nn.Module]:
        """The block modules, without what else belongs to their units."""
        return [unit.modules[unit.name] for unit in self.units[1:]]

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters outside all units, by dotted name."""
        inside = {parameter for unit in self.units for parameter in unit.named_parameters().values()}
        return {name: p for name, p in self.model.named_parameters() if p not in inside}

    def deepest_safe_depth(self) -> int:
        """
        The largest number of units that may freeze so that the loss still depends on something trainable.

        That is all units if the head has trainable parameters, and else the index of the last trainable unit. Where the
        backbone is all there is, parameters that its main output does not depend on do not count: the loss of a sentence
        encoder does not read BERT's pooler.
        """
        head = self.head_parameters()
        inside = set(self.backbone.parameters())
        unread = self.bypassed if inside.issuperset(self.model.parameters()) else frozenset()
        if any(parameter.requires_grad and name not in unread for name, parameter in head.items()):
            return len(self)
        return max((index for index, unit in enumerate(self.units) if unit.trainable), default=0)


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP, `torch.compile` and PEFT."""
    inner: Any = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False, recursive=True)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def find_blocks(
    model: nn.Module,
    blocks: Sequence[str] | None = None,
    stem: Sequence[str] | None = None,
    inputs: Inputs = None,
) -> BlockStack:
    """
    Find the stem and the blocks of a model.

    Blocks are what repeats: the members of the model's outermost `ModuleList`s, and members of one type of its `Sequential`s
    (see [`~smartfrz_hf.model.discovery.find_stacks`]): transformer layers, the stages of a convolutional network. A model may
    have several stacks of them: an encoder and a decoder, or the towers of a multimodal model.

    One forward pass in evaluation mode shows the order in which the blocks run and, through the autograd graph, which
    parameters the input of each block depends on. What the first block reads is the stem. What a later block reads besides the
    blocks before it belongs to the unit in front of it: the embeddings of a decoder belong to the last block of the encoder.
    Everything else is the head, which never freezes. So is a stack that does not run. A stack in which nothing trains, such as
    a tower that was frozen by hand, is no block, but stem or head, if another one trains.

    A parameter that several units share, such as the embeddings of T5's encoder and decoder, belongs to the first of them.

    The pass takes a tiny batch that is made up from the model's configuration. In a model that does not run on that, or not
    with all of its stacks, it takes `inputs`. Without them, a model with one stack is taken to run in the order in which it is
    registered, and the stem holds only what is an embedding by its name or type.

    Args:
        model ([`~torch.nn.Module`]): the model, wrapped (DDP, `torch.compile`, PEFT) or not.
        blocks (`list[str]`, *optional*): dotted names or shell patterns of the blocks.
        stem (`list[str]`, *optional*): dotted names or shell patterns of all modules and parameters that the first block
            reads. Needed only where they cannot be found.
        inputs (`Mapping` or `Callable`, *optional*): keyword arguments of the model for a batch of one or two rows, such as the
            first ones of the training data, or a function that returns them. Used where a made-up batch does not do.

    Returns:
        [`BlockStack`]

    Raises:
        ValueError: the model has no repeated blocks; `blocks` or `stem` names something that is not in the model; or
            the model cannot be run ([`NoOrderError`]), and it has several stacks, or something that is registered in front of
            the blocks may be stem or head.

    Example:

    ```python
    >>> from transformers import BertConfig, BertModel
    >>> from smartfrz_hf import find_blocks

    >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=24, num_attention_heads=2, intermediate_size=32))
    >>> stack = find_blocks(model)
    >>> stack.names
    ['stem', 'encoder.layer.0', 'encoder.layer.1']
    >>> stack["encoder.layer.0"]
    encoder.layer.0: 4,088 parameters, trainable

    ```
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a {type(model).__name__}; it must be a `torch.nn.Module`.")
    outermost, model = model, unwrap_model(model)
    stacks = {"": match(model, blocks, "blocks")} if blocks is not None else find_stacks(model)
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks that could freeze one by one. Name by hand what can freeze, front "
            f"first, with dotted names or shell patterns, such as {hint(model)}."
        )
    modules = dict(model.named_modules())
    everything = [name for members in stacks.values() for name in members]
    training = {
        key: members
        for key, members in stacks.items()
        if any(p.requires_grad for name in members for p in modules[name].parameters())
    }
    stacks = training or stacks
    names = [name for members in stacks.values() for name in members]
    traced = trace(model, outermost, names, inputs, [name for name in everything if name not in names])
    names, problem = _in_order(model, stacks, names, traced)
    by_hand = None if stem is None else match(model, stem, "stem", parameters=True)
    wrong = [(name, each) for each in names for name in by_hand or () if name in (each, *ancestors(each))]
    if wrong:
        name, block = wrong[0]
        raise ValueError(
            f"`stem` names {name!r}, in which the block {block!r} lies; name what feeds the first block, and no block."
        )
    parts = assign(model, names, traced, by_hand)
    units: list[Unit] = []
    taken: set[nn.Parameter] = set()
    for name, part in zip([STEM, *names], parts, strict=True):
        inside = Unit(name, part.modules, part.own).named_parameters()
        shared = frozenset(key for key, parameter in inside.items() if parameter in taken)
        own = {key: parameter for key, parameter in part.own.items() if key not in shared}
        units.append(Unit(name, part.modules, own, part.modules.get(name) in traced.runs_once, shared))
        taken.update(inside.values())
    return BlockStack(model, traced.backbone, tuple(units), traced.bypassed, problem)


def _in_order(
    model: nn.Module, stacks: Mapping[str, Sequence[str]], names: Sequence[str], traced: Trace
) -> tuple[list[str], str]:
    """The names of the blocks in the order in which they run, and what is not known about it. Raises as [`find_blocks`]."""
    kind, why, problem = type(model).__name__, traced.problem or "none could be made for it", ""
    if not traced.order and len(stacks) > 1:
        raise NoOrderError(
            f"{kind} has {len(stacks)} stacks of blocks, and does not run on a small batch ({why}), so it is not known in which "
            f"order they run. Pass a batch of your own, `FreezingRun(..., inputs=batch)`, or name what can freeze, front first: "
            f"{describe(stacks)}."
        )
    if not traced.order:
        problem = f"{kind} does not run on a small batch ({why}); its blocks are taken to run as they are registered."
        return list(names), problem
    blocks = {name: model.get_submodule(name) for name in names}
    ran = sorted((n for n in names if blocks[n] in traced.order), key=lambda name: traced.order[blocks[name]])
    if idle := [name for name in names if name not in ran]:
        where = ", ".join(dict.fromkeys(map(stack_of, idle)))
        problem = f"{where} of {kind} did not run on a small batch ({why}), and never freeze."
    if traced.without_autograd.issuperset(blocks[name] for name in ran):
        raise ValueError(
            f"{kind} runs its blocks inside a backward pass of its own, such as that of Reformer's reversible layers, which "
            "stops if what enters them, or one of them, is frozen. Train it without SmartFRZ."
        )
    return ran, problem
