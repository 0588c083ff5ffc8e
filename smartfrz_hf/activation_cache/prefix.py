"""Running the front of a model by itself, or leaving it out."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn

from ..model.forward_patch import ForwardPatch
from ..model.units import BlockStack, evaluation_mode
from .calls import Call, bind, take_rows, unpadded
from .passes import Pass, Shape, equal, find_hidden, leaves, replace_first


class UnsupportedModelError(Exception):
    """The front of this model cannot be left out; the message says why."""


class _Boundary(Exception):
    """Ends a pass that has reached the boundary."""


class Prefix:
    """
    The frozen front of a model, whose units can run up to the boundary for some rows, or be left out.

    Modules that are left out give back tensors of the right shape, type and device that hold NaN, and what enters the
    next block is replaced. That nothing else reads what they give back is not assumed but tried, by [`Prefix.prove`].

    Args:
        stack ([`BlockStack`]): the units of the model.
        forward (`Callable`): stands in for the forward pass of the backbone.
        before_run (`Callable`): called before a module of the front runs.

    Attributes:
        depth (`int`): units in the front. The boundary is what enters unit `depth`, or leaves the last block.
        signature (`inspect.Signature`): of the backbone's forward pass.
        idle (`set[torch.nn.Module]`): modules of the front that are left out, once proved.
    """

    def __init__(self, stack: BlockStack, forward: Callable[..., Any], before_run: Callable[[], None]):
        self.stack, self.depth = stack, 0
        self._before_run = before_run
        self.signature = inspect.signature(stack.backbone.forward)
        self._passing: Pass | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.idle: set[nn.Module] = set()
        self._batched: dict[nn.Module, list[bool]] = {}
        self._shapes: dict[tuple[nn.Module, tuple], Any] = {}
        self._learned: set[tuple] = set()
        self._outer: dict[str, Any] | None = None
        self._backbone = ForwardPatch(stack.backbone, forward)
        self._patches = [self._backbone]
        if stack.model is not stack.backbone:
            outer = ForwardPatch(stack.model, self._call_model)
            self._model, self._outer_signature = outer, inspect.signature(outer.original)
            self._patches.append(outer)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Prefix":
        return self  # hooks of a copied model find no pass of theirs here, and do nothing

    @property
    def busy(self) -> bool:
        """Whether a pass is under way."""
        return self._passing is not None

    def grow(self, depth: int) -> None:
        """Take in all units in front of `depth`."""
        for index in range(self.depth, depth):
            for module in self.stack.units[index].modules.values():
                patch = ForwardPatch(module, lambda *args, **kwargs: None)
                patch.forward = functools.partial(self._run_or_skip, index, patch)
                self._patches.append(patch)
            if index + 1 < len(self.stack):
                enter = functools.partial(self._enter, index + 1)
                block = self.stack.blocks[index]
                # In front of the hook that cuts the graph, which may have to mark what enters.
                self._hooks.append(block.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        self.depth = depth
        self._learned.clear()

    def close(self) -> None:
        """Give all modules their own forward pass back."""
        for hook in self._hooks:
            hook.remove()
        for patch in reversed(self._patches):
            patch.remove()
        self._hooks, self._patches = [], []

    def plain(self, *args, **kwargs) -> Any:
        """The backbone's own forward pass."""
        return self._backbone.original(*args, **kwargs)

    def run(
        self,
        call: Call,
        rows: Sequence[int] | None = None,
        skip: int = 0,
        enters: torch.Tensor | None = None,
        end: int | None = None,
    ) -> torch.Tensor:
        """
        What crosses the boundary for some rows of a batch.

        Args:
            call ([`Call`]): the batch.
            rows (`list[int]`, *optional*): which rows; all when it is not given.
            skip (`int`, *optional*, defaults to `0`): units of the front to leave out.
            enters (`torch.Tensor`, *optional*): what enters unit `skip` in their place, `(rows, ...)`.
            end (`int`, *optional*): units in front of another boundary, further ahead.

        Returns:
            `torch.Tensor`: of shape `(rows, ...)`.

        Raises:
            UnsupportedModelError: the pass did not come to the boundary.
        """
        if skip:
            self._learn_shapes(call)
        end = self.depth if end is None else end
        one = Pass(call.layout, call.rows if rows is None else len(rows), end, skip, enters, stop=True)
        with torch.no_grad(), contextlib.suppress(_Boundary), self._under_way(one):
            self.plain(**call.arguments(rows))
        if one.hidden is None:
            raise UnsupportedModelError("its blocks do not run one after the other")
        if not skip and end == self.depth:
            self._learned.add(call.layout)
        return one.hidden

    def watch(self, call: Call, on_boundary: Callable[[torch.Tensor], None]) -> Any:
        """The backbone's output, all units run; `on_boundary` is told what crosses the boundary."""
        with self._under_way(Pass(call.layout, call.rows, self.depth, on_boundary=on_boundary)):
            output = self.plain(**call.arguments())
        self._learned.add(call.layout)
        return output

    def serve(self, call: Call, hidden: torch.Tensor) -> Any:
        """The backbone's output with `hidden` in the place of what crosses the boundary, and no unit run for it."""
        self._learn_shapes(call)
        with self._under_way(Pass(call.layout, call.rows, self.depth, self.depth, hidden)):
            return self.plain(**call.arguments())

    def prove(self, call: Call) -> None:
        """
        Try on two rows, in evaluation mode, whether the front can be left out.

        The outputs of the whole model, its loss included, have to be the same to the last bit when the front's modules
        give back NaN and zeros take the place of padding. Modules of the stem that the active blocks read otherwise
        (rotary tables, a position bias) are found on the way, and go on running.

        Raises:
            UnsupportedModelError: they are not the same, or the blocks do not run one after the other.
        """
        rows = [0, call.rows - 1]
        if call.mask is not None:  # the row with the most padding, since it is there that zeros take its place
            rows[0] = int(call.mask.ne(0).sum(1).argmin())
        try:
            with evaluation_mode(self.stack.model):
                self._prove(call, rows)
        except UnsupportedModelError:
            raise
        except Exception as error:  # the model's own code runs here, with tensors that it may not expect
            raise UnsupportedModelError(f"it does not run without them ({type(error).__name__}: {error})") from error

    def _prove(self, call: Call, rows: list[int]) -> None:
        first, whole = self._try(call, rows)
        once = all(first.starts[block] == 1 for block in self.stack.blocks[: self.depth])
        if first.hidden is None or len(first.hidden) != 2 or not once:
            raise UnsupportedModelError("its blocks do not run one after the other, each once, with one entry per row")
        ends, hidden = [-1, -1], first.hidden
        if call.mask is not None:
            if hidden.ndim != 3 or hidden.shape[1] != call.length:
                raise UnsupportedModelError("its hidden states do not follow the attention mask")
            self._prove_padding(call, rows, hidden)
            inside = unpadded(call.mask[rows])
            inside[~inside.any(1)] = True  # with nothing else to read, a row reads its padding, and is not kept
            ends, hidden = inside.sum(1).tolist(), hidden * inside[:, :, None]
        third = Pass(call.layout, 3, self.depth, stop=True)
        with contextlib.suppress(_Boundary), self._under_way(third):
            self.plain(**call.arguments([*rows, rows[0]]))
        for module, shapes in first.outputs.items():
            others = third.outputs[module]
            self._batched[module] = [a.shape[:1] != b.shape[:1] for a, b in zip(shapes, others, strict=True)]

        def same(idle: set[nn.Module]) -> bool:
            self.idle = idle
            _, served = self._try(call, rows, self.depth, hidden)
            pairs = zip(leaves(whole), leaves(served), strict=True)
            return all(equal(a, b, call.length, ends) for a, b in pairs)

        stem = [module for module in self.stack.stem.modules.values() if first.starts[module] == 1]
        front = [module for unit in self.stack.units[1 : self.depth] for module in unit.modules.values()]
        blocks = {module for module in front if first.starts[module]}
        if not same(blocks | set(stem)):
            needless = {module for module in stem if same(blocks | {module})}
            if not same(blocks | needless):
                raise UnsupportedModelError(
                    "what runs behind the boundary reads more of the front than what crosses it"
                )

    def _prove_padding(self, call: Call, rows: list[int], hidden: torch.Tensor) -> None:
        """Rows are known without the padding behind them, so nothing may depend on it but rounding."""
        assert call.mask is not None and call.length is not None
        end = int(unpadded(call.mask[rows[:1]]).sum())
        if not 0 < end < call.length:
            return
        for length in (call.length, end):
            other = self.run(call.cut(length), rows)
            if (hidden[0, :end] - other[0, :end]).abs().amax() > 0.01 * hidden[0, :end].abs().amax():
                raise UnsupportedModelError("its frozen blocks read positions that the attention mask hides")

    def _try(self, call: Call, rows: list[int], skip: int = 0, enters: torch.Tensor | None = None):
        """A pass through the whole model if it is at hand, else through the backbone."""
        one = Pass(call.layout, len(rows), self.depth, skip, enters)
        outer = self._outer
        with self._under_way(one):
            if outer is None or any(len(value) != call.rows for value in leaves(outer) if value.ndim):
                return one, self.plain(**call.arguments(rows))
            outer = take_rows(outer, rows, call.rows)
            if "use_cache" in self._outer_signature.parameters:
                outer["use_cache"] = False
            # Accelerate enters one and the same autocast object in the forward pass; entered twice, it would never end.
            forward = getattr(self.stack.model, "_original_forward", self._model.original)
            return one, forward(**outer)

    def _learn_shapes(self, call: Call) -> None:
        if call.layout not in self._learned:
            self.run(call, [0])

    @contextlib.contextmanager
    def _under_way(self, one: Pass):
        self._passing = one
        try:
            yield
        finally:
            self._passing = None

    def _call_model(self, *args, **kwargs) -> Any:
        if not self.busy:
            self._outer = bind(self._outer_signature, args, kwargs)
        try:
            return self._model.original(*args, **kwargs)
        finally:
            self._outer = None

    def _run_or_skip(self, index: int, patch: ForwardPatch, *args, **kwargs) -> Any:
        """The forward pass of a module of unit `index`."""
        one, module = self._passing, patch.module
        if one is None:
            self._before_run()
            with torch.no_grad():
                return patch.original(*args, **kwargs)
        one.starts[module] += 1
        is_end = index + 1 == one.end == len(self.stack) and module is self.stack.blocks[-1]
        if index < one.skip and module in self.idle:
            output = self._blank(module, one)
            return replace_first(output, one.enters) if is_end else output
        self._before_run()
        with torch.no_grad():
            output = patch.original(*args, **kwargs)
        shapes = recursively_apply(Shape.of, output)
        one.outputs[module] = leaves(shapes, Shape)
        self._shapes[module, one.layout] = shapes
        if is_end:
            self._cross(one, leaves(output)[0])
        return output

    def _enter(self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        """Before the block of unit `index` runs."""
        one = self._passing
        if one is None or index not in (one.skip, one.end):
            return None
        place = find_hidden(args, kwargs)
        if place is None:
            raise UnsupportedModelError("a block is given no hidden states")
        if index == one.end:
            one.starts[module] += 1
        if index == one.skip and one.enters is not None:
            if isinstance(place, int):
                args = (*args[:place], one.enters, *args[place + 1 :])
            else:
                kwargs = {**kwargs, place: one.enters}
        if index == one.end:
            self._cross(one, args[place] if isinstance(place, int) else kwargs[place])
        return args, kwargs

    def _cross(self, one: Pass, hidden: torch.Tensor) -> None:
        one.hidden = hidden.detach()
        if one.on_boundary is not None:
            one.on_boundary(one.hidden)
        if one.stop:
            raise _Boundary

    def _blank(self, module: nn.Module, one: Pass) -> Any:
        """What a module that is left out gives back."""
        batched = iter(self._batched[module])
        return recursively_apply(
            lambda shape: shape.blank(one.rows if next(batched) else None),
            self._shapes[module, one.layout],
            test_type=lambda leaf: isinstance(leaf, Shape),
        )
