"""What a model's passes cost: one counted forward pass, and what it shows of the backward pass."""

import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial, reduce
from math import prod
from operator import or_
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from .._compat import has_input_grads, uses_reentrant_checkpointing
from ..distributed.fsdp import reshard
from ..freezing.kept import kept_parameters
from ..model.nested import tensors_in
from ..model.tracing import evaluation_mode
from ..model.units import BlockStack
from .passes import PassCosts, backward_of_chain

CONSTANT = 0  # the units of a tensor that no trainable weight has gone into
# Functions that keep no tensor for their backward pass.
KEEP_NOTHING = {
    *("__add__", "__iadd__", "__radd__", "add", "add_", "contiguous", "detach", "dropout", "flatten", "permute"),
    *("reshape", "squeeze", "to", "transpose", "unsqueeze", "view"),
}


class TrainableWeights:
    """
    Which unit each trainable weight belongs to. A weight that several units use belongs to the first of them, and one
    that freezing leaves alone ([`~smartfrz_hf.freezing.kept.kept_parameters`]) to the head.

    Args:
        model ([`~torch.nn.Module`]): the model that the training loop calls.
        stack ([`BlockStack`]): its units, before any is frozen.

    Attributes:
        units (`dict[torch.nn.Parameter, int]`): index of the unit of each trainable parameter, in the model's order.
        input_grads (`bool`): whether the output of the embeddings requires a gradient whatever trains, as PEFT needs
            it under activation checkpointing. Freezing the stem ends it.
    """

    def __init__(self, model: nn.Module, stack: BlockStack):
        self.head, self.input_grads = len(stack), has_input_grads(stack.model)
        unit_of = {
            parameter: index
            for index, unit in reversed([*enumerate(stack.units)])
            for parameter in unit.named_parameters().values()
        }
        unit_of |= {p: self.head for unit in stack.units for p in kept_parameters(unit).values()}
        self.units = {p: unit_of.get(p, self.head) for p in model.parameters() if p.requires_grad}
        # By name, because FSDP2 exchanges the parameters for a pass.
        self.names = {
            module: {
                name: 1 << self.units[p] if p in self.units else CONSTANT
                for name, p in module.named_parameters(recurse=False)
            }
            for module in model.modules()
        }


class _NoModules(nullcontext):
    """Stands in for torch's module tracker, which fails where a module is given a parameter, as in DeBERTa."""

    parents = frozenset({"Global"})


