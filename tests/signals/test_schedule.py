"""What is known of learning rates in advance, what is observed, and when they count as rising again."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from torch.optim import SGD
from torch.optim import lr_scheduler as torch_schedules
from transformers import get_cosine_with_hard_restarts_schedule_with_warmup, get_linear_schedule_with_warmup

from smartfrz_hf.signals import schedule
from smartfrz_hf.signals.schedule import LearningRates

STEPS = 24


def optimizer(rate=0.3):
    return SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def drive(scheduler, rates, start=0, until=STEPS, metric=1.0):
    """The real learning rates, and the steps at which they were said to rise again."""
    owner = scheduler.optimizer
    real, rises = [owner.param_groups[0]["lr"]], []
    for step in range(start + 1, until + 1):
        owner.step()
        plateau = isinstance(scheduler, torch_schedules.ReduceLROnPlateau)
        scheduler.step(metric) if plateau else scheduler.step()
        real.append(owner.param_groups[0]["lr"])
        if rates.observe(step, real[-1]):
            rises.append(step)
    return real, rises


def test_relative_and_spent_rates():
    rates = LearningRates.planned(get_linear_schedule_with_warmup(optimizer(), 2, 10), 10)
    assert rates.relative[:4].tolist() == [0.0, 0.5, 1.0, 0.875] and rates.relative[-1] == 0
    assert rates.spent[:3].tolist() == pytest.approx([0, 0, 0.1]) and rates.spent[-1] == 1
    nothing = LearningRates([0.0, 0.0])
    assert nothing.relative.tolist() == nothing.spent.tolist() == [0, 0]


def test_restarts_of_a_schedule():
    def cosine(steps):
        return [0.5 + 0.5 * math.cos(math.pi * step / steps) for step in range(steps)]

    def restarts(rates):
        planned = LearningRates(rates, 1.0)
        return [step for step, rate in enumerate(rates) if planned.observe(step, rate)]

    warm = [step / 10 for step in range(10)]
    assert restarts(warm + cosine(40) + cosine(40) + cosine(40)) == [50, 90]
    # Rises more slowly, and only some of the way.
    assert restarts([1.0, 0.5, 0.2, 0.1, 0.15, 0.2, 0.3, 0.2]) == [5]
    for rates in (warm + cosine(40), [1.0] * 20, warm + [1.0] * 9, [1.0, 0.6, 0.9, 0.6], [1.0, 0.01, 0.05, 0.0]):
        assert restarts(rates) == []


SCHEDULES = {
    "warm restarts": (lambda o: torch_schedules.CosineAnnealingWarmRestarts(o, 8), [8, 16, 24]),
    "cosine there and back": (lambda o: torch_schedules.CosineAnnealingLR(o, 6), [8, 20]),
    "one cycle": (lambda o: torch_schedules.OneCycleLR(o, 1e-2, total_steps=STEPS + 1), []),
    "steps": (lambda o: torch_schedules.StepLR(o, 7), []),
    "sequence": (
        lambda o: torch_schedules.SequentialLR(
            o, [torch_schedules.LinearLR(o, 0.1, 1, 4), torch_schedules.CosineAnnealingLR(o, 20)], [4]
        ),
        [],
    ),
    "chain": (
        lambda o: torch_schedules.ChainedScheduler(
            [torch_schedules.ConstantLR(o, 0.1, 4), torch_schedules.ExponentialLR(o, 0.9)]
        ),
        [],
    ),
    "hard restarts": (lambda o: get_cosine_with_hard_restarts_schedule_with_warmup(o, 2, STEPS, 2), [13]),
}


@pytest.mark.filterwarnings("ignore:To get the last learning rate")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_that_are_known_in_advance(name):
    make, rises = SCHEDULES[name]
    scheduler = make(optimizer())
    before = json.dumps(scheduler.state_dict(), default=str)
    rates = LearningRates.planned(scheduler, STEPS)
    assert json.dumps(scheduler.state_dict(), default=str) == before, "the run's own scheduler has not moved"
    planned = rates.relative.clone()
    real, seen = drive(scheduler, rates)
    assert seen == rises
    assert rates.relative.equal(planned), "observing what was planned changes nothing"
    assert planned.tolist() == pytest.approx([rate / max(real) for rate in real], abs=1e-6)


def test_a_schedule_that_waits_for_a_loss():
    scheduler = torch_schedules.ReduceLROnPlateau(optimizer(), factor=0.1, patience=4)
    rates = LearningRates.planned(scheduler, STEPS)
    assert rates.relative.eq(1).all(), "nothing is known"
    real, rises = drive(scheduler, rates)
    assert rates.relative.tolist() == pytest.approx([rate / max(real) for rate in real]) and not rises
    assert rates.spent[-1] > 0.95


def test_rates_that_somebody_sets_by_hand():
    rates = LearningRates.planned(None, 10)
    for step in range(1, 6):
        assert not rates.observe(step, 5e-5)
    assert rates.relative.tolist() == [1.0] * 11
    assert not rates.observe(6, 5e-6) and rates.observe(7, 5e-5)
    assert rates.relative.tolist() == pytest.approx([1.0] * 6 + [0.1] + [1.0] * 4)


def test_a_plan_that_proves_wrong():
    """A loop that steps its scheduler once per epoch."""
    scheduler = get_linear_schedule_with_warmup(optimizer(), 0, 4)
    rates = LearningRates.planned(scheduler, STEPS)
    for step in range(1, STEPS + 1):
        if step % 6 == 0:
            scheduler.optimizer.step(), scheduler.step()
        assert not rates.observe(step, scheduler.optimizer.param_groups[0]["lr"])
    assert rates.relative.tolist() == pytest.approx([1 - 0.25 * (step // 6) for step in range(STEPS + 1)])


def test_skipped_steps_are_no_reason_to_give_up_a_plan():
    scheduler = get_linear_schedule_with_warmup(optimizer(), 4, 200)
    rates = LearningRates.planned(scheduler, 200)
    planned = rates.relative.clone()
    for step in range(1, 201):
        if step not in (20, 50):  # the loss scaler skipped the step
            scheduler.optimizer.step(), scheduler.step()
        rates.observe(step, scheduler.optimizer.param_groups[0]["lr"])
    assert rates.relative.equal(planned)


def resumed(old, new):
    """A run that goes on from a checkpoint of another one."""
    state = old.state_dict()
    plain = json.loads(json.dumps({key: value for key, value in state.items() if key != "rates"}))
    new.load_state_dict(plain | {"rates": state["rates"]})
    return new


@pytest.mark.parametrize("at", [0, 2, 9, 23])
@pytest.mark.parametrize("name", ["warm restarts", "hard restarts", "plateau"])
def test_a_resumed_run_knows_the_same(name, at):
    plateau = lambda o: torch_schedules.ReduceLROnPlateau(o, factor=0.1, patience=4)  # noqa: E731
    make = plateau if name == "plateau" else SCHEDULES[name][0]
    whole = LearningRates.planned(make(optimizer()), STEPS)
    _, rises = drive(make(optimizer()), whole)
    scheduler = make(optimizer())
    first = LearningRates.planned(scheduler, STEPS)
    _, before = drive(scheduler, first, until=at)
    again = resumed(first, LearningRates.planned(scheduler, STEPS))
    _, after = drive(scheduler, again, start=at)
    assert before + after == rises
    assert again.relative.equal(whole.relative) and again.spent.equal(whole.spent)


def test_a_run_that_is_given_more_steps_rises_again():
    for steps, more, at, rises in (
        (10, 30, 10, [11]),
        (10, 30, 7, [8]),
        (10, 30, 2, []),
        (10, 10, 7, []),
        (10, 11, 5, []),
    ):
        first = get_linear_schedule_with_warmup(optimizer(), 2, steps)
        rates = LearningRates.planned(first, steps)
        drive(first, rates, until=at)
        second = get_linear_schedule_with_warmup(optimizer(), 2, more)
        for _ in range(at):
            second.optimizer.step(), second.step()
        again = resumed(rates, LearningRates.planned(second, more))
        assert drive(second, again, start=at, until=more)[1] == rises, (steps, more, at)
        assert again.observe(at, 0.1) is False, "said once"


def test_accelerate_steps_a_schedule_once_per_process(monkeypatch):
    Accelerator(cpu=True)
    plain = get_linear_schedule_with_warmup(optimizer(), 2, 20)
    wrapped = AcceleratedScheduler(plain, [plain.optimizer])
    monkeypatch.setattr(schedule, "AcceleratorState", lambda: SimpleNamespace(num_processes=2))
    rates = LearningRates.planned(wrapped, 10)
    assert rates.relative.tolist() == LearningRates.planned(plain, 20).relative[::2].tolist()
    whole = AcceleratedScheduler(plain, [plain.optimizer], split_batches=True)
    assert LearningRates.planned(whole, 20).relative.equal(LearningRates.planned(plain, 20).relative)
