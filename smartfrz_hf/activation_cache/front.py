"""The frozen front of a model: run it for some rows up to the boundary, or leave it out."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn

from .._compat import forward_without_autocast
from ..model.forward_patch import ForwardPatch
from ..model.nested import tensors_in
from ..model.units import BlockStack
from .calls import Call, bind
from .outputs import Shape, alike, find_hidden, replace_hidden


class UnsupportedModelError(Exception):
    """The front of this model cannot be left out; the message says why."""


class _AtBoundary(Exception):
    """Ends a forward pass that has reached the boundary."""


@dataclass
class Pass:
    """
    One forward pass of the backbone, as the cache runs it.

    Attributes:
        layout (`tuple`): what the shapes inside the model depend on, except for the number of rows.
        rows (`int`): rows of the batch.
        skip (`int`): units of the front whose blocks are left out; the stem always runs.
        enters (`torch.Tensor`, *optional*): what unit `skip - 1` returns instead, `(rows, ...)`.
        stop (`bool`): whether the pass ends at the boundary.
        on_boundary (`Callable`, *optional*): called with what crosses the boundary, if that was computed.
        poison (`bool`): blocks that are left out return NaN. Else they return what entered them.
        marks_gradient (`bool`): what crosses the boundary asks for a gradient, though nothing before it does.
        learns (`bool`): whether to note the shapes of what blocks return.
        hidden (`torch.Tensor`, *optional*): what has crossed the boundary.
        started (`list[int]`): units in the order in which their blocks have started.
    """

    layout: tuple
    rows: int
    skip: int = 0
    enters: torch.Tensor | None = None
    stop: bool = False
    on_boundary: Callable[[torch.Tensor], None] | None = None
    poison: bool = False
    marks_gradient: bool = False
    learns: bool = False
    hidden: torch.Tensor | None = None
    started: list[int] = field(default_factory=list)


class SkippableFront:
    """
    The frozen front of a model, whose blocks can be left out.

    The boundary is what the last frozen block returns: its first tensor, the hidden states. On a pass that leaves the front out,
    the stem and everything between the blocks runs as always, frozen blocks return what entered them, and the last one returns
    the activations that were kept. Nothing that runs behind the boundary is touched.

    Args:
        stack ([`BlockStack`]): the units of the model.
        entry (`torch.nn.Module`): runs the front, see [`~smartfrz_hf.activation_cache.outputs.entry_of`].
        forward (`Callable`): stands in for the forward pass of `entry`, which it is given first.
        before_block (`Callable`): called before a frozen block really runs.

    Attributes:
        entry (`torch.nn.Module`): the module whose forward pass is replaced.
        depth (`int`): units in the front.
        signature (`inspect.Signature`): of the forward pass of `entry`.
        patches (`dict[torch.nn.Module, ForwardPatch]`): by frozen block.
    """

    def __init__(
        self, stack: BlockStack, entry: nn.Module, forward: Callable[..., Any], before_block: Callable[[], None]
    ):
        self.stack, self.depth, self.entry = stack, 0, entry
        self._before_block = before_block
        self.signature = inspect.signature(self.entry.forward)
        self._pass: Pass | None = None
        self._templates: dict[tuple[int, tuple | None], Any] = {}
        self.outer_call: dict[str, Any] | None = None
        self.patches: dict[nn.Module, ForwardPatch] = {}
        self._entry_patch = ForwardPatch(self.entry, forward)
        self._model_patch: ForwardPatch | None = None
        if stack.model is not self.entry:
            self._model_patch = ForwardPatch(stack.model, self._call_model)
            self._model_signature = inspect.signature(self._model_patch.original)

    @property
    def busy(self) -> bool:
        """Whether the cache itself is running the backbone."""
        return self._pass is not None

    def grow(self, depth: int) -> None:
        """Take in all units before `depth`."""
        for index in range(max(1, self.depth), depth):
            block = self.stack.blocks[index - 1]
            if block not in self.patches:
                self.patches[block] = ForwardPatch(block, functools.partial(self._run_or_skip, index))
        self.depth = depth

    def close(self) -> None:
        """Give all modules their own forward pass back."""
        for patch in [*reversed(self.patches.values()), self._entry_patch, self._model_patch]:
            if patch is not None:
                patch.remove()
        self.patches, self._model_patch = {}, None

    def plain(self, /, *args, **kwargs) -> Any:
        """The backbone's own forward pass."""
        return self._entry_patch.original(*args, **kwargs)

    def run(
        self, call: Call, rows: Sequence[int] | None = None, skip: int = 0, enters: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Compute what crosses the boundary for some rows of a batch, without gradients.

        Args:
            call ([`Call`]): the batch.
            rows (`list[int]`, *optional*): which rows. All when not given.
            skip (`int`, *optional*, defaults to `0`): units of the front to leave out.
            enters (`torch.Tensor`, *optional*): what unit `skip - 1` has returned for them, `(rows, ...)`.

        Returns:
            `torch.Tensor`: of shape `(rows, ...)`.

        Raises:
            UnsupportedModelError: the blocks do not run once each, in order.
        """
        if skip:
            self.learn_layout(call)
        one = Pass(call.layout, call.rows if rows is None else len(rows), skip, enters, stop=True)
        with torch.no_grad():
            self.try_pass(one, lambda: self.plain(**call.arguments(rows)))
        assert one.hidden is not None
        return one.hidden

    def watch(self, call: Call, on_boundary: Callable[[torch.Tensor], None], marks_gradient: bool = False) -> Any:
        """The backbone's output with everything computed; `on_boundary` gets what crosses the boundary."""
        one = Pass(call.layout, call.rows, on_boundary=on_boundary, marks_gradient=marks_gradient)
        return self.try_pass(one, lambda: self.plain(**call.arguments()))

    def serve(self, call: Call, hidden: torch.Tensor) -> Any:
        """The backbone's output with `hidden` in the place of what crosses the boundary, and no frozen block run."""
        self.learn_layout(call)
        one = Pass(call.layout, call.rows, self.depth, hidden)
        return self.try_pass(one, lambda: self.plain(**call.arguments()))

    def try_pass(self, one: Pass, forward: Callable[[], Any]) -> Any:
        """
        Run a forward pass and check that the blocks of the front ran once each, in order.

        Raises:
            UnsupportedModelError: they did not.
        """
        output = None
        with self._under_way(one), contextlib.suppress(_AtBoundary):
            output = forward()
        if one.hidden is None or one.started != list(range(1, self.depth)):
            raise UnsupportedModelError("its blocks do not run one after the other, once each")
        return output

    def call_model(self, rows: Sequence[int], call: Call) -> Callable[[], Any]:
        """The forward pass of the whole model on some rows, if the present one can be repeated; else that of the backbone."""
        outer, patch = self.outer_call, self._model_patch
        if patch is None or outer is None or any(len(v) != call.rows for v in tensors_in(outer) if v.ndim):
            return lambda: self.plain(**call.arguments(rows))
        index = torch.tensor(list(rows), device=call.device)
        arguments = recursively_apply(lambda v: v[index] if v.ndim else v, outer)
        if "use_cache" in self._model_signature.parameters:
            arguments["use_cache"] = False
        # Accelerate enters one and the same autocast object in the forward pass; entered twice, it would never end.
        forward = forward_without_autocast(self.stack.model, patch.original)
        return lambda: forward(**arguments)

    def learn_layout(self, call: Call) -> None:
        """See what the blocks return for batches of this layout, unless that is known."""
        known = self._templates
        if any((i, None) not in known and (i, call.layout) not in known for i in range(1, self.depth)):
            for rows in ([0], [0, 0]):  # two batches show which tensors have one entry per row
                one = Pass(call.layout, len(rows), stop=True, learns=True)
                with torch.no_grad():
                    self.try_pass(one, functools.partial(self.plain, **call.arguments(rows)))

    @contextlib.contextmanager
    def _under_way(self, one: Pass) -> Iterator[None]:
        before, self._pass = self._pass, one
        try:
            yield
        finally:
            self._pass = before

    def _call_model(self, original: Callable[..., Any], /, *args, **kwargs) -> Any:
        if self.busy or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        self.outer_call = bind(self._model_signature, args, kwargs)
        try:
            return original(*args, **kwargs)
        finally:
            self.outer_call = None

    def _run_or_skip(self, index: int, original: Callable[..., Any], /, *args, **kwargs) -> Any:
        """Stands in for the forward pass of the block of unit `index`."""
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        one = self._pass
        if one is not None:
            one.started.append(index)
        if one is None or one.hidden is not None:  # behind the boundary, which try_pass will refuse
            self._before_block()
            return original(*args, **kwargs)
        last = index == self.depth - 1
        if index < one.skip:
            output = self._stand_in(index, one, args, kwargs)
            if index == one.skip - 1:
                output = replace_hidden(output, one.enters)
                one.hidden = one.enters if last else None
            return output
        self._before_block()
        output = original(*args, **kwargs)
        self._learn(index, one, output, args, kwargs)
        if last:
            one.hidden = tensors_in(output)[0].detach()
            if not one.hidden.ndim or len(one.hidden) != one.rows:  # a block may be given some of the rows only
                raise UnsupportedModelError("what its blocks return does not have one entry per row")
            if one.stop:
                raise _AtBoundary
            if one.on_boundary is not None:
                one.on_boundary(one.hidden)
            if one.marks_gradient:
                return replace_hidden(output, one.hidden.requires_grad_())
        return output

    def _learn(self, index: int, one: Pass, output: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        found = tensors_in(output)
        if not found:
            raise UnsupportedModelError("a block returns no tensor")
        enters = find_hidden(args, kwargs)
        if enters is not None and len(found) == 1 and alike(found[0], enters):
            key: tuple[int, tuple | None] = (index, None)
        elif one.learns:
            key = (index, one.layout)
        else:
            return

        def describe(tensor: torch.Tensor) -> Shape:
            if key[1] is None:
                return Shape(None, tensor.dtype, tensor.device, True)
            by_row = tensor.ndim > 0 and len(tensor) == one.rows
            return Shape(tuple(tensor.shape), tensor.dtype, tensor.device, by_row)

        if key not in self._templates or one.rows > 1:
            self._templates[key] = recursively_apply(describe, output)

    def _stand_in(self, index: int, one: Pass, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a block that is left out returns."""
        template = self._templates.get((index, None))
        if template is None:
            template = self._templates[index, one.layout]
        enters = find_hidden(args, kwargs)

        def fill(shape: Shape) -> torch.Tensor:
            if shape.shape is None:
                assert enters is not None
                return torch.full_like(enters, float("nan")) if one.poison else enters
            size = (one.rows, *shape.shape[1:]) if shape.by_row else shape.shape
            value = float("nan") if one.poison and shape.dtype.is_floating_point else 0
            return torch.full(size, value, dtype=shape.dtype, device=shape.device)

        return recursively_apply(fill, template, test_type=lambda leaf: isinstance(leaf, Shape))
