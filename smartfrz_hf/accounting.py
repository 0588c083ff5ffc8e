"""What a run costs and what freezing saved: counted FLOPs, and the ledger of the freezing stages."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


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


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of forward and backward passes."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> "Flops":
        return Flops(self.forward * factor, self.backward * factor)


class ComputeMeter:
    """
    Counts the FLOPs of a training run.

    One real micro-batch is counted with [`torch.utils.flop_counter.FlopCounterMode`] at the start and after each
    change that `recount` announces; every other one is scaled by the number of elements (tokens, pixels) of its main
    input. Counting changes no result and draws no random number. Evaluation is not counted.

    Args:
        model ([`~torch.nn.Module`]): the model that the training loop calls.

    Attributes:
        spent ([`Flops`]): of all training micro-batches so far.
        full ([`Flops`]): what they had cost with nothing frozen.
    """

    def __init__(self, model: nn.Module):
        self.spent = self.full = Flops()
        self._per_element = self._full_per_element = Flops()
        self._elements = 0
        self._counter: FlopCounterMode | None = None
        self._forward = self._in_frozen = 0.0
        self._due = True
        self._frozen: list[nn.Module] = []
        self._watches: list[torch.utils.hooks.RemovableHandle] = []
        self._main_input = getattr(model, "main_input_name", "input_ids")
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def recount(self, frozen: Iterable[nn.Module]) -> None:
        """
        Count the next micro-batch anew.

        Args:
            frozen (`Iterable[torch.nn.Module]`): outermost modules that are frozen then. If there are some before
                anything was counted, their backward pass, which never ran, is taken as twice their forward pass.
        """
        self._due, self._frozen = True, list(frozen)

    def end_of_backward(self) -> Flops:
        """To be called after the backward pass of each micro-batch; gives its FLOPs."""
        if self._counter is not None:
            counter, self._counter = self._counter, None
            counter.__exit__(None, None, None)
            if self._elements:
                cost = Flops(self._forward, counter.get_total_flops() - self._forward) * (1 / self._elements)
                self._due = False
                self._per_element = cost
                if not self._full_per_element.total:
                    self._full_per_element = cost + Flops(0, 2 * self._in_frozen / self._elements)
            for watch in self._watches:
                watch.remove()
            self._watches = []
        cost = self._per_element * self._elements
        self.spent += cost
        self.full += self._full_per_element * self._elements
        self._elements = 0
        return cost

    def close(self) -> None:
        """Take the hooks off the model."""
        if self._counter is not None:
            self.end_of_backward()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        main_input = kwargs.get(self._main_input, args[0] if args else None)
        if self._counter is not None:  # the last pass was given up before its end
            self._counter.__exit__(None, None, None)
            self._counter = None
        self._elements = main_input.numel() if isinstance(main_input, torch.Tensor) else 1
        if self._due:
            self._in_frozen = 0.0
            self._counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
            self._counter.__enter__()
            for frozen in self._frozen:
                self._watch(frozen, self._counter)

    def _watch(self, module: nn.Module, counter: FlopCounterMode) -> None:
        """Sum up the forward FLOPs of a frozen module while counting."""
        begun = 0

        def begin(module: nn.Module, args: tuple) -> None:
            nonlocal begun
            begun = counter.get_total_flops()

        def end(module: nn.Module, args: tuple, output: Any) -> None:
            self._in_frozen += counter.get_total_flops() - begun

        self._watches += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._counter is not None:
            self._forward = self._counter.get_total_flops()


@dataclass
class Stage:
    """
    One freezing stage that changed the depth.

    Attributes:
        step (`int`): optimizer steps done.
        depth (`int`): frozen units from then on.
        units (`list[str]`): names of the units that froze.
        reason (`str`): why, in the policy's words.
    """

    step: int
    depth: int
    units: list[str]
    reason: str


@dataclass
class Ledger:
    """
    What froze when and why, and what it saved.

    Attributes:
        units (`list[str]`): names of all units, front first.
        max_steps (`int`): optimizer steps of the run.
        stages (`list[Stage]`): the freezing stages that changed the depth.
        decisions (`int`): how often the policy was asked.
        spent, full ([`Flops`]): of the training passes, and what they had cost with nothing frozen.
        frozen_parameters, trainable_parameters (`int`): frozen now, and trainable at the start.
    """

    units: list[str] = field(default_factory=list)
    max_steps: int = 0
    stages: list[Stage] = field(default_factory=list)
    decisions: int = 0
    spent: Flops = field(default_factory=Flops)
    full: Flops = field(default_factory=Flops)
    frozen_parameters: int = 0
    trainable_parameters: int = 0

    @property
    def depth(self) -> int:
        """Frozen units now."""
        return self.stages[-1].depth if self.stages else 0

    @property
    def freeze_steps(self) -> dict[str, int]:
        """The step at which each frozen unit froze, by the unit's name."""
        return {unit: stage.step for stage in self.stages for unit in stage.units}

    @property
    def frozen_fraction(self) -> float:
        """Share of the parameters trainable at the start that are frozen now."""
        return self.frozen_parameters / self.trainable_parameters if self.trainable_parameters else 0.0

    @property
    def compute_saved(self) -> float:
        """Share of the forward and backward FLOPs so far that freezing has saved."""
        return 1 - self.spent.total / self.full.total if self.full.total else 0.0

    def logs(self) -> dict[str, float]:
        """The three figures that go to `log_history` and the trackers."""
        return {
            "freeze/depth": self.depth,
            "freeze/frozen_fraction": self.frozen_fraction,
            "freeze/compute_saved": self.compute_saved,
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return asdict(self) | {"freeze_steps": self.freeze_steps, **self.logs()}
