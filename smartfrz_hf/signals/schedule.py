"""Learning rates over a run: what is planned, what is observed, and when they rise again."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

TINY = 1e-300
# The plan is wrong if a rate differs from it by more than this share of the peak. Rounding, and steps that a loss scaler skips,
# make smaller differences.
TOLERANCE = 0.1
RISE = 1.1  # of a resumed run: its rate, relative to the one before


@dataclass
class _Cycle:
    """The highest and the lowest rate since the last restart."""

    peak: float = 0.0
    lowest: float = 0.0

    def restarts_at(self, rate: float) -> bool:
        """Whether this rate, the next one, begins a new cycle."""
        restarts = self.lowest < self.peak / 2 and rate >= max(2 * self.lowest, self.peak / 10)
        if restarts or rate > self.peak:
            self.peak = self.lowest = rate
        self.lowest = min(self.lowest, rate)
        return restarts


class LearningRates:
    """
    The learning rate over a run, as planned and as observed.

    Args:
        rates (`Sequence[float]`): at equal distances from the start of the run to its end, in any unit.
        unit (`float`, *optional*): the learning rate that a rate of one stands for. The first rate that is observed, by default.
        planned (`bool`, *optional*, defaults to `True`): whether the rates are known in advance. If not, those to come are taken
            to be as the last one that was observed.
    """

    def __init__(self, rates: Sequence[float], unit: float | None = None, planned: bool = True):
        self._rates = torch.tensor(rates, dtype=torch.float64, device="cpu")
        self._unit, self._planned = unit, planned
        self._cycle, self._step, self._rises = _Cycle(), -1, False
        self._derive()

    def _derive(self) -> None:
        before = self._rates.cumsum(0) - self._rates
        self.relative = (self._rates / self._rates.max().clamp(min=TINY)).float()
        self.spent = (before / self._rates.sum().clamp(min=TINY)).float()

    @classmethod
    def planned(cls, scheduler: Any, total_steps: int) -> "LearningRates":
        """
        The rate before each step of a run, as far as it is known in advance.

        Args:
            scheduler (`torch.optim.lr_scheduler.LRScheduler`, *optional*):
                The scheduler of the run, or Accelerate's wrapper of it. A `LambdaLR`, as nearly all schedules of Transformers
                are, is asked for its factors; of another scheduler, a copy is run ahead. Where that fails, as for
                `ReduceLROnPlateau`, and without a scheduler, the rate is taken as constant until another one is observed.
            total_steps (`int`): optimizer steps of the run. There is one more rate than steps.
        """
        stride = 1  # steps of the scheduler per optimizer step
        if isinstance(scheduler, AcceleratedScheduler):
            if scheduler.step_with_optimizer and not scheduler.split_batches:
                stride = AcceleratorState().num_processes
            scheduler = scheduler.scheduler
        if isinstance(scheduler, LambdaLR):
            factors = [float(scheduler.lr_lambdas[0](step * stride)) for step in range(total_steps + 1)]
            return cls(factors, float(scheduler.base_lrs[0]) or 1.0)
        if not isinstance(scheduler, LRScheduler):
            return cls([1.0] * (total_steps + 1), planned=False)
        done = min(max(0, getattr(scheduler, "last_epoch", 0)) // stride, total_steps)  # `ChainedScheduler` has none
        ahead = _run_ahead(scheduler, (total_steps - done) * stride)[::stride]
        if len(ahead) == 1 and done < total_steps:
            return cls([1.0] * (total_steps + 1), ahead[0] or 1.0, planned=False)
        ahead += ahead[-1:] * (total_steps + 1 - done - len(ahead))  # a schedule that ends before the run
        return cls([ahead[0]] * done + ahead, 1.0)

    def observe(self, step: int, rate: float) -> bool:
        """
        Take note of the rate that the optimizer really has.

        A rate that differs from the plan by more than a tenth of the peak ends the plan: from then on, the rates to come are
        taken to be as the last one.

        Args:
            step (`int`): optimizer steps done.
            rate (`float`): learning rate of the first parameter group in the next step.

        Returns:
            `bool`: whether the rate rises again, so that all units should train again. That is the case if it had fallen below
            half of its last peak, and has come to twice its lowest value since and to a tenth of that peak; and once in a
            resumed run whose rate is more than a tenth above what it was, as in a run that was given more steps.
        """
        rises, self._rises = self._rises, False
        if not self._step < step < len(self._rates):
            return rises
        self._unit = self._unit or rate or 1.0
        observed = rate / self._unit
        if abs(observed - float(self._rates[step])) > TOLERANCE * float(self._rates.max()):
            self._planned = False
        if not self._planned and bool((self._rates[step:] != observed).any()):
            self._rates[step:] = observed
            self._derive()
        for passed in self._rates[self._step + 1 : step + 1].tolist():
            rises |= self._cycle.restarts_at(passed * self._unit)
        self._step = step
        return rises

    def state_dict(self) -> dict[str, Any]:
        """
        What a run needs to continue.

        Returns:
            `dict`: `"step"` (the last one that was observed, or -1), `"rates"` (`torch.Tensor`: those up to it), `"unit"` (the
            learning rate that a rate of one stands for), `"planned"`, `"peak"` and `"lowest"` (since the last restart).
        """
        return {
            "step": self._step,
            "rates": self._rates[: self._step + 1].clone(),
            "unit": self._unit,
            "planned": self._planned,
            "peak": self._cycle.peak,
            "lowest": self._cycle.lowest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Continue from a state, with the plan for the rest of the run that this object was made with.

        Args:
            state (`dict`): what `state_dict` gave.
        """
        self._step = min(state["step"], len(self._rates) - 1)
        if self._step < 0:
            return
        own = self._unit is not None  # else there is nothing to compare with before the first observation
        self._unit = self._unit or state["unit"]
        past, known = state["rates"][: self._step + 1].to(self._rates), state["planned"]
        if self._unit != state["unit"]:
            past = past * state["unit"] / self._unit
        now, before = float(self._rates[self._step]), float(past[-1])
        self._cycle = _Cycle(state["peak"], state["lowest"])
        if own and known == self._planned and now > RISE * before:
            self._rises, self._cycle = True, _Cycle(now * self._unit, now * self._unit)
        elif not known:
            self._planned = False
            self._rates[self._step :] = before
        self._rates[: len(past)] = past
        self._derive()


def _run_ahead(scheduler: LRScheduler, steps: int) -> list[float]:
    """The learning rate of the first group now and after each of the next steps, as far as a copy of the scheduler goes."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = SGD([parameter], lr=0.0)
    optimizer.param_groups = [
        copy.deepcopy({key: value for key, value in group.items() if key != "params"}) | {"params": [parameter]}
        for group in scheduler.optimizer.param_groups
    ]
    rates = [float(optimizer.param_groups[0]["lr"])]
    try:
        # Without the parameters and their state.
        ahead = copy.deepcopy(scheduler, {id(scheduler.optimizer): optimizer})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of steps without steps of the optimizer
            for _ in range(steps):
                ahead.step()
                rates.append(float(optimizer.param_groups[0]["lr"]))
    except Exception:  # a scheduler may need what is not known in advance, such as a loss, or end before the run
        pass
    return rates
