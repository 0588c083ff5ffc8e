"""The units of a model: the stem and the blocks, in the order in which they run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from accelerate.utils import extract_model_from_parallel
from torch import nn

from .discovery import discover, match
from .stem import STEM, assign
from .tracing import evaluation_mode as evaluation_mode
from .tracing import trace


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
    """

    model: nn.Module
    backbone: nn.Module
    units: tuple[Unit, ...]
    bypassed: frozenset[str] = frozenset()

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
    model: nn.Module, blocks: Sequence[str] | None = None, stem: Sequence[str] | None = None
) -> BlockStack:
    """
    Find the stem and the blocks of a model.

    Blocks are the outermost [`~transformers.modeling_layers.GradientCheckpointingLayer`]s of the model where it has them,
    else the members of its largest `ModuleList` (MPNet's layers, ALBERT's shared layer, the stages of ConvNeXt and
    ResNet).

    One forward pass of a tiny batch in evaluation mode shows the order in which the blocks run and, through the autograd
    graph, which parameters the input of each block depends on. What the first block reads is the stem. What a later block
    reads besides the blocks before it belongs to the unit in front of it. Everything else is the head, which never freezes.

    In a model that cannot be run so, blocks run in the order in which they are registered, and the stem holds only what is
    an embedding by its name or type.

    Args:
        model ([`~torch.nn.Module`]): the model, wrapped (DDP, `torch.compile`, PEFT) or not.
        blocks (`list[str]`, *optional*): dotted names or shell patterns of the blocks in execution order.
        stem (`list[str]`, *optional*): dotted names or shell patterns of all modules and parameters that the first block
            reads. Needed only where they cannot be found.

    Returns:
        [`BlockStack`]

    Raises:
        ValueError: the model has no linear order of blocks; `blocks` or `stem` names something that is not in the model; or
            the model cannot be run, and something that is registered in front of the blocks may be stem or head.

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
    names = discover(model) if blocks is None else match(model, blocks, "blocks")
    traced = trace(model, outermost, names)
    if traced.order:
        modules = dict(model.named_modules())
        names.sort(key=lambda name: traced.order[modules[name]])
    by_hand = None if stem is None else match(model, stem, "stem", parameters=True)
    parts = assign(model, names, traced, by_hand)
    runs_once = traced.runs_once
    units = [
        Unit(name, part.modules, part.own, runs_once=i > 0 and part.modules[name] in runs_once)
        for i, (name, part) in enumerate(zip([STEM, *names], parts, strict=True))
    ]
    return BlockStack(model, traced.backbone, tuple(units), traced.bypassed)
