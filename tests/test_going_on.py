"""What one run leaves to the next: states saved at odd moments, policies used twice, steps that fail or are skipped."""

import copy
import sys

import pytest
import torch
from architectures import build
from resuming import STAGES
from resuming import run as train_with_checkpoints
from torch.utils.data import DataLoader
from training import Rows, train
from transformers import TrainerCallback, TrainingArguments, get_linear_schedule_with_warmup

from smartfrz_hf import Decision, FreezingRun, Policy, SmartFRZCallback, SmartFRZConfig, SmartFRZTrainer
from smartfrz_hf.checkpoint import STATE_FILE, load_state, save_state
from smartfrz_hf.policies import AutoFreezePolicy, EgeriaPolicy, FreezeOutPolicy, GradESPolicy, SelfCKAPolicy

STEPS = 60
FROM_THE_START = {"target_saving": 0.4, "activation_cache": False}


def stages(ledger):
    return [(stage.step, stage.depth) for stage in ledger.stages]


def batch():
    return next(iter(DataLoader(Rows(8), batch_size=8)))


def step(model, optimizer, run, scheduler=None):
    model(**batch()).loss.backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step()
    optimizer.zero_grad()
    run.step()


class HeadFirst(Policy):
    """Trains the head alone, then all units."""

    def decide(self, observation):
        if observation.step < 20:
            return Decision(observation.units, "head first")
        return Decision(0, "all train", unfreeze=observation.depth > 0)


@pytest.mark.parametrize(
    ("policy", "config", "stop"),
    [
        (None, FROM_THE_START, 2),  # in the pilot
        (None, FROM_THE_START, 25),
        (HeadFirst, {}, 30),
        (AutoFreezePolicy, {}, 11),
    ],
)
def test_a_loop_goes_on_from_one_state_as_often_as_you_like(tmp_path, policy, config, stop):
    """Its learning rate was lowered by hand, it has no scheduler, and the state stays in memory."""

    def go(saved=None):
        model = build("bert")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        first = 0 if saved is None else stop
        if saved is not None:
            model.load_state_dict(saved[1])
            optimizer.load_state_dict(copy.deepcopy(saved[2]))
        options = SmartFRZConfig(**{"activation_cache": False} | config)
        with FreezingRun(model, optimizer, STEPS, options, policy=policy and policy()) as run:
            if saved is not None:
                run.load_state_dict(saved[0])
            for number in range(first, STEPS):
                if number == stop and saved is None:
                    saved = run.state_dict(), *copy.deepcopy([model.state_dict(), optimizer.state_dict()])
                    save_state(saved[0], tmp_path / "then")
                if number == 15:
                    optimizer.param_groups[0]["lr"] *= 0.1
                torch.manual_seed(number)
                step(model, optimizer, run)
        return saved, model.state_dict(), run.ledger

    saved, whole, ledger = go()
    for _ in range(2):
        _, weights, resumed = go(saved)
        assert stages(resumed) == stages(ledger) != []
        assert all(torch.equal(value, weights[key]) for key, value in whole.items())
    save_state(saved[0], tmp_path / "now")
    then, now = ((tmp_path / folder / STATE_FILE).read_text() for folder in ("then", "now"))
    assert then == now, "it has changed with the run"  # the file has a digest of all tensors


