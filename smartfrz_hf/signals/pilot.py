"""The pilot: the first steps of a run, what their gradients show of each unit, and the weights to go back to."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..model.units import BlockStack, Unit
from .weights import WeightSampler

WEIGHTS_PER_UNIT = 1024  # sampled
HEAD = "head"
MIN_STEPS = 4  # of a pilot: fewer gradients show nothing but noise
MAX_RATE_FACTOR = 4.0
REACH_SHARE = 0.1
# How far a step may move the weights, relative to them, at a rate that is raised because fewer units train. Runs with 0.005 trained
# well, and one of two with 0.008 diverged.
MOST_MOTION = 0.005
LEAST_AGREEMENT = -0.1  # over four steps, runs that learn have had -0.05 by chance
EPSILON = 1e-30


@dataclass(frozen=True)
class PilotSignals:
    r"""
    What the first steps of a run show of each unit, at its sampled weights.

    With \\(g_t\\) the gradient before step \\(t\\) and \\(w_t\\) the weights then, for each unit and, last, the head (zeros where it
    has nothing to train):

    Attributes:
        steps (`int`): optimizer steps.
        parameters (`torch.Tensor` of shape `(units + 1,)`): trainable parameters.
        gradient (`torch.Tensor` of shape `(units + 1,)`): root mean square of the gradient of one weight.
        loss_change (`torch.Tensor` of shape `(units + 1,)`):
            \\(\sum_t g_{t+1} \cdot (w_{t+1} - w_t)\\), the change of the loss that the unit's motion has brought, for one
            weight ("loss change allocation", Lan et al., NeurIPS 2019).
        displacement (`torch.Tensor` of shape `(units + 1,)`): root mean square of \\(w_T - w_0\\).
        motion (`torch.Tensor` of shape `(units + 1,)`):
            What a step at the peak of the learning rate moves a weight by, relative to the weights of its unit: root mean squares of
            \\(w_{t+1} - w_t\\) over those of \\(w_0\\) and of the learning rates relative to the peak.
        pretrained (`int`): units in front of the first block whose weights are as a library initializes them.
        regression (`bool`): whether the model has a single output. Its pilot shows how the mean of the labels is learned.
    """

    steps: int
    parameters: torch.Tensor
    gradient: torch.Tensor
    loss_change: torch.Tensor
    displacement: torch.Tensor
    motion: torch.Tensor
    pretrained: int
    regression: bool = False

    @property
    def reach(self) -> torch.Tensor:
        """
        By how much each unit's motion could have changed the loss at most, `(units,)`: the root mean squares of its gradient and
        of its motion, times its parameters.
        """
        return (self.gradient.double() * self.displacement * self.parameters)[:-1]

    @property
    def contributions(self) -> torch.Tensor:
        """
        By how much each unit's motion has lowered the loss, `(units,)`. A tenth of its reach is added, since a few steps show
        little, and no unit is worth nothing.
        """
        lowered = (-self.loss_change.double() * self.parameters)[:-1].clamp(min=0)
        return lowered + REACH_SHARE * self.reach

    @property
    def front_shares(self) -> torch.Tensor:
        """The share of each unit and all in front of it in the contributions of all units, `(units,)`."""
        return self.contributions.cumsum(0) / self.contributions.sum().clamp(min=EPSILON)

    @property
    def parameters_left(self) -> torch.Tensor:
        """The parameters that still train if the front up to each unit is frozen, with the head, `(units,)`."""
        return self.parameters.double().flip(0).cumsum(0).flip(0)[1:]

    @property
    def agreement(self) -> float:
        """Change of the loss that the motion of all units has brought, over their reach; positive where the loss falls."""
        lowered = -float((self.loss_change.double() * self.parameters)[:-1].sum())
        return lowered / max(float(self.reach.sum()), EPSILON)

    @property
    def finite(self) -> bool:
        """Whether a step with finite gradients was recorded, and all weights were finite after the last step."""
        return self.steps > 0 and bool(self.displacement.isfinite().all())

    @property
    def objection(self) -> str | None:
        """Why nothing should freeze from the start, if there is a reason."""
        if not self.pretrained:
            return "the blocks are as a library initializes them"
        if not self.finite:
            return "the weights or gradients are not finite in the pilot"
        if not self.reach.sum() > 0:
            return "no weight moves in the pilot"
        if not self.agreement > LEAST_AGREEMENT:  # also where it is not a number
            return "the loss rises in the pilot"
        if self.regression:
            return "the pilot of a regression shows little but the mean of its labels"
        return None

    def rate_factor(self, depth: int) -> float:
        r"""
        What the learning rate of the rest is multiplied with if the front is frozen.

        That is the larger of two factors, and at most 4:

        - \\(U / (U - d)\\) with \\(d\\) of \\(U\\) units frozen, as fewer units train best at a higher rate, but no more than lets a
          step move a unit that trains by 0.005 of its weights. Units that have nothing to train do not count.
        - \\(1 / (1 - c)\\), with \\(c\\) the share of the front in the contributions of all units: so the loss falls as fast as it
          would with everything training. The head is left out: it brings much in the pilot, and soon no longer.

        It is 1 where the contributions are not finite.

        Args:
            depth (`int`): frozen units.
        """
        total, rest = float(self.contributions.sum()), float(self.contributions[depth:].sum())
        if not 0 < total < float("inf"):
            return 1.0
        trains = self.parameters[:-1] > 0
        motion = max(self.motion[:-1][depth:].tolist(), default=float("inf"))
        fewer = min(int(trains.sum()) / max(int(trains[depth:].sum()), EPSILON), MOST_MOTION / max(motion, EPSILON))
        return min(MAX_RATE_FACTOR, max(fewer, total / max(rest, EPSILON)))


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
    """Whether a model of Transformers has a single output, as its configuration says."""
    config = getattr(model, "config", None)
    return getattr(config, "problem_type", None) == "regression" or getattr(config, "num_labels", None) == 1


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
        return self._sampler.read_all(self._recorded).cpu()

    @torch.no_grad()
    def before_update(self) -> None:
        """
        Take note of the gradients of a step, before it is taken. To be called in all processes. Gradients that are not finite
        are left out: a loss scaler will undo the step, and finds a lower scale so in its first steps.
        """
        gradients, weights = self._sampler.read_gradients(self._recorded).cpu(), self._read()
        if not gradients.isfinite().all():
            return
        self._loss_change += (gradients * (weights - self._previous)).mean(
            1
        )  # of the batch after the one that moved it
        self._moved += ((weights - self._previous) ** 2).mean(1)
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
        return PilotSignals(
            self.steps,
            parameters,
            gradient,
            change,
            displacement,
            motion,
            self._pretrained,
            is_regression(self._stack.model),
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
            for name, tensor in _tensors(unit).items():
                copy = copies.get(name)
                # Some models make a buffer anew when a longer row comes, such as sinusoidal positions.
                if copy is not None and name not in kept and copy.shape == _local(tensor).shape:
                    _local(tensor).copy_(copy)

    def _convert(self, how: Callable, number: int, copies: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = _tensors(self._stack.units[number])
        return {name: how(copy, tensors[name]) for name, copy in copies.items()}

    def state_dict(self) -> dict[str, Any]:
        """
        What a run needs to continue. Under FSDP2 all ranks have to call it.

        Returns:
            `dict`: `"steps"`, `"pretrained"` (units), `"weights"` (by unit, those of the start by name), `"sampled_start"`, `"sampled_previous"`,
            `"gradient_squares"`, `"loss_change"` and `"motion_squares"` (one number for each unit, and the head if it trains).
        """
        return {
            "steps": self.steps,
            "pretrained": self._pretrained,
            "weights": {
                str(number): self._convert(_whole, number, copies) for number, copies in enumerate(self._copies)
            },
            "sampled_start": self._start,
            "sampled_previous": self._previous,
            "gradient_squares": self._squares,
            "loss_change": self._loss_change,
            "motion_squares": self._moved,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Under FSDP2 all ranks have to call it."""
        self.steps, self._pretrained = state["steps"], state["pretrained"]
        self._copies = [self._convert(_part, int(number), weights) for number, weights in state["weights"].items()]
        self._start, self._previous = state["sampled_start"], state["sampled_previous"]
        self._squares = state["gradient_squares"]
        self._loss_change = state["loss_change"]
        # Checkpoints of earlier versions have none.
        self._moved = state.get("motion_squares", ((self._previous - self._start) ** 2).mean(1))


def _tensors(unit: Unit) -> dict[str, torch.Tensor]:
    """The parameters and the buffers of a unit, by dotted name."""
    parameters = {name: p.detach() for name, p in unit.named_parameters().items()}
    return parameters | {
        f"{prefix}.{name}": buffer
        for prefix, module in unit.modules.items()
        for name, buffer in module.named_buffers()
    }


def _copy(unit: Unit) -> dict[str, torch.Tensor]:
    """Those that training changes, in host memory."""
    fixed = {name for name, p in unit.named_parameters().items() if not p.requires_grad}
    return {name: _local(t).to("cpu", copy=True) for name, t in _tensors(unit).items() if name not in fixed}


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
