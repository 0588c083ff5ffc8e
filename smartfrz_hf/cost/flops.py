"""What a run costs, counted on real batches: the FLOPs of each unit's forward and backward pass and of its update."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..model.units import BlockStack
from .ledger import Flops

HEAD = "head"
# What a checkpoint keeps of a [`ComputeMeter`]: FLOPs by unit, and numbers.
COST_FIELDS = ("_pass", "_step", "_full_pass", "_full_step")
COUNTS = ("_depth", "_passes", "_steps", "_all_elements", "_pass_due", "_step_due")


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_, **__
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# The counter of torch knows the fused attention kernels of accelerators, but not those of the CPU.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def _updated_here(parameter: nn.Parameter) -> float:
    """Elements that this process updates: all, or its share of them under FSDP2."""
    return parameter.numel() / (parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1)


class _UnitTracker:
    """
    Tells a [`FlopCounterMode`] which unit's forward or backward pass is running.

    It takes the place of torch's module tracker, which loses the backward pass of a module that runs several times
    (ALBERT's shared layer), and sees no end of it where hidden states are handed over by keyword. Here, backward work
    belongs to the unit whose forward pass made the autograd node that runs, known by the node's number: nodes are
    numbered in the order in which they are made. What activation checkpointing computes again counts as backward.
    """

    def __init__(self, stack: BlockStack):
        self._stack, self._head = stack, len(stack)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._running: list[int] = []
        # From each of these node numbers on, nodes belong to this unit.
        self._numbers, self._units = [0], [self._head]
        self._backward: int | None = None
        self._last = self._head

    def __enter__(self) -> "_UnitTracker":
        for index, unit in enumerate(self._stack.units):
            for module in unit.modules.values():
                self._hooks.append(module.register_forward_pre_hook(partial(self._begin, index)))
                self._hooks.append(module.register_forward_hook(self._end, always_call=True))
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    @staticmethod
    def key(phase: str, unit: int) -> str:
        """Under which name FLOPs are counted; `phase` is `"forward"` or `"backward"`."""
        return f"{phase} {unit}"

    @property
    def parents(self) -> set[str]:
        """Names under which an operation that runs now is counted."""
        backward = torch._C._current_graph_task_id()
        if backward < 0:
            return {"Global", self.key("forward", self._running[-1] if self._running else self._head)}
        if self._backward is None:
            self._backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
        # Reentrant checkpointing runs a backward pass inside this one, of the unit that it has just computed again.
        if backward == self._backward:
            self._last = self._running[-1] if self._running else self._unit_of_node()
        return {"Global", self.key("backward", self._last)}

    def _unit_of_node(self) -> int:
        node = torch._C._current_autograd_node()
        return self._units[bisect_right(self._numbers, node._sequence_nr()) - 1]

    def _end_of_backward(self) -> None:
        self._backward = None

    def _begin(self, unit: int, module: nn.Module, args: tuple) -> None:
        self._running.append(unit)
        self._mark()

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        del self._running[-1:]  # none is there where another hook has failed before `_begin`
        self._mark()

    def _mark(self) -> None:
        if torch._C._current_graph_task_id() < 0:
            self._numbers.append(torch.autograd._get_sequence_nr())
            self._units.append(self._running[-1] if self._running else self._head)


class ComputeMeter:
    """
    Counts the FLOPs of a training run, by unit.

    Forward and backward: one real micro-batch is counted with [`torch.utils.flop_counter.FlopCounterMode`] at the
    start and after each change that `recount` announces; every other one is scaled by the number of elements (tokens,
    pixels) of its main input. Counting changes no result and draws no random number. Evaluation is not counted. A
    compiled model runs uncompiled while it is counted.

    Optimizer: the counter does not see elementwise work, so a convention stands in for it. In each optimizer step, an
    element of a parameter that has a gradient costs 2 FLOPs for the plain update, and 5 for each tensor of the
    parameter's shape in the optimizer's state: 2 for SGD, 7 with momentum, 12 for AdamW. Under FSDP2 a process is
    charged for its share of the elements.

    Args:
        model ([`~torch.nn.Module`]): the model that the training loop calls.
        stack ([`BlockStack`]): its units, before any is frozen.
        optimizer (`torch.optim.Optimizer`, *optional*): without it the optimizer's FLOPs are left out.

    Attributes:
        spent ([`Flops`]): of the training so far.
        full ([`Flops`]): what it had cost with nothing frozen and no activation cache.
    """

    def __init__(self, model: nn.Module, stack: BlockStack, optimizer: Optimizer | None = None):
        self.spent = self.full = Flops()
        self._stack, self._optimizer = stack, optimizer
        self._depth = 0
        self._elements = self._latest = 0
        self._skipped = 0.0
        self._counter: FlopCounterMode | None = None
        self._pass_due = self._step_due = True
        # Forward and backward of one element, and the update of one step, by unit; the head is last.
        self._pass, self._step = self._nothing(), self._nothing()
        self._full_pass: list[Flops] | None = None
        self._full_step: list[Flops] | None = None
        self._passes = self._steps = self._all_elements = 0
        self._units: dict[nn.Parameter, int] = {}
        for index, unit in reversed([*enumerate(stack.units)]):  # a shared parameter belongs to its first unit
            self._units |= dict.fromkeys(unit.named_parameters().values(), index)
        self._trainable = [parameter for parameter in self._units if parameter.requires_grad]
        self._main_input = getattr(model, "main_input_name", "input_ids")
        self._hook = model.register_forward_pre_hook(self._before, with_kwargs=True)

    @property
    def counting(self) -> bool:
        """Whether the current or next training micro-batch is counted. Its forward pass has to run as a whole."""
        return self._pass_due

    @property
    def unit_flops(self) -> dict[str, Flops]:
        """FLOPs of one average micro-batch, by unit and `"head"` (everything else), as far as it is frozen now."""
        return self._average(self._pass, self._step)

    @property
    def full_unit_flops(self) -> dict[str, Flops]:
        """The same with nothing frozen."""
        return self._average(self._full_pass or self._pass, self._full_step or self._step)

    def recount(self, depth: int) -> None:
        """
        Count the next micro-batch and the next optimizer step anew.

        Args:
            depth (`int`): units of the front that are frozen then. If there are some before anything was counted,
                their backward pass, which never ran, is taken as twice their forward pass, and the update of their
                elements as that of an average one.
        """
        self._pass_due = self._step_due = True
        self._depth = depth

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as plain JSON values."""
        found: dict[str, Any] = {name: asdict(getattr(self, name)) for name in ("spent", "full")}
        for name in COST_FIELDS:
            prices = getattr(self, name)
            found[name] = None if prices is None else [asdict(flops) for flops in prices]
        return found | {name: getattr(self, name) for name in COUNTS}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.spent, self.full = Flops(**state["spent"]), Flops(**state["full"])
        for name in COST_FIELDS:
            prices = state[name]
            setattr(self, name, None if prices is None else [Flops(**flops) for flops in prices])
        for name in COUNTS:
            setattr(self, name, state[name])

    def skip(self, fractions: Sequence[float]) -> None:
        """
        Subtract what an activation cache leaves out of the present forward pass of a training micro-batch. Does
        nothing outside one (evaluation).

        Args:
            fractions (`Sequence[float]`): for each unit from the front, the share of the batch's rows for which it did
                not run. Below `0` where it ran for more rows than there are; units at the end may be left out.
        """
        if self._elements:
            forward = sum(share * unit.forward for share, unit in zip(fractions, self._pass, strict=False))
            self._skipped += forward * self._latest

    def add_forward(self, elements: int) -> None:
        """Add a forward pass beside those of training, with so many elements of the main input."""
        self.spent += Flops(forward=sum(unit.forward for unit in self._pass) * elements)

    def start_of_step(self) -> None:
        """To be called before the first micro-batch of each optimizer step."""
        if self._counter is not None:  # the last micro-batch was given up before its end
            self._stop()
        self._elements, self._skipped = 0, 0.0
        if self._pass_due:
            # Not from a hook of the model: what `torch.compile` runs would escape a counter that starts in there.
            self._counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
            self._counter.mod_tracker = _UnitTracker(self._stack)  # type: ignore[assignment]
            self._counter.__enter__()
            # Dynamo marks what it first meets under a counter as never to be compiled.
            self._eager = torch.compiler.set_stance("force_eager")
            self._eager.__enter__()

    def end_of_backward(self) -> Flops:
        """To be called after the backward pass of each micro-batch; gives its FLOPs (forward and backward)."""
        if self._counter is not None:
            self._take(self._stop())
        cost = sum(self._pass, Flops()) * self._elements + Flops(forward=-self._skipped)
        self.spent += cost
        self.full += sum(self._full_pass or self._pass, Flops()) * self._elements
        self._passes += self._elements > 0
        self._all_elements += self._elements
        self._elements, self._skipped = 0, 0.0
        return cost

    def end_of_step(self) -> None:
        """To be called after each optimizer step, before its gradients are cleared."""
        if self._optimizer is None:
            return
        if isinstance(self._optimizer, AcceleratedOptimizer) and self._optimizer.step_was_skipped:
            return  # the gradients of a mixed-precision run have overflowed
        if self._step_due:
            self._count_step(self._optimizer)
            self._step_due = False
        self.spent += sum(self._step, Flops())
        self.full += sum(self._full_step or self._step, Flops())
        self._steps += 1

    def close(self) -> None:
        """Take the hooks off the model."""
        if self._counter is not None:
            self._stop()
        self._hook.remove()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        main_input = kwargs.get(self._main_input, args[0] if args else None)
        self._latest = main_input.numel() if isinstance(main_input, torch.Tensor) else 1
        self._elements += self._latest  # a loss may need several passes

    def _stop(self) -> FlopCounterMode:
        """End counting."""
        assert self._counter is not None
        counter, self._counter = self._counter, None
        self._eager.__exit__(None, None, None)
        counter.__exit__(None, None, None)
        return counter

    def _take(self, counter: FlopCounterMode) -> None:
        """Read off what a counted pass has cost."""
        if not self._elements:
            return

        def flops(phase: str, unit: int) -> float:
            return sum(counter.flop_counts[_UnitTracker.key(phase, unit)].values()) / self._elements

        units = range(len(self._stack) + 1)
        self._pass = [Flops(flops("forward", unit), flops("backward", unit)) for unit in units]
        self._pass_due = False
        if self._full_pass is None:
            self._full_pass = [
                cost + Flops(backward=2 * cost.forward) if unit < self._depth else cost
                for unit, cost in enumerate(self._pass)
            ]

    def _count_step(self, optimizer: Optimizer) -> None:
        """Work out what an optimizer step costs."""
        elements = 0.0
        step = [0.0] * (len(self._stack) + 1)
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            state = optimizer.state.get(parameter, {}).values()
            tensors = sum(isinstance(value, torch.Tensor) and value.shape == parameter.shape for value in state)
            step[self._units.get(parameter, len(self._stack))] += (2 + 5 * tensors) * _updated_here(parameter)
            elements += _updated_here(parameter)
        self._step = [Flops(optimizer=cost) for cost in step]
        if self._full_step is None:
            rate = sum(step) / elements if elements else 0.0
            for parameter in self._trainable:
                if self._units[parameter] < self._depth:
                    step[self._units[parameter]] += rate * _updated_here(parameter)
            self._full_step = [Flops(optimizer=cost) for cost in step]

    def _nothing(self) -> list[Flops]:
        return [Flops()] * (len(self._stack) + 1)

    def _average(self, per_element: list[Flops], per_step: list[Flops]) -> dict[str, Flops]:
        """FLOPs of one average micro-batch, by name of the unit."""
        passes = max(self._passes, 1)
        return {
            name: one * (self._all_elements / passes) + step * (self._steps / passes)
            for name, one, step in zip([*self._stack.names, HEAD], per_element, per_step, strict=True)
        }
