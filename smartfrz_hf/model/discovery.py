"""Which modules of a model may be its blocks: the stacks of repeated modules, and modules named by hand."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

MOST_NAMES = 4  # in a hint
# A block has more modules with parameters of their own than a convolution with its norm and positions, or a layer of a head.
SIMPLE = 3


class NoOrderError(ValueError):
    """It is not known what feeds the blocks of a model, or in which order they run. A batch of its own data may show it."""


def find_stacks(model: nn.Module) -> dict[str, list[str]]:
    """
    The stacks of repeated modules in a model.

    A stack is an outermost `ModuleList` (of nested lists, the members of the inner ones count), or an outermost
    `Sequential` with several members of one type. A list with a single member is none if that member holds a stack.
    Stacks of simple members, such as the convolutions in front of a speech encoder, are left out if there are others.
    So are stacks outside the base model of a [`~transformers.PreTrainedModel`].

    Args:
        model (`torch.nn.Module`): the unwrapped model.

    Returns:
        `dict[str, list[str]]`: by the name of the container, dotted names of the members in the order of registration.
    """
    modules = dict(model.named_modules())
    stacks = {key: names for key, names in _stacks(model, "", set()) if any(_parts(modules[name]) for name in names)}
    inside = set(base_model(model).modules())
    for test in (lambda module: _parts(module) > SIMPLE, lambda module: module in inside):
        passed = {key: names for key, names in stacks.items() if any(test(modules[name]) for name in names)}
        stacks = passed or stacks
    return stacks


def base_model(model: nn.Module) -> nn.Module:
    """The model without its head, for a [`~transformers.PreTrainedModel`], and else the model itself."""
    return model.base_model if isinstance(model, PreTrainedModel) else model


def _stacks(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, list[str]]]:
    for key, child in module.named_children():
        if child in seen:  # a model may hold one module under two names
            continue
        seen.add(child)
        path = f"{name}.{key}".lstrip(".")
        members = _members(child, path)
        inner = dict(_stacks(child, path, seen))
        if members and (len(members) > 1 or not any(len(names) > 1 for names in inner.values())):
            yield path, members
        else:
            yield from inner.items()


def _members(module: nn.Module, name: str) -> list[str]:
    """Dotted names of the members that make a container a stack. Empty if it is none."""
    children = [(f"{name}.{key}", child) for key, child in module.named_children()]
    if isinstance(module, nn.ModuleList):
        return [
            member
            for path, child in children
            for member in (_members(child, path) if isinstance(child, nn.ModuleList) else [path])
        ]
    if isinstance(module, nn.Sequential):
        types = [type(child) for _, child in children]
        members = [path for path, child in children if types.count(type(child)) > 1 and _parts(child) > 1]
        return members if len(members) > 1 else []
    return []


def _parts(module: nn.Module) -> int:
    """How many modules inside have parameters of their own. A layer with adapters is one."""
    if hasattr(module, "adapter_layer_names"):
        return 1
    own = next(module.parameters(recurse=False), None) is not None
    return own + sum(map(_parts, module.children()))


def describe(stacks: Mapping[str, Sequence[str]]) -> str:
    """The stacks by name, each with what to pass for it."""
    lines = [
        f"`{key}` ({len(names)} modules): `SmartFRZConfig(blocks={patterns(names)})`" for key, names in stacks.items()
    ]
    return "; ".join(lines)


def patterns(names: Sequence[str]) -> list[str]:
    """Shell patterns that name the members of a stack: `["encoder.layer.*"]`."""
    return list(dict.fromkeys(f"{name.rpartition('.')[0]}.*" for name in names))


def hint(model: nn.Module) -> str:
    """
    How to name blocks of a model without stacks: `` `SmartFRZConfig(blocks=["stem", "s1"])` ``, with the first of its outermost
    modules that have parameters. What is registered last is taken for the head. A model without such modules has no names to give.
    """
    inner = base_model(model)
    path = next(name for name, module in model.named_modules() if module is inner)
    while len(children := _with_parameters(inner, path)) == 1:
        ((path, inner),) = children.items()
    names = list(children) or ([path] if path else ["..."])
    shown = names[: max(1, len(names) - (base_model(model) is model))][:MOST_NAMES]
    return f"`SmartFRZConfig(blocks={json.dumps(shown)})`"


def _with_parameters(module: nn.Module, path: str) -> dict[str, nn.Module]:
    """The children that have parameters, by dotted name."""
    children = module.named_children()
    return {f"{path}.{key}".lstrip("."): child for key, child in children if any(True for _ in child.parameters())}


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


def stack_of(name: str) -> str:
    """What the blocks of one stack have in common: their name without numbers."""
    return ".".join(part for part in name.split(".") if not part.isdigit())