@pytest.mark.parametrize(
    "policy",
    [
        EgeriaPolicy(window=2, tolerance=0.9),
        AutoFreezePolicy(),
        GradESPolicy(tau=0.02, alpha=0.2),
        SelfCKAPolicy(tolerance=0.001),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_a_policy_serves_one_run_after_the_other(policy):
    found, fresh = [], policy.state_dict()
    for _ in range(2):
        model = build("bert")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = get_linear_schedule_with_warmup(optimizer, 2, STEPS)
        with FreezingRun(model, optimizer, STEPS, lr_scheduler=scheduler, policy=policy) as run:
            assert policy.state_dict() == fresh
            for number in range(STEPS):
                torch.manual_seed(number)
                step(model, optimizer, run, scheduler)
        found.append(run.ledger)
    assert stages(found[0]) == stages(found[1]) and found[0].decisions == found[1].decisions


def test_a_closed_run_has_the_state_that_it_was_closed_with():
    model = build("bert")
    with FreezingRun(model, torch.optim.AdamW(model.parameters()), STEPS, policy="static") as run:
        before = run.state_dict()
    assert run.depth == 0 and run.state_dict()["depth"] == 2
    assert run.state_dict()["ledger"]["stages"] == before["ledger"]["stages"]


def test_a_probe_that_fails_leaves_the_pilot_alone():
    model = build("bert")
    forward = model.forward

    def only_in_training(*args, **kwargs):
        if not model.training:
            raise RuntimeError("no evaluation")
        return forward(*args, **kwargs)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = SmartFRZConfig(**FROM_THE_START)
    with FreezingRun(model, optimizer, 400, config, inputs=lambda: {k: v[:2] for k, v in batch().items()}) as run:
        model.forward = only_in_training
        for _ in range(12):
            step(model, optimizer, run)
        assert run.observer.probe is None and run.ledger.start is not None and run.depth > 0


@pytest.mark.parametrize("policy", [lambda: GradESPolicy(tau=0.2), AutoFreezePolicy], ids=["grades", "autofreeze"])
def test_steps_that_a_loss_scaler_skips_do_no_harm(policy):
    """It calls the step of a fused optimizer also then."""
    found = []
    for fused in (False, True):
        model = build("bert")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        scheduler = get_linear_schedule_with_warmup(optimizer, 3, STEPS)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
        config = SmartFRZConfig(activation_cache=False)
        with FreezingRun(model, optimizer, STEPS, config, lr_scheduler=scheduler, policy=policy()) as run:
            for number in range(1, STEPS + 1):
                torch.manual_seed(number)
                scaler.scale(model(**batch()).loss).backward()
                if number in (5, 36):
                    model.classifier.weight.grad.fill_(float("inf"))
                    model.bert.encoder.layer[3].output.dense.weight.grad.fill_(float("inf"))
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scheduler.step()
                run.step(number)
        found.append((stages(run.ledger), run.ledger.full.optimizer))
    assert found[0][0] == found[1][0] != [] and found[0][1] == pytest.approx(found[1][1])


def test_a_step_that_fails_leaves_the_groups_of_the_optimizer_whole(monkeypatch):
    model = build("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with FreezingRun(model, optimizer, STEPS, policy=FreezeOutPolicy()) as run:
        for retried in (True, False):
            with monkeypatch.context() as patched:
                patched.setattr(sys.modules["torch.optim.sgd"], "sgd", lambda *_, **__: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    step(model, optimizer, run)
            if retried:
                step(model, optimizer, run)
                assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["lr"] == 0.1
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["lr"] == 0.1


def test_the_callback_resumes_from_the_folder_that_it_was_given(tmp_path):
    for name, depth in (("mine", 3), ("other", 1)):
        config = {"static_depth": depth, "record_every": 0.005}
        train_with_checkpoints(tmp_path / name, alone=True, config=config, policy="static", max_steps=6)
    for folder in ("other", "empty"):
        callback = SmartFRZCallback(policy="static", static_depth=3, **STAGES)
        train(tmp_path / folder, [callback], resume=str(tmp_path / "mine" / "checkpoint-6"), max_steps=8)
        assert callback.ledger.stages[0].depth == 3 and callback.ledger.depth == 3


class Saves(TrainerCallback):
    """Saves a checkpoint itself, as a callback in front of ours may, or stops training."""

    def __init__(self, at, fails=False):
        self.at, self.fails, self.trainer = at, fails, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.at and not self.fails:
            self.trainer._save_checkpoint(model, trial=None)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at and self.fails:
            raise KeyboardInterrupt


@pytest.mark.parametrize("fails", [False, True])
def test_a_checkpoint_that_others_save_holds_the_state(tmp_path, fails):
    saves = Saves(4, fails)
    trainer = SmartFRZTrainer(
        build("bert"),
        TrainingArguments(str(tmp_path), max_steps=6, use_cpu=True, save_strategy="no", report_to="none"),
        train_dataset=Rows(),
        callbacks=[saves],
        policy="static",
    )
    saves.trainer = trainer
    if fails:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer._save_checkpoint(trainer.model, trial=None)
    else:
        trainer.train()
    state = load_state(tmp_path / "checkpoint-4")
    assert state["step"] == 4 and state["depth"] == 2


def test_checkpoints_that_a_callback_does_not_see_are_refused(tmp_path):
    if "enable_jit_checkpoint" not in TrainingArguments.__dataclass_fields__:
        pytest.skip("not in this version of Transformers")
    with pytest.raises(ValueError, match="enable_jit_checkpoint"):
        train(tmp_path, [SmartFRZCallback(policy="static")], enable_jit_checkpoint=True)
