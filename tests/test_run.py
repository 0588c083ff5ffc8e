"""A run without a Trainer: plain loops and Accelerate train, freeze and resume as the Trainer does."""

import pytest
import torch
from accelerate import Accelerator
from architectures import build
from resuming import undecided_predictor
from torch.utils.data import DataLoader
from training import Rows, assert_left_alone, predictor_that_says, train
from transformers import get_linear_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from smartfrz_hf import Decision, FreezingRun, Policy, SmartFRZCallback, SmartFRZConfig
from smartfrz_hf.checkpoint import load_state, save_state
from smartfrz_hf.policies import AutoFreezePolicy, EgeriaPolicy

STEPS = 20
OPTIONS = {"record_every": 1, "freeze_threshold": 0.5, "first_decision": 5, "decide_every": 2}


class At(Policy):
    """Freezes to given depths at given steps."""

    def __init__(self, depths):
        self.depths = depths

    def decide(self, observation):
        return Decision(max([0, *(d for step, d in self.depths.items() if observation.step >= step)]), "told")


def set_up(accelerator=None, name="bert", steps=STEPS):
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, steps)
    loader = DataLoader(Rows(40), batch_size=4, generator=torch.Generator().manual_seed(0), shuffle=True)
    if accelerator is not None:
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    return model, optimizer, scheduler, loader


def batches(loader):
    while True:
        yield from loader


def loop(model, optimizer, scheduler, loader, run, steps=STEPS, accelerator=None):
    """As people write it, with or without Accelerate."""
    losses = []
    for batch, _ in zip(batches(loader), range(steps), strict=False):
        loss = model(**batch).loss
        accelerator.backward(loss) if accelerator else loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if run is not None:
            run.step()
        losses.append(loss.item())
    return losses


def test_a_plain_loop_freezes_unit_by_unit_and_gives_the_model_back():
    model, optimizer, scheduler, loader = set_up()
    config = SmartFRZConfig(**OPTIONS)
    with FreezingRun(model, optimizer, STEPS, config, lr_scheduler=scheduler, predictor=undecided_predictor()) as run:
        loop(model, optimizer, scheduler, loader, run)
        assert 0 < run.depth == run.ledger.depth and run.steps_done == STEPS
        frozen = {p for unit in run.stack.units[: run.depth] for p in unit.named_parameters().values()}
        assert all(not p.requires_grad and p not in optimizer.state for p in frozen)
    assert len(run.ledger.stages) > 1 and 0 < run.ledger.compute_saved < 1
    assert_left_alone(model)


def test_never_equals_a_loop_without_a_run():
    first = loop(*set_up(), run=None)
    model, optimizer, scheduler, loader = set_up()
    with FreezingRun(model, optimizer, STEPS, SmartFRZConfig(policy="never"), lr_scheduler=scheduler) as run:
        assert loop(model, optimizer, scheduler, loader, run) == first
    assert run.ledger.compute_saved == 0


def test_accelerate_freezes_as_the_plain_loop():
    stages, ends = [], []
    for accelerator in (None, Accelerator(cpu=True)):
        model, optimizer, scheduler, loader = set_up(accelerator)
        with FreezingRun(
            model, optimizer, STEPS, SmartFRZConfig(**OPTIONS), lr_scheduler=scheduler, predictor=undecided_predictor()
        ) as run:
            loop(model, optimizer, scheduler, loader, run, accelerator=accelerator)
        stages.append(run.ledger.stages)
        ends.append(model.state_dict())
    assert stages[0] == stages[1] and len(stages[0]) > 1
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_the_trainer_freezes_at_the_same_steps(tmp_path):
    callback = SmartFRZCallback(policy=At({3: 1, 7: 3}), first_decision=1, decide_every=1)
    train(tmp_path, [callback])
    model, optimizer, scheduler, loader = set_up()
    config = SmartFRZConfig(first_decision=1, decide_every=1)
    with FreezingRun(model, optimizer, STEPS, config, policy=At({3: 1, 7: 3})) as run:
        loop(model, optimizer, scheduler, loader, run)
    assert run.ledger.freeze_steps == callback.ledger.freeze_steps


