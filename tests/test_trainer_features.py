"""What else a Trainer can do: it ends early, starts again with a smaller batch, searches hyper-parameters, trains twice."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from architectures import build
from training import Rows, arguments, assert_left_alone, assert_same_run, predictor_that_says, train
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from smartfrz_hf import SmartFRZCallback, SmartFRZConfig, SmartFRZTrainer
from smartfrz_hf.checkpoint import STATE_FILE

EITHER = pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback alone"])


def make(folder, alone, config=None, callbacks=(), model=None, probability=0.9, model_init=None, **changes):
    """A trainer that has not trained, and its callback."""
    config = SmartFRZConfig(**{"first_decision": 5, "decide_every": 5, "record_every": 1} | (config or {}))
    settings = {
        "args": arguments(folder, logging_steps=1, **changes),
        "train_dataset": Rows(40),
        "eval_dataset": Rows(8),
        "model_init": model_init,
    }
    if model_init is None:
        settings["model"] = model or build("bert")
    if alone:
        callback = SmartFRZCallback(config, predictor_that_says(probability))
        return Trainer(**settings, callbacks=[*callbacks, callback]), callback
    trainer = SmartFRZTrainer(
        **settings, callbacks=list(callbacks), smartfrz=config, predictor=predictor_that_says(probability)
    )
    return trainer, trainer.smartfrz


@EITHER
@pytest.mark.slow
def test_early_stopping(tmp_path, alone):
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    changes = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.3, "warmup_steps": 12} | best
    stopping = [EarlyStoppingCallback(early_stopping_patience=2)]
    config = {"policy": "linear", "linear_depth": 1.0, "decide_every": 1, "first_decision": 1}
    whole, callback = make(tmp_path / "whole", alone, config, **changes)
    whole.train()
    stopped, early = make(tmp_path / "early", alone, config, stopping, **changes)
    stopped.train()
    end = stopped.state.global_step
    assert early.ledger.depth > 0 and stopped.state.best_global_step == end - 2 < 18
    assert early.ledger.stages == [stage for stage in callback.ledger.stages if stage.step <= end]
    assert_left_alone(stopped.model)
    assert stopped.evaluate()["eval_loss"] == stopped.state.best_metric
    again, _ = make(tmp_path / "early", alone, config, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "early" / f"checkpoint-{end}"))
    assert_same_run(whole, again)


def test_the_best_checkpoint_in_a_used_folder_has_its_own_state(tmp_path):
    """With `save_strategy="best"` a callback hears of a checkpoint only after it was written."""
    changes = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "best", "metric_for_best_model": "loss"}
    for depth in (1, 2):
        trainer, callback = make(tmp_path, True, {"policy": "static", "static_depth": depth}, **changes)
        trainer.train()
        best = max(tmp_path.glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime)
        assert json.loads((best / STATE_FILE).read_text())["state"]["depth"] == depth


class OutOfMemory(TrainerCallback):
    """Once, in the middle of the backward pass that follows a step, there is not enough memory."""

    def __init__(self, step):
        self.step, self.begins = step, []

    def on_train_begin(self, args, state, control, train_dataloader=None, model=None, **kwargs):
        self.begins.append((train_dataloader.total_batch_size, all(p.requires_grad for p in model.parameters())))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step and len(self.begins) == 1:
            self.hook = model.classifier.register_full_backward_pre_hook(self.fail)

    def fail(self, *_):
        self.hook.remove()
        raise RuntimeError("CUDA out of memory.")


@EITHER
@pytest.mark.parametrize("step", [0, 5, 7])
@pytest.mark.slow
def test_a_smaller_batch_starts_anew(tmp_path, alone, step):
    """The memory ends in the first step, while a pass is counted that follows a freezing stage, and later."""
    memory = OutOfMemory(step)
    trainer, callback = make(tmp_path, alone, {"max_depth": 3}, [memory], auto_find_batch_size=True)
    trainer.train()
    assert memory.begins == [(4, True), (3, bool(not alone or step < 5))]
    assert [(stage.step, stage.depth) for stage in callback.ledger.stages] == [(5, 3)]
    assert trainer.state.global_step == 20 and 0 < callback.ledger.compute_saved < 1
    assert_left_alone(trainer.model)


@EITHER
@pytest.mark.slow
def test_a_smaller_batch_changes_nothing_where_nothing_freezes(tmp_path, alone):
    plain = train(tmp_path, [OutOfMemory(7)], dataset=Rows(40), logging_steps=1, auto_find_batch_size=True)
    trainer, _ = make(tmp_path, alone, callbacks=[OutOfMemory(7)], probability=0.1, auto_find_batch_size=True)
    trainer.train()
    assert_same_run(plain, trainer)


def test_ddp_must_not_forget_what_had_frozen(tmp_path, monkeypatch):
    """The callback alone cannot tell the new DDP of what the old run had frozen."""
    trainer, callback = make(tmp_path, True, callbacks=[OutOfMemory(7)])
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    trainer.args.auto_find_batch_size = True
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self: 2))
    with pytest.raises(RuntimeError, match="Use `SmartFRZTrainer`"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_a_run_that_breaks_off_leaves_nothing_frozen(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt

    trainer, callback = make(tmp_path, False, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert callback.ledger.depth == 5
    assert_left_alone(trainer.model)


@EITHER
@pytest.mark.slow
def test_training_twice(tmp_path, alone):
    """The second run has nothing frozen from the first; resumed, it is the first one again."""
    first, callback = make(tmp_path, alone, {"max_depth": 3}, save_strategy="steps", save_steps=4)
    first.train()
    stages = callback.ledger.stages
    whole = {key: value.clone() for key, value in first.model.state_dict().items()}
    assert_left_alone(first.model)
    first.train()
    assert callback.ledger.stages == stages and callback.ledger.depth == 3
    assert not torch.equal(whole["classifier.weight"], first.model.classifier.weight)
    assert_left_alone(first.model)
    again, other = make(tmp_path / "again", alone, {"max_depth": 3}, save_strategy="steps", save_steps=4)
    again.train()
    for step in (4, 8):
        again.train(resume_from_checkpoint=str(tmp_path / "again" / f"checkpoint-{step}"))
        assert other.ledger.stages == stages
        for key, value in again.model.state_dict().items():
            assert torch.equal(value, whole[key]), key
    assert_left_alone(again.model)


@pytest.mark.slow
def test_training_twice_with_nothing_frozen_equals_the_plain_trainer(tmp_path):
    plain = train(tmp_path, dataset=Rows(40), logging_steps=1)
    plain.train()
    trainer, _ = make(tmp_path, False, probability=0.1)
    trainer.train()
    trainer.train()
    assert_same_run(plain, trainer)


@EITHER
def test_no_steps(tmp_path, alone):
    """As the plain Trainer, which evaluates with `num_train_epochs=0`; nothing of an earlier run is told again."""
    trainer, callback = make(tmp_path, alone, {"policy": "static"})
    trainer.train()
    weights = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
    trainer.train()
    assert trainer.state.global_step == 0 and not callback.ledger.stages and callback.run is None
    assert all(torch.equal(value, weights[key]) for key, value in trainer.model.state_dict().items())
    assert_left_alone(trainer.model)


class Optuna(ModuleType):
    """As much of Optuna as the Trainer calls: it tries three numbers of epochs, and breaks the second trial off."""

    def __init__(self):
        super().__init__("optuna")
        self.__spec__ = ModuleSpec("optuna", None)
        self.trial = SimpleNamespace(FixedTrial=None, BaseTrial=self.Trial)

    class TrialPruned(Exception):
        pass

    class Trial:
        def __init__(self, number):
            self.number, self.params = number, {}
            self.study = SimpleNamespace(_is_multi_objective=lambda: False)

        def report(self, value, step):
            self.value = value

        def should_prune(self):
            return self.number == 1

    def create_study(self, **kwargs):
        study = SimpleNamespace(trials=[], _is_multi_objective=lambda: False)

        def optimize(objective, n_trials, catch, **kwargs):
            for number in range(n_trials):
                trial = self.Trial(number)
                try:
                    trial.value = objective(trial)
                    study.trials.append(trial)
                except self.TrialPruned:
                    pass
            study.best_trial = min(study.trials, key=lambda trial: trial.value)

        study.optimize = optimize
        return study


@EITHER
@pytest.mark.slow
def test_hyperparameter_search(tmp_path, alone, monkeypatch):
    """Each trial starts with a new model and nothing frozen, is like a run by itself, and leaves nothing behind."""
    monkeypatch.setitem(sys.modules, "optuna", Optuna())
    lengths, models, ledgers = [12, 16, 20], [], []

    class Noting(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            models.append(model)

        def on_train_end(self, args, state, control, **kwargs):
            ledgers.append(callback.ledger)

    changes = {"eval_strategy": "steps", "eval_steps": 8, "save_strategy": "steps", "save_steps": 8}
    changes |= {"load_best_model_at_end": True}
    trainer, callback = make(
        tmp_path, alone, {"max_depth": 3}, [Noting()], model_init=lambda: build("bert"), **changes
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: trial.params.setdefault("max_steps", lengths[trial.number]) and dict(trial.params),
        n_trials=3,
        backend="optuna",
    )
    assert best.run_id in ("0", "2") and len(models) == 3
    assert [ledger.max_steps for ledger in ledgers] == lengths
    assert all([(s.step, s.depth) for s in ledger.stages] == [(5, 3)] for ledger in ledgers)
    for model in models:
        assert_left_alone(model)
    saved = list(tmp_path.rglob(STATE_FILE))
    assert not saved if alone else {path.parts[-3] for path in saved} == {"run-0", "run-2"}
    by_itself, other = make(tmp_path / "itself", alone, {"max_depth": 3}, model_init=lambda: build("bert"), **changes)
    by_itself.args.max_steps = 20
    by_itself.train()
    assert other.ledger.stages == ledgers[2].stages
    for key, value in by_itself.model.state_dict().items():
        assert torch.equal(value, models[2].state_dict()[key]), key
