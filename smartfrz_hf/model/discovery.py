"""Which modules of a model are its blocks, by type or by name."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import groupby

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

BY_HAND = (
    "Name the blocks by hand in execution order, with dotted names or shell patterns, such as "
    '`SmartFRZConfig(blocks=["encoder.layer.*"])`.'
)


def discover(model: nn.Module) -> list[str]:
    """
    Dotted names of the blocks in the order in which they are registered.

    Raises:
        ValueError: the model has no blocks, or several stacks of them.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: its decoder blocks read the encoder's output, so there is no "
            f"linear order of blocks in which a prefix could freeze. {BY_HAND}"
        )
    names = outermost(name for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer))
    towers = [(parent, list(group)) for parent, group in groupby(names, key=lambda name: name.rpartition(".")[0])]
    if len(towers) > 1:
        raise ValueError(
            f"{type(model).__name__} has {len(towers)} separate stacks of blocks "
            f"({', '.join(parent for parent, _ in towers)}), so no linear order. {BY_HAND}"
        )
    if towers:
        return towers[0][1]
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    sizes = {name: sum(p.numel() for p in lists[name].parameters()) for name in outermost(lists)}
    if not sizes or not max(sizes.values()):
        raise ValueError(f"{type(model).__name__} has no repeated blocks that could freeze one by one. {BY_HAND}")
    first, *others = sorted(sizes, key=sizes.__getitem__, reverse=True)
    # A second stack of comparable size runs beside the first one or after it: which one is unknown.
    if others and sizes[others[0]] > sizes[first] / 4:
        raise ValueError(
            f"{type(model).__name__} has several stacks of blocks ({first}, {others[0]}), so no linear order. {BY_HAND}"
        )
    return [f"{first}.{name}" for name, _ in lists[first].named_children()]


def match(model: nn.Module, patterns: Sequence[str], argument: str, parameters: bool = False) -> list[str]:
    """
    Dotted names of the modules that the patterns name, in the order of the patterns.

    Args:
        model (`torch.nn.Module`): where to look.
        patterns (`Sequence[str]`): dotted names or shell patterns.
        argument (`str`): name of the argument that holds the patterns, for errors.
        parameters (`bool`, *optional*, defaults to `False`): whether parameters may be named, too.

    Raises:
        ValueError: a pattern names nothing, or one match lies inside another.
    """
    known = [name for name, _ in model.named_modules() if name]
    known += [name for name, _ in model.named_parameters()] if parameters else []
    names: list[str] = []
    for pattern in patterns:
        matches = outermost(name for name in known if fnmatchcase(name, pattern))
        if not matches:
            children = ", ".join(repr(name) for name, _ in model.named_children())
            raise ValueError(
                f"`{argument}` names {pattern!r}, and {type(model).__name__} has no such module. Its outermost modules "
                f"are {children}; `model.named_modules()` lists all."
            )
        names.extend(name for name in matches if name not in names)
    nested = [name for name in names if name not in outermost(names)]
    if nested:
        raise ValueError(f"`{argument}` names {nested[0]!r} inside another match; {argument} must not overlap.")
    return names


def outermost(names: Iterable[str]) -> list[str]:
    """The names that lie inside no other one of them, in the given order."""
    names = list(names)
    known = set(names)
    return [name for name in names if not known.intersection(ancestors(name))]


def ancestors(name: str) -> list[str]:
    """Names of the modules around a module: `a.b.c` gives `["", "a", "a.b"]`."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]
