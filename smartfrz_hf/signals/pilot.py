"""The pilot: the first steps of a run, their gradients at sampled weights, and the weights to go back to."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ..model.units import BlockStack, Unit
from .pilot_signals import EPSILON, PilotSignals
from .weights import WeightSampler

WEIGHTS_PER_UNIT = 1024  # sampled
HEAD = "head"
EACH_POSITION = re.compile("For(TokenClassification|QuestionAnswering|AudioFrameClassification|CTC)")
MIN_STEPS = 4  # of a pilot: fewer gradients show nothing but noise


def pilot_steps(length: float, total_steps: int) -> int:
    """
    Optimizer steps of a pilot: at least four, and none in a run that is too short for them to be a tenth of it.

    Args:
        length (`float`): fraction of the run; 0 for no pilot.
        total_steps (`int`): optimizer steps of the run.
    """
    return max(MIN_STEPS, round(length * total_steps)) if length and total_steps >= 10 * MIN_STEPS else 0


@torch.no_grad()
def is_fresh(block: Unit) -> bool:
    """
    Whether a block looks as a library initializes it: the scales of its norms are all the same number, which training changes at
    once; in a block without them, all biases. A block with neither counts as fresh.
    """
    vectors = {name: p for name, p in block.named_parameters().items() if p.dim() == 1 and _local(p).numel() > 1}
    scales = [p for name, p in vectors.items() if name.endswith("weight")] or list(vectors.values())
    return all(bool((_local(p) == _local(p)[0]).all()) for p in scales)


def is_regression(model: nn.Module) -> bool:
    """Whether a model of Transformers, or one with a head in it, has a single output, as its configuration says."""
    inner = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    found = [getattr(model, "config", None), *(module.config for module in inner if module.base_model is not module)]
    return any(
        getattr(config, "problem_type", None) == "regression" or getattr(config, "num_labels", None) == 1
        for config in found
    )


def is_language_model(model: nn.Module) -> bool:
    """Whether a model of Transformers, or one in it, predicts tokens: causal, masked, or sequence to sequence."""
    found = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return any(each.get_output_embeddings() is not None or each.can_generate() for each in found)


def labels_positions(model: nn.Module) -> bool:
    """Whether a model of Transformers, or one in it, has an output for each token or frame, as its name says."""
    kinds = (type(module).__name__ for module in model.modules() if isinstance(module, PreTrainedModel))
    return any(EACH_POSITION.search(kind) for kind in kinds)


class Pilot:
    """
    Records the first steps of a run, and keeps the weights of its start until a policy has decided what freezes with them.

    The copy is in host memory and has the trainable parameters and the buffers of the units: what else is in them does not
    change. Under FSDP2 each process keeps its shards.

    Args:
        stack ([`BlockStack`]): the units.
        seed (`int`): seed of the sampled positions.

    Attributes:
        steps (`int`): optimizer steps that were recorded.
    """

    def __init__(self, stack: BlockStack, seed: int):
        self._stack = stack
        head = {name: p for name, p in stack.head_parameters().items() if p.requires_grad}
        units = [*stack.units, *([Unit(HEAD, {}, head)] if head else [])]
        self._sampler = WeightSampler(units, WEIGHTS_PER_UNIT, seed)
        self._recorded = range(len(units))
        self._copies = [_copy(unit) for unit in stack]
        sizes = [sum(p.numel() for p in unit.named_parameters().values() if p.requires_grad) for unit in units]
        self._parameters = torch.tensor(sizes, dtype=torch.float64, device="cpu")
        self._start = self._read()
        self._previous = self._start
        self._squares, self._loss_change, self._moved = torch.zeros(3, len(units), dtype=torch.float32, device="cpu")
        fresh = (index for index, unit in enumerate(stack.units[1:], start=1) if is_fresh(unit))
        self._pretrained = next(fresh, len(stack))
        if self._pretrained == 1:  # then the stem has learned nothing either
            self._pretrained = 0
        self.steps = 0

    def _read(self) -> torch.Tensor:
        return self._sampler.read(self._recorded).cpu()

    @torch.no_grad()
    def before_update(self) -> None:
        """
        Take note of the gradients of a step, before it is taken. To be called in all processes. Gradients that are not finite
        are left out: a loss scaler will undo the step, and finds a lower scale so in its first steps.
        """
        gradients, weights = self._sampler.read_gradients(self._recorded).cpu(), self._read()
        if not gradients.isfinite().all():
            return
        moved = weights - self._previous
        self._loss_change += (gradients * moved).mean(1)  # of the batch after the one that moved it
        self._moved += (moved**2).mean(1)
        self._squares += (gradients**2).mean(1)
        self._previous = weights
        self.steps += 1

    def signals(self, rates: torch.Tensor) -> PilotSignals:
        """
        What the steps so far have shown.

        Args:
            rates (`torch.Tensor`): their learning rates, relative to the peak of the schedule.
        """
        now = self._read()
        squares = (self._moved + ((now - self._previous) ** 2).mean(1)) / max(1, self.steps)
        weights = (self._start**2).mean(1) * (rates**2).mean()
        found = [
            self._parameters,
            (self._squares / max(1, self.steps)).sqrt(),
            self._loss_change,
            ((now - self._start) ** 2).mean(1).sqrt(),
            (squares / weights.clamp(min=EPSILON)).sqrt(),
        ]
        missing = len(self._stack) + 1 - len(self._recorded)
        parameters, gradient, change, displacement, motion = (nn.functional.pad(each, (0, missing)) for each in found)
        model = self._stack.model
        return PilotSignals(
            self.steps,
            parameters,
            gradient,
            change,
            displacement,
            motion,
            self._pretrained,
            is_regression(model),
            is_language_model(model),
            labels_positions(model),
        )

    @torch.no_grad()
    def restore(self, depth: int, kept: Collection[str] = ()) -> None:
        """
        Put the units in front of `depth` back to the weights that they had when the pilot began.

        Args:
            depth (`int`): number of units.
            kept (`Collection[str]`, *optional*): parameters that go on training, and stay as they are, by dotted name.
        """
        for unit, copies in zip(self._stack.units[:depth], self._copies, strict=False):
            for name, tensor in unit.named_tensors().items():
                copy = copies.get(name)
                # Some models make a buffer anew when a longer row comes, such as sinusoidal positions.
                if copy is not None and name not in kept and copy.shape == _local(tensor).shape:
                    _local(tensor).copy_(copy)

    def _convert(self, how: Callable, number: int, copies: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = self._stack.units[number].named_tensors()
        return {name: how(copy, tensors[name]) for name, copy in copies.items()}

    def state_dict(self) -> dict[str, Any]:
        """
        What a run needs to continue. Under FSDP2 all ranks have to call it.

        Returns:
            `dict`: `"steps"`, `"pretrained"` (units), `"weights"` (by unit, those of the start by name), `"sampled_start"`,
            `"sampled_previous"`, `"gradient_squares"`, `"loss_change"` and `"motion_squares"` (one number for each unit, and the
            head if it trains).
        """
        return {
            "steps": self.steps,
            "pretrained": self._pretrained,
            "weights": {
                str(number): self._convert(_whole, number, copies) for number, copies in enumerate(self._copies)
            },
            "sampled_start": self._start,
            "sampled_previous": self._previous.clone(),  # before the first step it is that of the start
            "gradient_squares": self._squares.clone(),
            "loss_change": self._loss_change.clone(),
            "motion_squares": self._moved.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Under FSDP2 all ranks have to call it."""
        self.steps, self._pretrained = state["steps"], state["pretrained"]
        self._copies = [self._convert(_part, int(number), weights) for number, weights in state["weights"].items()]
        self._start, self._previous = state["sampled_start"], state["sampled_previous"]
        self._squares, self._loss_change = state["gradient_squares"].clone(), state["loss_change"].clone()
        self._moved = state["motion_squares"].clone()


def _copy(unit: Unit) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a unit that training changes, in host memory."""
    fixed = {name for name, p in unit.named_parameters().items() if not p.requires_grad}
    tensors = unit.named_tensors().items()
    return {name: _local(t.detach()).to("cpu", copy=True) for name, t in tensors if name not in fixed}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor of which this process holds a part, put together from all processes."""
    if not isinstance(like, DTensor):
        return local
    parts = DTensor.from_local(
        local.to(like.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
    return parts.full_tensor().cpu()


def _part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements).to_local().cpu()