class _Tracer(TorchFunctionMode):
    """
    Follows the trainable weights through a forward pass, and adds up FLOPs by unit.

    Each tensor is marked with the set of units whose trainable weights went into it. It needs a gradient unless all of them
    are frozen. A product of two tensors costs its own FLOPs once more in the backward pass for each of the two that needs a
    gradient.
    """

    def __init__(self, weights: TrainableWeights):
        super().__init__()
        units = weights.head + 1
        self.forward = [0.0] * units
        # By unit, and by the set of units of which one has to train.
        self.backward: list[defaultdict[int, float]] = [defaultdict(float) for _ in range(units)]
        self.counter = FlopCounterMode(display=False)
        self.counter.mod_tracker = _NoModules()  # type: ignore[assignment]
        self._weights = weights
        self._marks: dict[int, tuple[weakref.ref, int]] = {}
        self._seen = CONSTANT
        self._running: list[int] = []
        self._started: list[float] = []
        self._tail = 0.0  # FLOPs of the latest product, if nothing since has kept a tensor

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = self.counter.get_total_flops()
        attention = func is nn.functional.scaled_dot_product_attention
        # Not all its kernels are known to the counter, and torch 2.11 fails on grouped queries.
        with sdpa_kernel(SDPBackend.MATH) if attention else nullcontext():
            result = func(*args, **kwargs)
        flops: float = self.counter.get_total_flops() - before
        tensors = [t for t in tensors_in((args, kwargs)) if _may_need_gradient(t)]
        units = reduce(or_, map(self._mark_of, tensors), CONSTANT)
        operands = sorted(self._mark_of(t) for t in tensors if t.dim() > 1)[-2:]
        if attention:  # a fused kernel computes all gradients, whichever are needed
            flops, operands = _attention_flops(*args, **kwargs), [units, units]
        if flops:
            self._tail = flops
            self._add(flops, operands)
        elif units and _keeps_tensors(func, *args, **kwargs):
            self._tail = 0.0
        self._mark_result(func, result, tensors, units)
        return result

    def mark(self, value: Any, units: int) -> None:
        """Mark nested tensors."""
        for tensor in tensors_in(value):
            self._marks[id(tensor)] = weakref.ref(tensor), units if _may_need_gradient(tensor) else CONSTANT

    def mark_weights(self, module: nn.Module, *_: Any) -> None:
        """Mark the parameters and buffers that a module holds itself."""
        for name, parameter in module.named_parameters(recurse=False):
            self.mark(parameter, self._weights.names.get(module, {}).get(name, CONSTANT))
        self.mark(list(module.buffers(recurse=False)), CONSTANT)

    def begin_unit(self, unit: int, *_: Any) -> None:
        """Before a module of a unit runs."""
        self._running.append(unit)

    def end_unit(self, *_: Any) -> None:
        """After a module of a unit has run."""
        self._running.pop()

    def begin_block(self, units: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a block runs whose input needs a gradient if any of these units trains, whatever went into it."""
        for tensor in tensors_in((args, kwargs)):
            self.mark(tensor, self._mark_of(tensor) | units)

    def begin_checkpoint(self, *_: Any) -> None:
        """Before a module under activation checkpointing runs."""
        self._started.append(sum(self.forward))

    def end_checkpoint(self, module: nn.Module, args: tuple, output: Any) -> None:
        """
        The forward pass of a module under activation checkpointing runs again if its output needs a gradient, unless
        reentrant only up to the last tensor that its backward pass needs.
        """
        again = sum(self.forward) - self._started.pop()
        if not uses_reentrant_checkpointing(module):
            again -= self._tail
        marks = (self._mark_of(t) for t in tensors_in(output) if _may_need_gradient(t))
        if units := reduce(or_, marks, CONSTANT):
            self.backward[self._unit][units] += again

    @property
    def _unit(self) -> int:
        return self._running[-1] if self._running else self._weights.head

    def _mark_of(self, tensor: torch.Tensor) -> int:
        reference, units = self._marks.get(id(tensor), (None, self._seen))
        # A tensor from where this mode sees nothing, such as TorchScript, may depend on all that has run.
        return units if reference is not None and reference() is tensor else self._seen

    def _add(self, flops: float, operands: list[int]) -> None:
        self.forward[self._unit] += flops
        for units in filter(None, operands):
            self.backward[self._unit][units] += flops

    def _mark_result(self, func: Callable[..., Any], result: Any, operands: list[torch.Tensor], units: int) -> None:
        name = getattr(func, "__name__", "")
        if name in ("detach", "detach_"):
            units = CONSTANT
        if name == "requires_grad_":
            units |= 1 << self._unit
        if result is None and operands:  # such as `hidden[mask] = value`
            result = operands[0]
        self.mark(result, units)
        self._seen |= units


def _may_need_gradient(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _keeps_tensors(func: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "dropout":  # nothing happens in evaluation mode
        return bool(kwargs.get("p", args[1] if len(args) > 1 else 0.5))
    return name not in KEEP_NOTHING and not name.startswith("is_") and name not in ("__get__", "size", "dim")


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> float:
    """Of queries `(..., heads, queries, width)`, keys `(..., keys, width)` and values `(..., keys, value width)`."""
    return 2.0 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def count_pass(
    model: nn.Module, stack: BlockStack, weights: TrainableWeights, inputs: tuple[tuple, dict[str, Any]], elements: int
) -> PassCosts:
    """
    Run one forward pass in evaluation mode, uncompiled and without gradients, and count it.

    The pass changes no weight and no running statistic, and draws no random number. Only matrix products, convolutions
    and attention count, as in [`torch.utils.flop_counter.FlopCounterMode`]; of attention, the backward pass counts
    twice the forward pass, without the scores that a fused kernel computes again.

    Args:
        model ([`~torch.nn.Module`]): the model that the training loop calls.
        stack ([`BlockStack`]): its units.
        weights ([`TrainableWeights`]): which of its weights train while nothing is frozen.
        inputs (`tuple[tuple, dict]`): positional and keyword arguments of the model.
        elements (`int`): elements of the main input among them.

    Raises:
        Exception: whatever the model raises on these inputs.
    """
    tracer = _Tracer(weights)
    args, kwargs = recursively_apply(lambda tensor: tensor, inputs)  # the model may write into its dictionaries
    with ExitStack() as context:
        for module in model.modules():
            tracer.mark_weights(module)
            context.enter_context(module.register_forward_pre_hook(tracer.mark_weights))
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                context.enter_context(module.register_forward_pre_hook(tracer.begin_checkpoint))
                context.enter_context(module.register_forward_hook(tracer.end_checkpoint))
        for index, unit in enumerate(stack.units):
            for module in unit.modules.values():
                context.enter_context(
                    module.register_forward_pre_hook(partial(tracer.begin_unit, index), prepend=True)
                )
                context.enter_context(module.register_forward_hook(tracer.end_unit))
        for index, block in enumerate(stack.blocks, start=1):
            # The input of the block may need a gradient though no trainable weight went into it.
            asking = index if uses_reentrant_checkpointing(block) else 0 if weights.input_grads else None
            hook = partial(tracer.begin_block, CONSTANT if asking is None else 1 << asking)
            context.enter_context(block.register_forward_pre_hook(hook, with_kwargs=True))
        tracer.mark((args, kwargs), CONSTANT)
        context.callback(reshard, model)
        context.enter_context(evaluation_mode(model))
        # Dynamo marks what it first meets under a counter as never to be compiled.
        context.enter_context(torch.compiler.set_stance("force_eager"))
        context.enter_context(tracer.counter)
        context.enter_context(tracer)
        model(*args, **kwargs)
    return PassCosts(
        [flops / elements for flops in tracer.forward],
        [{units: flops / elements for units, flops in parts.items()} for parts in tracer.backward],
    )


def costs_by_parameters(weights: TrainableWeights) -> PassCosts:
    """Costs of a model that cannot be counted."""
    units = weights.head + 1
    forward = [0.0] * units
    for parameter, unit in weights.units.items():
        forward[unit] += 2.0 * parameter.numel()
    return PassCosts(forward, [backward_of_chain(unit, 2 * flops) for unit, flops in enumerate(forward)])
