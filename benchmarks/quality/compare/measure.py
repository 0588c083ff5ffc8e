"""What a run costs: seconds by what they were spent on, FLOPs, and memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from benchmarks.tasks import bf16_autocast
from smartfrz_hf.model.nested import main_input_elements
from smartfrz_hf.model.tracing import evaluation_mode
from smartfrz_hf.signals.probe import FirstBatch

ROWS = 16
STATUS = Path("/proc/self/status")


def convolution_backward(
    out: torch.Size, inputs: torch.Size, weight: torch.Size, *args: Any, out_shape: Any = None
) -> int:
    """
    FLOPs of the backward pass of a convolution, from the shapes of the output's gradient, of its input and its weight: those of the
    forward pass for each of the two gradients that is asked for. The counter of torch takes grouped convolutions for whole ones.
    """
    transposed, asked = args[4], args[7]
    return 2 * prod(inputs if transposed else out) * prod(weight[1:]) * sum(asked[:2])


class Stopwatch:
    """Adds up wall and processor seconds by name. Parts may lie within each other; each name holds its own whole time."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        begun = (time.perf_counter(), time.process_time())
        try:
            yield
        finally:
            total = self.seconds.setdefault(name, [0.0, 0.0])
            total[0] += time.perf_counter() - begun[0]
            total[1] += time.process_time() - begun[1]

    def timed(self, function: Callable, name: str) -> Callable:
        """A function whose calls are measured."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.measure(name):
                return function(*args, **kwargs)

        return call

    def result(self, without: tuple[str, ...] = ("evaluation", "measuring")) -> dict[str, dict[str, float]]:
        """Wall and processor seconds by name; those of `training` are less what lies within it and is no training."""
        found = {}
        for place, kind in enumerate(("wall", "processor")):
            parts = {name: total[place] for name, total in self.seconds.items()}
            parts["training"] -= sum(parts.get(name, 0.0) for name in without)
            parts["evaluation"] = parts.get("evaluation", 0.0) + parts.pop("final evaluation", 0.0)
            found[kind] = {
                name: round(parts.get(name, 0.0), 2) for name in ("training", "overhead", "evaluation", "loading")
            }
        return found


class FlopMeter(TrainerCallback):
    """
    Counts the FLOPs of a run of the Trainer, whatever trains in it, by the conventions of
    [`~smartfrz_hf.cost.flops.ComputeMeter`].

    Whenever other parameters require gradients than before, one forward and one backward pass of a few rows of the first
    batch are counted after the optimizer's step. They cost what the elements of the model's main input (tokens, pixels)
    cost in all steps with these parameters. They draw no random number and change nothing, and their time is `measuring`.

    Args:
        model (`torch.nn.Module`): what the Trainer trains.
        watch ([`Stopwatch`]): measures the time that counting takes.
    """

    def __init__(self, model: nn.Module, watch: Stopwatch):
        self.model, self.watch = model, watch
        self.forward = self.backward = self.optimizer = 0.0
        self._costs: dict[tuple[bool, ...], tuple[float, float, float]] = {}
        self._elements = 0
        self._parameters = list(model.parameters())
        self._batch = FirstBatch(model, ROWS, without=())
        self._hook = model.register_forward_pre_hook(self._before_pass, with_kwargs=True)

    def result(self) -> dict[str, float]:
        """FLOPs of forward and backward passes and of the optimizer so far."""
        return {"forward": self.forward, "backward": self.backward, "optimizer": self.optimizer}

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        trained = tuple(p.requires_grad for p in self._parameters)
        if trained not in self._costs:
            with self.watch.measure("measuring"):
                update = self._count_update(getattr(optimizer, "optimizer", optimizer))
                self._costs[trained] = (*self._count_pass(), update)
        forward, backward, update = self._costs[trained]
        self.forward += forward * self._elements
        self.backward += backward * self._elements
        self.optimizer += update
        self._elements = 0

    def on_train_end(self, args, state, control, **kwargs):
        self._hook.remove()

    def _before_pass(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            self._elements += main_input_elements(module, (args, kwargs))

    def _count_update(self, optimizer: Any) -> float:
        total = 0.0
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            state = optimizer.state.get(parameter, {}).values()
            tensors = sum(isinstance(value, torch.Tensor) and value.shape == parameter.shape for value in state)
            total += (2 + 5 * tensors) * parameter.numel()
        return total

    def _count_pass(self) -> tuple[float, float]:
        """FLOPs of a forward and of a backward pass for one element."""
        args, kwargs = self._batch.inputs or ((), {})
        elements = main_input_elements(self.model, (args, kwargs))
        plain = sdpa_kernel(SDPBackend.MATH)  # not all fused kernels are known to the counter
        with evaluation_mode(self.model), torch.enable_grad(), bf16_autocast(), plain:
            with FlopCounterMode(display=False) as forward:
                loss = self.model(*args, **kwargs).loss
            mapping = {torch.ops.aten.convolution_backward: convolution_backward}
            with FlopCounterMode(display=False, custom_mapping=mapping) as backward:
                loss.backward()
        for parameter in self._parameters:
            parameter.grad = None
        return forward.get_total_flops() / elements, backward.get_total_flops() / elements


def reset_peak_memory() -> int:
    """Begin to watch the memory, and give the bytes in use now: of the GPU where there is one, of this process elsewhere."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is measured anew
    return psutil.Process().memory_info().rss


def peak_memory() -> int | None:
    """The most bytes in use since then; `None` where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if not STATUS.is_file():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