def test_accumulation_counts_optimizer_steps():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, scheduler, loader = set_up(accelerator)
    with FreezingRun(model, optimizer, 10, SmartFRZConfig(first_decision=1, decide_every=1), policy=At({4: 2})) as run:
        for batch, _ in zip(batches(loader), range(20), strict=False):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            run.step()
    assert run.steps_done == 10 and run.ledger.freeze_steps == {"stem": 4, "bert.encoder.layer.0": 4}


@pytest.mark.parametrize(
    ("stop", "length", "options"),
    [
        *((stop, STEPS, {}) for stop in (4, 9, 14)),
        # With a pilot, and a front that freezes at its end, after four steps.
        *((stop, 60, {"target_saving": 0.4, "freeze_threshold": None}) for stop in (0, 3, 4, 30)),
    ],
)
def test_a_saved_run_goes_on_exactly(tmp_path, stop, length, options):
    predictor = undecided_predictor()

    def go(until, saved=False):
        model, optimizer, scheduler, _ = set_up(steps=length)
        rows, done = Rows(4 * length), 0
        config = SmartFRZConfig(**OPTIONS | {"activation_cache": False} | options)
        if saved:
            other = torch.load(tmp_path / "loop.pt", weights_only=True)
            model.load_state_dict(other["model"])
            optimizer.load_state_dict(other["optimizer"])
            scheduler.load_state_dict(other["scheduler"])
            torch.set_rng_state(other["rng"])
            done = other["done"]
        run = FreezingRun(model, optimizer, length, config, lr_scheduler=scheduler, predictor=predictor)
        with run:
            if saved:
                run.load_state_dict(load_state(tmp_path))
                assert bool(run.ledger.frozen_parameters) == bool(run.depth)
            loader = DataLoader(rows, batch_size=4, sampler=range(4 * done, 4 * length), generator=torch.Generator())
            loop(model, optimizer, scheduler, loader, run, until - done)
            if until < length:
                save_state(run.state_dict(), tmp_path)
                parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save(state | {"rng": torch.get_rng_state(), "done": until}, tmp_path / "loop.pt")
        return model.state_dict(), run.ledger

    whole, ledger = go(length)
    go(stop)
    again, resumed = go(length, saved=True)
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    assert ledger.stages == resumed.stages and ledger.decisions == resumed.decisions and ledger.start == resumed.start
    assert (ledger.start is not None and ledger.stages[0].step == 4) == (length == 60)
    assert ledger.spent.total == pytest.approx(resumed.spent.total, rel=1e-9)


def test_two_runs_on_one_model_are_refused():
    model, optimizer, *_ = set_up()
    with FreezingRun(model, optimizer, STEPS, SmartFRZConfig(policy="static")) as run:
        with pytest.raises(ValueError, match="already freezes this BertForSequenceClassification"):
            FreezingRun(model, optimizer, STEPS)
        assert run.depth == 2
    with FreezingRun(model, optimizer, STEPS, SmartFRZConfig(policy="static")):
        pass
    assert_left_alone(model)


def test_an_exception_gives_the_model_back():
    model, optimizer, scheduler, loader = set_up()
    with (
        pytest.raises(KeyboardInterrupt),
        FreezingRun(model, optimizer, STEPS, SmartFRZConfig(policy="static"), predictor=predictor_that_says(0.5)),
    ):
        raise KeyboardInterrupt
    assert_left_alone(model)


def test_steps_that_the_loop_counts_are_taken_once():
    """Also if it says so for each micro-batch."""
    stages = []
    for calls in (1, 3):
        model, optimizer, scheduler, loader = set_up()
        with FreezingRun(model, optimizer, STEPS, OPTIONS, predictor=undecided_predictor()) as run:
            for step, batch in zip(range(1, STEPS + 1), batches(loader), strict=False):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                for _ in range(calls):
                    run.step(step)
        stages.append((run.ledger.stages, run.ledger.decisions))
    assert stages[0] == stages[1]


def test_a_run_that_fails_to_begin_can_be_tried_again():
    model, optimizer, *_ = set_up()
    with (
        pytest.raises(ValueError, match="at most 5"),
        FreezingRun(model, optimizer, STEPS, {"static_depth": 9}, policy="static"),
    ):
        pass
    with FreezingRun(model, optimizer, STEPS, policy="static") as run:
        assert run.depth == 2
    assert_left_alone(model)


