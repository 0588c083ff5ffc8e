"""What a run costs and what it would cost with nothing frozen, in FLOPs by unit."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers.utils import logging

from .._compat import forget_failed_pass
from ..model.forward_patch import LeftBehind
from ..model.nested import main_input_elements
from ..model.units import BlockStack
from ..signals.probe import ROWS, FirstBatch
from .ledger import HEAD, Flops
from .passes import PassCosts, apart_of
from .trace import TrainableWeights, costs_by_parameters, count_pass
from .update import count_update

logger = logging.get_logger(__name__)


class ComputeMeter:
    """
    Counts the FLOPs of a training run, by unit.

    Forward and backward: one forward pass of a few training rows is counted, see
    [`~smartfrz_hf.cost.trace.count_pass`]. It shows what each unit costs per element (token, pixel) of the main input,
    and how much of its backward pass is needed, whatever is frozen. A hook counts the elements of each training-mode pass.
    A pass without gradients, as in gradient caching, costs its forward pass alone. Costs that do not grow with the
    batch, such as those of DeBERTa's relative positions, are scaled like all others. The counted pass is left out.

    Optimizer: the counter does not see elementwise work, so a convention stands in for it. In each optimizer step, an
    element of a parameter that has a gradient costs 2 FLOPs for the plain update, and 5 for each tensor of the
    parameter's shape in the optimizer's state: 2 for SGD, 7 with momentum, 12 for AdamW. Under FSDP2 a process is
    charged for its share of the elements. What frozen parameters would cost is taken from the average of the others if
    they were frozen from the start.

    Args:
        model ([`~torch.nn.Module`]): the model that the training loop calls.
        stack ([`BlockStack`]): its units, before any is frozen.
        optimizer (`torch.optim.Optimizer`, *optional*): without it the optimizer's FLOPs are left out.
    """

    def __init__(self, model: nn.Module, stack: BlockStack, optimizer: Optimizer | None = None):
        # DDP hands the batch on to the module inside it.
        model = model.module if isinstance(model, DistributedDataParallel) else model
        self._model, self._stack, self._optimizer = model, stack, optimizer
        self._weights = TrainableWeights(model, stack)
        self._frozen = self._latest = 0  # the frozen units are a bit mask
        self._set_costs(None)
        units = len(stack) + 1
        self._update = np.zeros(units)  # FLOPs of an optimizer step with nothing frozen, by unit
        # What has run: elements and optimizer steps by what was frozen, passes, elements of passes without gradients and
        # of those beside training, and elements that a cache has left out, by unit.
        self._elements: Counter[int] = Counter()
        self._steps: Counter[int] = Counter()
        self._skipped = np.zeros(units)
        self._passes = self._forward_only = self._aside = 0
        self._new_elements = self._new_passes = self._new_forward_only = 0  # since `_collect`
        self._taken: Flops | None = None  # what `take` has given so far
        self._first_batch = FirstBatch(model, ROWS, without=())  # some models need the labels to run
        self._hook = model.register_forward_pre_hook(LeftBehind(self._before_pass), with_kwargs=True)

    @property
    def spent(self) -> Flops:
        """FLOPs of the training so far."""
        return _total(self._spent_by_unit())

    @property
    def full(self) -> Flops:
        """FLOPs that the training so far would have cost with nothing frozen and no activation cache."""
        return _total(self._full_by_unit())

    @property
    def unit_parameters(self) -> dict[str, int]:
        """Parameters that were trainable at the start, by unit and `"head"` (everything else)."""
        sizes = [0] * (len(self._stack) + 1)
        for parameter, unit in self._weights.units.items():
            sizes[unit] += parameter.numel()
        return dict(zip(self._names, sizes, strict=True))

    @property
    def unit_flops(self) -> dict[str, Flops]:
        """FLOPs of the average training pass so far, by unit and `"head"` (everything else)."""
        return self._average(self._spent_by_unit())

    @property
    def full_unit_flops(self) -> dict[str, Flops]:
        """The same with nothing frozen and no activation cache."""
        return self._average(self._full_by_unit())

    @property
    def gap(self) -> float:
        """FLOPs of the backward passes so far through units that are frozen behind units that train."""
        self._collect()
        return sum(
            elements * float(self._backward_with(frozen) @ self._among(apart_of(frozen)))
            for frozen, elements in self._elements.items()
        )

    def savings(self) -> list[float]:
        """
        For each depth from 0 to all units, the share of a training step's FLOPs that freezing so many units saves, without a
        cache. Zeros until a step has been counted.
        """
        per_step = self._elements.total() / max(1, self._steps.total())
        depths = range(len(self._update))
        backward = np.array([self._backward_with((1 << depth) - 1).sum() for depth in depths])
        update = np.array([self._update[depth:].sum() for depth in depths])
        cost = (self._forward.sum() + backward) * per_step + update
        return (1 - cost / cost[0]).tolist() if cost[0] else [0.0] * len(cost)

    def freeze_to(self, depth: int, apart: Iterable[int] = ()) -> None:
        """
        From now on, other units are frozen: more than before, or fewer.

        Args:
            depth (`int`): units of the front.
            apart (`Iterable[int]`, *optional*): indices of units behind it.
        """
        self._collect()
        self._frozen = (1 << depth) - 1 | sum(1 << unit for unit in set(apart) if unit >= depth)

    def count(self) -> None:
        """
        Do the counted pass, unless it is done or no training pass has come yet. An activation cache must be bypassed
        meanwhile. If the pass fails, one warning says so, and a unit is taken to cost 2 FLOPs per trainable parameter
        and element in the forward pass, and twice that in the backward pass.
        """
        inputs = self._first_batch.inputs
        if self._costs is not None or inputs is None:
            return
        try:
            elements = main_input_elements(self._model, inputs)
            self._set_costs(count_pass(self._model, self._stack, self._weights, inputs, elements))
        except Exception as error:  # the model's own code runs here
            name = type(self._stack.model).__name__
            logger.warning(
                f"The FLOPs of {name} cannot be counted ({type(error).__name__}: {error}). "
                "They are estimated from its trainable parameters. Training is not affected."
            )
            self._set_costs(costs_by_parameters(self._weights))
            forget_failed_pass(self._model)

    def end_of_step(self) -> None:
        """To be called after each optimizer step, before its gradients are cleared."""
        self._collect()
        if self._optimizer is None:
            return
        if not self._elements.total() and not self._steps:
            logger.warning(
                f"The optimizer has taken a step, but {type(self._stack.model).__name__} has not run in training mode. What such "
                "passes cost is not counted, and the front probe gets no rows from them. Call `model.train()`, with dropout set to 0 "
                "if there is to be none."
            )
        if not self._update.any():
            self._update[:] = count_update(self._optimizer, self._weights, self._frozen)
        self._steps[self._frozen] += 1

    def take(self) -> Flops:
        """FLOPs of the forward and backward passes since the last call. Nothing until the counted pass is done."""
        spent, taken = self.spent, self._taken or Flops()
        self._taken = spent
        return Flops(spent.forward - taken.forward, spent.backward - taken.backward)

    def skip(self, fractions: Sequence[float]) -> None:
        """
        Subtract what an activation cache leaves out of the forward pass of the latest training batch.

        Args:
            fractions (`Sequence[float]`): for each unit from the front, the share of the batch's rows for which it did
                not run. Below `0` where it ran for more rows than there are; units at the end may be left out.
        """
        self._skipped[: len(fractions)] += np.asarray(fractions) * self._latest

    def add_forward(self, elements: int) -> None:
        """Add a forward pass beside those of training, with so many elements of the main input."""
        self._aside += elements

    def close(self) -> None:
        """Remove the hooks from the model."""
        self._hook.remove()
        self._first_batch.close()

    def state_dict(self) -> dict[str, Any]:
        """
        JSON values: `costs` (`forward` and `backward` of [`PassCosts`]; `None` until counted), `update` (FLOPs of an
        optimizer step by unit), `elements` and `steps` (by the frozen units, a hexadecimal bit mask), `passes`,
        `forward_elements` (of passes without gradients), `probe_elements`, `skipped_elements` (by unit), `taken` (forward
        and backward FLOPs that `take` has given; `None` if it was never called).
        """
        self._collect()
        return {
            "costs": None if self._costs is None else self._costs.state_dict(),
            "update": self._update.tolist(),
            "elements": {hex(frozen): elements for frozen, elements in self._elements.items()},
            "steps": {hex(frozen): steps for frozen, steps in self._steps.items()},
            "passes": self._passes,
            "forward_elements": self._forward_only,
            "probe_elements": self._aside,
            "skipped_elements": self._skipped.tolist(),
            "taken": None if self._taken is None else [self._taken.forward, self._taken.backward],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned. What is frozen now is not part of it, see `freeze_to`."""
        self._set_costs(None if state["costs"] is None else PassCosts.from_state(state["costs"]))
        self._update, self._skipped = np.array(state["update"]), np.array(state["skipped_elements"])
        self._elements = Counter({int(frozen, 16): elements for frozen, elements in state["elements"].items()})
        self._steps = Counter({int(frozen, 16): steps for frozen, steps in state["steps"].items()})
        self._passes, self._forward_only = state["passes"], state["forward_elements"]
        self._aside = state["probe_elements"]
        # A Trainer that counts `total_flos` itself has taken everything. Earlier versions did not say what was taken.
        taken = state.get("taken")
        self._taken = self.spent if taken is None else Flops(*taken)
        if self._costs is not None:
            self._first_batch.close()

    def _set_costs(self, costs: PassCosts | None) -> None:
        self._costs = costs
        self._forward = np.zeros(len(self._stack) + 1) if costs is None else np.array(costs.forward)
        self._backward: dict[int, np.ndarray] = {}

    def _backward_with(self, frozen: int) -> np.ndarray:
        """FLOPs of each unit's backward pass while some units are frozen, per element; zeros until counted."""
        if self._costs is None:
            return np.zeros(len(self._stack) + 1)
        if frozen not in self._backward:
            self._backward[frozen] = np.array(self._costs.backward_with(frozen))
        return self._backward[frozen]

    def _among(self, units: int) -> np.ndarray:
        """1 for each unit of a set, 0 for others."""
        return np.array([float(units >> unit & 1) for unit in range(len(self._stack) + 1)])

    def _before_pass(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # `torch.compile` may trace this: only numbers are written, and they are the same again in the next step.
        self._latest = main_input_elements(module, (args, kwargs)) if module.training else 0
        if torch.is_grad_enabled():
            self._new_elements += self._latest
            self._new_passes += module.training
        else:
            self._new_forward_only += self._latest

    def _collect(self) -> None:
        """Enter the passes since the last call into the account."""
        self._elements[self._frozen] += self._new_elements
        self._passes += self._new_passes
        self._forward_only += self._new_forward_only
        self._new_elements = self._new_passes = self._new_forward_only = 0

    def _spent_by_unit(self) -> np.ndarray:
        """Forward, backward and optimizer FLOPs of the units and the head, of shape `(3, units + 1)`."""
        self._collect()
        ran = self._elements.total() + self._forward_only + self._aside - self._skipped
        nothing = np.zeros(len(self._stack) + 1)
        backward = sum((self._backward_with(f) * elements for f, elements in self._elements.items()), start=nothing)
        updates = sum((self._among(~frozen) * steps for frozen, steps in self._steps.items()), start=nothing)
        return np.stack([self._forward * ran, backward, self._update * updates])

    def _full_by_unit(self) -> np.ndarray:
        self._collect()
        elements, backward = self._elements.total(), self._backward_with(0)
        ran = elements + self._forward_only
        return np.stack([self._forward * ran, backward * elements, self._update * self._steps.total()])

    @property
    def _names(self) -> list[str]:
        return [*self._stack.names, HEAD]

    def _average(self, by_unit: np.ndarray) -> dict[str, Flops]:
        rows = (by_unit / max(self._passes, 1)).T.tolist()
        return {name: Flops(*flops) for name, flops in zip(self._names, rows, strict=True)}


def _total(by_unit: np.ndarray) -> Flops:
    return Flops(*by_unit.sum(axis=1).tolist())
