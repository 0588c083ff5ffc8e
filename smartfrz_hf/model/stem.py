"""What lies beside the blocks of a model: which of it belongs to a unit, and which to the head."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from .discovery import NoOrderError, ancestors, stack_of
from .tracing import Trace

STEM = "stem"
# Names of parameters and modules that the first block of a model reads, where they cannot be seen to.
INPUT_NAMES = ("embed", "pos_", "position", "cls_token", "mask_token", "class_token", "dist_token", "masked_spec")


@dataclass
class Part:
    """Modules and parameters of a unit, by dotted name."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    own: dict[str, nn.Parameter] = field(default_factory=dict)


def assign(model: nn.Module, names: Sequence[str], traced: Trace, stem: Sequence[str] | None = None) -> list[Part]:
    """
    Give what lies beside the blocks to the units.

    Args:
        model (`torch.nn.Module`): the unwrapped model.
        names (`Sequence[str]`): dotted names of the blocks in execution order.
        traced ([`Trace`]): of the model.
        stem (`Sequence[str]`, *optional*): dotted names of all that is stem, where it was named by hand.

    Returns:
        `list[Part]`: the stem, then one part per block.

    Raises:
        NoOrderError: the model was not traced, and it is not plain whether something is stem or head.
    """
    modules = dict(model.named_modules())
    parts = [Part(), *(Part({name: modules[name]}) for name in names)]
    assigner = _TracedAssigner if traced.order else _UntracedAssigner
    assigner(model, names, traced, parts, named=stem is not None).run()
    if stem is not None:
        parameters = dict(model.named_parameters())
        parts[0] = Part(
            {name: modules[name] for name in stem if name in modules},
            {name: parameters[name] for name in stem if name not in modules},
        )
        for part in parts[1:]:  # what was named by hand is in no other unit
            part.modules = {name: m for name, m in part.modules.items() if not {name, *ancestors(name)} & {*stem}}
            part.own = {name: p for name, p in part.own.items() if not {name, *ancestors(name)} & {*stem}}
    return parts


class _Assigner:
    """Goes over everything beside the blocks, in the order in which it is registered."""

    def __init__(self, model: nn.Module, names: Sequence[str], traced: Trace, parts: list[Part], named: bool):
        self.model, self.names, self.traced, self.parts, self.named = model, names, traced, parts, named
        self.modules = dict(model.named_modules())
        self.seen: set[nn.Module] = set()
        prefix = next(name for name, module in self.modules.items() if module is traced.backbone)
        # The modules around the blocks, inside the backbone.
        self.spine = {a for name in names for a in ancestors(name) if f"{a}.".startswith(f"{prefix}.".lstrip("."))}

    def run(self) -> None:
        for parent in sorted(self.spine, key=list(self.modules).index):
            self.place_parameters(parent)
            before = True
            for child, module in self.modules[parent].named_children():
                name = f"{parent}.{child}".lstrip(".")
                if name in self.spine or name in self.names:
                    before = False
                elif module not in self.seen:  # some models hold one module under two names
                    self.seen.add(module)
                    self.place(name, module, before)

    def place_parameters(self, name: str) -> None:
        """Place the parameters of one module, without its children."""
        raise NotImplementedError

    def place(self, name: str, module: nn.Module, before: bool) -> None:
        """Place a module with all that is in it; `before` is whether it is registered in front of the blocks."""
        raise NotImplementedError


class _TracedAssigner(_Assigner):
    """
    A parameter belongs to the unit in front of the first block that reads it; a module, if all of its parameters do.

    Where that block is the first of another stack, such as a decoder, the parameter belongs to the block's own unit. So a decoder's
    embeddings, and the head that is tied to them, train for as long as a block of the decoder does.
    """

    def unit_of(self, reader: int) -> int:
        """The unit of what block `reader` reads first."""
        stacks = [stack_of(name) for name in self.names[: reader + 1]]
        return reader + (reader > 0 and stacks.index(stacks[-1]) == reader)

    def place_parameters(self, name: str) -> None:
        module = self.model.get_submodule(name)
        for key, parameter in module.named_parameters(recurse=False):
            reader = self.traced.readers.get((module, key))
            if reader is None and is_input(key) and name in self.spine:
                reader = 0  # used in training only, such as the token that stands for masked ones
            if reader is not None and reader < len(self.names):
                self.parts[self.unit_of(reader)].own[f"{name}.{key}".lstrip(".")] = parameter

    def place(self, name: str, module: nn.Module, before: bool) -> None:
        owned = [(m, key) for m in module.modules() for key, _ in m.named_parameters(recurse=False)]
        readers = {self.traced.readers[owner] for owner in owned if owner in self.traced.readers}
        if not owned:
            readers = self._readers_of_output(module)
        if not readers or min(readers) >= len(self.names):
            return
        if len(readers) == 1:  # with parameters that this pass did not use, such as those of token types
            self.parts[self.unit_of(readers.pop())].modules[name] = module
            return
        self.place_parameters(name)
        for child, inner in module.named_children():
            self.place(f"{name}.{child}", inner, before)

    def _readers_of_output(self, module: nn.Module) -> set[int]:
        """For a module without parameters: the reader of its output, or where it started if that depends on nothing."""
        ran = [m for m in module.modules() if m in self.traced.order]
        if not ran:
            return set()
        known = [self.traced.output_readers[m] for m in ran if m in self.traced.output_readers]
        start = min(self.traced.order[m] for m in ran)
        passed = sum(self.traced.order[self.modules[block]] < start for block in self.names)
        return {min(known, default=passed)}


class _UntracedAssigner(_Assigner):
    """By name and type; what could be stem or head is refused, unless the stem was named by hand."""

    def place_parameters(self, name: str) -> None:
        for key, parameter in self.modules[name].named_parameters(recurse=False):
            if is_input(key):
                self.parts[0].own[f"{name}.{key}".lstrip(".")] = parameter

    def place(self, name: str, module: nn.Module, before: bool) -> None:
        # A sequence runs as it is registered.
        in_sequence = isinstance(self.model.get_submodule(name.rpartition(".")[0]), nn.Sequential)
        no_parameters = next(module.parameters(), None) is None
        embedding = is_input(name.rpartition(".")[2]) or is_input(type(module).__name__)
        if isinstance(module, nn.Embedding) or (before and (embedding or in_sequence or no_parameters)):
            self.parts[0].modules[name] = module
        elif before and not self.named:
            raise NoOrderError(
                f"{type(self.model).__name__} does not run on a small batch ({self.traced.problem or 'none could be made'}), and "
                f"{name!r} ({type(module).__name__}) is registered in front of the blocks: it may feed the first block (the stem), "
                "or belong to the head. Pass a batch of your own, `FreezingRun(..., inputs=batch)`, or name all that feeds the "
                'first block, with dotted names or shell patterns: `SmartFRZConfig(stem=["embeddings"])`.'
            )


def is_input(name: str) -> bool:
    """Whether a name is one of an embedding, a position table or an extra token."""
    return any(part in name.lower() for part in INPUT_NAMES)