def test_a_closed_run_freezes_nothing():
    model, optimizer, *_ = set_up()
    run = FreezingRun(model, optimizer, STEPS, policy="static")
    run.close()
    with pytest.raises(ValueError, match="closed"):
        run.step(1)
    assert_left_alone(model)


def test_wrong_arguments_are_told(caplog):
    model, optimizer, *_ = set_up()
    for total_steps in (None, 0, 2.5, "10"):
        with pytest.raises((ValueError, TypeError), match="`total_steps`"):
            FreezingRun(model, optimizer, total_steps, policy="never")
    wrong = {"steps_per_epoch": (0, -1, "8"), "batches_per_step": (0, 1.5, None), "timeout": (-1, float("nan"))}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"`{name}` is {value!r}; it must be a .*number above 0"):
                FreezingRun(model, optimizer, 10, policy="never", **{name: value})
    with pytest.raises(TypeError, match="must be a `torch.nn.Module`"):
        FreezingRun(optimizer, model, STEPS)
    with pytest.raises(TypeError, match="did you mean `freeze_threshold`"):
        SmartFRZCallback(freeze_treshold=0.5)
    with pytest.raises(TypeError, match="must be a `SmartFRZConfig`"):
        SmartFRZCallback("conservative")
    with pytest.raises(TypeError, match="instance of a subclass of `Policy`"):
        SmartFRZCallback(policy=At)
    with (
        pytest.raises(ValueError, match="no saved SmartFRZ state"),
        FreezingRun(model, optimizer, STEPS, policy="never") as run,
    ):
        run.load_state_dict(None)
    assert_left_alone(model)


def test_an_optimizer_of_another_model_is_told(caplog):
    transformers_logging.enable_propagation()
    try:
        FreezingRun(build("bert"), set_up()[1], STEPS, policy="never").close()
        assert "The optimizer holds no parameter of this BertForSequenceClassification" in caplog.text
    finally:
        transformers_logging.disable_propagation()


def test_a_scheduler_that_is_none_is_refused():
    model, optimizer, *_ = set_up()
    with pytest.raises(TypeError, match="`lr_scheduler` is 3; it must be a `torch.optim.lr_scheduler.LRScheduler`"):
        FreezingRun(model, optimizer, STEPS, policy="never", lr_scheduler=3)
    assert_left_alone(model)


def test_answers_of_a_policy_are_checked():
    class Wrong(Policy):
        def decide(self, observation):
            return 3

    model, optimizer, *_ = set_up()
    with (
        pytest.raises(TypeError, match="it must give a `Decision`"),
        FreezingRun(model, optimizer, STEPS, policy=Wrong()),
    ):
        pass
    assert_left_alone(model)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_probe_takes_a_hundredth_of_the_time_whatever_a_row_is(rows):
    """A packed batch is one long row."""
    model, optimizer, scheduler, _ = set_up(steps=200)
    with FreezingRun(model, optimizer, 200, SmartFRZConfig(max_depth=0), lr_scheduler=scheduler) as run:
        loop(model, optimizer, scheduler, DataLoader(Rows(40), batch_size=rows), run, 200)
        assert run.observer.probe.probe.ready == (rows == 4)
    assert 1 <= run.ledger.spent.total / run.ledger.full.total < 1.011


def test_a_run_that_cannot_be_made_leaves_nothing_on_the_model(monkeypatch):
    model = build("bert")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    monkeypatch.setattr("smartfrz_hf.front.make_cache", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        FreezingRun(model, optimizer, 10)
    monkeypatch.undo()
    monkeypatch.setattr("smartfrz_hf.run.StageRunner", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        FreezingRun(model, optimizer, 10)
    monkeypatch.undo()
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    with FreezingRun(model, optimizer, 10):
        pass


def test_a_policy_that_is_passed_is_named(tmp_path):
    """Else a state of one rule would be loaded into another one, and trackers and the report would name the predictor."""
    model = build("bert")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with FreezingRun(model, optimizer, 10, policy=EgeriaPolicy()) as run:
        save_state(run.state_dict(), tmp_path)
    assert run.configuration["policy"] == "EgeriaPolicy"
    with (
        FreezingRun(model, optimizer, 10, policy=AutoFreezePolicy()) as run,
        pytest.raises(ValueError, match="`policy` was 'EgeriaPolicy' and is 'AutoFreezePolicy' now"),
    ):
        run.load_state_dict(load_state(tmp_path))
