"""`estimate`: what it leaves behind, what it measures, and what it answers."""

import copy
import random
import sys

import numpy as np
import pytest
import torch
from architectures import build
from torch.utils.data import IterableDataset
from training import Rows, arguments, assert_left_alone, assert_same_run, predictor_that_loses, predictor_that_says
from transformers import Trainer, get_linear_schedule_with_warmup

from smartfrz_hf import Decision, SmartFRZCallback, SmartFRZTrainer, estimate
from smartfrz_hf.estimation.text import readable
from smartfrz_hf.policies import SmartFRZPolicy
from smartfrz_hf.signals import pilot
from smartfrz_hf.signals.pilot_signals import PilotSignals

UNITS = 5
HIDDEN = 32  # of the tiny BERT


def trainer_of(folder, model=None, rows=64, trainer_class=Trainer, **options):
    kwargs = {name: options.pop(name) for name in ("callbacks", "optimizers", "smartfrz") if name in options}
    settings = {"max_steps": -1, "num_train_epochs": 4, "save_strategy": "no"} | options
    dataset = Rows(rows) if isinstance(rows, int) else rows
    model = build("bert") if model is None else model
    return trainer_class(model, arguments(folder, **settings), train_dataset=dataset, **kwargs)


@pytest.fixture
def pretrained(monkeypatch):
    """As in a pretrained model: all units contribute the same, the loss falls, and no block is as it was initialized."""
    monkeypatch.setattr(pilot, "is_fresh", lambda block: False)
    monkeypatch.setattr(PilotSignals, "agreement", 0.1)
    monkeypatch.setattr(PilotSignals, "contributions", torch.ones(UNITS))


def everything(trainer):
    """All that `estimate` may touch, in values that can be compared."""
    optimizer = trainer.optimizer
    return {
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "gradients": {name: p.grad for name, p in trainer.model.named_parameters()},
        "flags": [(p.requires_grad, p._version is None) for p in trainer.model.parameters()],
        "modes": [module.training for module in trainer.model.modules()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
        "optimizer": None if optimizer is None else copy.deepcopy(optimizer.state_dict()),
        "schedule": None if trainer.lr_scheduler is None else copy.deepcopy(trainer.lr_scheduler.state_dict()),
        "attributes": sorted(vars(trainer)),
        "prepared": len(trainer.accelerator._dataloaders) + len(trainer.accelerator._optimizers),
        "state": copy.deepcopy(vars(trainer.state)),
    }


def assert_equal(before, after):
    if isinstance(before, torch.Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_equal(before[key], after[key])
    elif isinstance(before, list | tuple):
        assert len(before) == len(after)
        for one, other in zip(before, after, strict=True):
            assert_equal(one, other)
    else:
        assert before == after or before is after


def test_a_model_is_no_trainer():
    with pytest.raises(TypeError, match="`trainer` is a BertForSequenceClassification"):
        estimate(build("bert"))


def test_everything_is_put_back(tmp_path):
    model = build("bert")
    model.bert.embeddings.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    model.bert.encoder.layer[1].eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.step()  # so that it has a state
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 64)
    trainer = trainer_of(tmp_path, model, optimizers=(optimizer, schedule), gradient_accumulation_steps=2)
    before = everything(trainer)
    estimate(trainer, seconds=0.5)
    assert_equal(before, everything(trainer))
    assert trainer.optimizer is optimizer and trainer.lr_scheduler is schedule and trainer.model is model
    model.bert.embeddings.requires_grad_(True)
    assert_left_alone(model)


def test_put_back_after_an_error(tmp_path):
    class Broken(Trainer):
        steps = 0

        def compute_loss(self, *args, **kwargs):
            self.steps += 1
            if self.steps > 6:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    trainer = trainer_of(tmp_path, trainer_class=Broken)
    before = everything(trainer)
    with pytest.raises(KeyboardInterrupt):
        estimate(trainer, seconds=0.5)
    assert_equal(before, everything(trainer))
    assert_left_alone(trainer.model)


@pytest.mark.parametrize("trainer_class", [Trainer, SmartFRZTrainer])
def test_training_is_the_same_afterwards(tmp_path, trainer_class):
    runs = []
    for estimated in (False, True):
        model = build("bert")
        trainer = trainer_of(tmp_path, model, rows=16, trainer_class=trainer_class, logging_steps=1)
        if estimated:
            estimate(trainer, seconds=0.5)
        trainer.train()
        runs.append(trainer)
    assert_same_run(*runs)


def test_what_is_measured(tmp_path):
    trainer = trainer_of(tmp_path)
    result = estimate(trainer, seconds=20)
    plain, *frozen = result.depths
    assert [at.depth for at in result.depths] == result.measured == list(range(UNITS + 1))
    assert result.profile.total_steps == 64 and result.profile.steps_per_epoch == 16
    saved = [at.compute_saved for at in result.depths]
    memory = [at.memory for at in result.depths]
    assert saved == sorted(saved) and saved[0] == 0 and saved[-1] > 0.4
    assert memory == sorted(memory, reverse=True)
    weights = sum(p.nbytes for p in trainer.model.parameters())
    assert plain.memory > 4 * weights and weights < frozen[-1].memory < 1.5 * weights
    assert [at.cached_step_seconds is None for at in result.depths] == [True, True, *[False] * (UNITS - 1)]
    tokens = sum(int(row["attention_mask"].sum()) for row in trainer.train_dataset)
    for at in frozen[1:]:
        assert at.cache_bytes == pytest.approx(tokens * HIDDEN * 4, rel=0.2)
        assert at.cached_seconds <= at.seconds <= plain.seconds
    assert result.profile.cache_off is None and result.profile.seconds < 60


def test_a_pretrained_model(tmp_path, pretrained):
    result = estimate(trainer_of(tmp_path), predictor=predictor_that_loses(0.4), seconds=5)
    depths = {point.name: point.depth for point in result.points}
    assert depths == {"conservative": 1, "balanced": 3, "aggressive": 5}
    assert result.chosen.name == "balanced" and result.chosen.points_lost == pytest.approx(0.24)
    assert result.chosen.rate_factor == pytest.approx(5 / 2)
    assert result.chosen.compute_saved == pytest.approx(result.depths[3].compute_saved)
    assert {0, 1, 3, 5} <= set(result.measured)
    # Four of the five units, the stem and five sixths of the blocks, at three quarters of the 64 steps.
    less = 16 * max(0.0, result.depths[3].step_seconds - result.depths[4].step_seconds) / result.depths[0].seconds
    assert result.chosen.later_saved == pytest.approx(result.chosen.time_saved + less)
    assert ("More usually freezes in the last third" in result.verdict) == (result.pays and less > 0)
    deepest = result.points[-1]
    assert deepest.later_saved == deepest.time_saved, "nothing is left to freeze"
    text = str(result)
    assert (
        "balanced <" in text
        and ("Yes: `balanced` freezes 3 of 5 units after the first 4 steps" in text) == result.pays
    )
    assert result.to_dict()["chosen"] == "balanced"


def test_the_options_of_the_callback_count(tmp_path, pretrained):
    options = {"operating_point": "aggressive", "max_depth": 2, "compensate_rate": False}
    callback = SmartFRZCallback(predictor=predictor_that_loses(0.4), **options)
    chosen = estimate(trainer_of(tmp_path, callbacks=[callback]), seconds=1).chosen
    assert (chosen.name, chosen.depth, chosen.rate_factor) == ("aggressive", 2, 1.0)
    assert chosen.later_saved == chosen.time_saved, "the later threshold is low only where the rate has risen"


@pytest.mark.parametrize("options", [{"freeze_threshold": 0.9}, {"order": "independent"}])
def test_nothing_is_promised_for_later_where_the_threshold_stays(tmp_path, pretrained, options):
    callback = SmartFRZCallback(predictor=predictor_that_loses(0.4), **options)
    chosen = estimate(trainer_of(tmp_path, callbacks=[callback]), seconds=1).chosen
    assert chosen.rate_factor > 1.25 and chosen.later_saved == chosen.time_saved


def test_a_long_step_is_measured_on_fewer_rows(tmp_path, monkeypatch):
    whole = estimate(trainer_of(tmp_path), seconds=0.5)
    monkeypatch.setattr(sys.modules["smartfrz_hf.estimation.profile"], "LONG_STEP", 1e-9)
    rows = []
    compute_loss = Trainer.compute_loss

    def count(self, model, inputs, *args, **kwargs):
        rows.append(len(inputs["input_ids"]))
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", count)
    part = estimate(trainer_of(tmp_path), seconds=0.5)
    assert rows[-1] == 1 < rows[0], "the pilot sees whole batches"
    assert part.depths[0].memory == pytest.approx(whole.depths[0].memory, rel=0.2)


def test_sizes_are_short_and_plain():
    sizes = (0, 999, 1000, 999_600, 2.5e9, 999.6e9, 1.5e12)
    assert [*map(readable, sizes)] == ["0 B", "999 B", "1 KB", "1 MB", "2.5 GB", "1 TB", "1.5 TB"]


def test_a_cache_folder_that_cannot_be_used_costs_its_room_only(tmp_path):
    """As in a run."""
    options = {"cache_memory": 1000.0, "cache_disk": 0.5, "cache_folder": "/nope"}
    assert estimate(trainer_of(tmp_path), options, seconds=0.5).cache_room == 1000


def test_a_saving_that_is_asked_for(tmp_path):
    result = estimate(trainer_of(tmp_path), {"target_saving": 0.3}, predictor_that_says(0.1), seconds=1)
    assert [point.name for point in result.points] == ["30%"] and result.chosen.compute_saved >= 0.3


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({}, "No: the model's blocks are as a library initializes them."),
        ({"num_train_epochs": 2}, "No: the run has only 32 optimizer steps."),
        ({"learning_rate": 0.0}, "No: no weight moves in the pilot, the first 4 steps."),
    ],
)
def test_a_plain_no(tmp_path, changes, answer, monkeypatch):
    if "learning_rate" in changes:
        monkeypatch.setattr(pilot, "is_fresh", lambda block: False)
    result = estimate(trainer_of(tmp_path, **changes), seconds=0.5)
    assert not result.pays and result.verdict.startswith(answer)


def test_losses_that_are_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(pilot, "is_fresh", lambda block: False)
    trainer = trainer_of(tmp_path)
    trainer.model.classifier.register_forward_hook(lambda module, args, output: output * float("nan"))
    result = estimate(trainer, seconds=0.5)
    answer = "No: the weights or gradients are not finite in the pilot, the first 4 steps."
    assert not result.pays and result.verdict.startswith(answer) and "nan" not in str(result)


def test_no_where_the_predictor_freezes_nothing(tmp_path, pretrained):
    result = estimate(trainer_of(tmp_path), predictor=predictor_that_loses(50.0), seconds=0.5)
    assert not result.pays and "`balanced` freezes nothing from the start" in result.verdict
    assert "the stem alone is predicted to cost 10.0 points" in result.verdict
    result = estimate(trainer_of(tmp_path), {"start_stage": False}, seconds=0.5)
    assert not result.pays and "decides nothing from the start" in result.verdict


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # said by peft
def test_lora(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(PilotSignals, "agreement", 0.1)
    monkeypatch.setattr(pilot, "is_fresh", lambda block: False)
    model = peft.get_peft_model(build("bert"), peft.LoraConfig(r=1, target_modules=["query"], task_type="SEQ_CLS"))
    result = estimate(trainer_of(tmp_path, model), predictor=predictor_that_loses(50.0), seconds=0.5)
    assert result.profile.trainable < 0.05 * result.profile.parameters
    assert "of the parameters train, as with LoRA" in result.verdict


def test_one_epoch_gains_nothing_from_the_cache(tmp_path):
    result = estimate(trainer_of(tmp_path, rows=256, num_train_epochs=1), seconds=1)
    assert all(at.cached_seconds == at.seconds for at in result.depths)


def test_without_a_cache(tmp_path):
    result = estimate(trainer_of(tmp_path), {"activation_cache": False}, seconds=1)
    assert all(at.cached_step_seconds is None and not at.cache_bytes for at in result.depths)
    assert "The activation cache was not measured" in str(result)


def test_more_rows_than_the_trainer_has(tmp_path):
    result = estimate(trainer_of(tmp_path), rows=640, seconds=0.5)
    assert result.profile.total_steps == 640 and result.profile.rows == 640


def test_activation_checkpointing_is_measured_and_turned_off_again(tmp_path):
    plain = estimate(trainer_of(tmp_path), seconds=0.5)
    trainer = trainer_of(tmp_path, activation_checkpointing=True)
    assert estimate(trainer, seconds=0.5).depths[0].memory < plain.depths[0].memory
    assert not any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    assert_left_alone(trainer.model)


def test_mixed_precision(tmp_path):
    full, half = (estimate(trainer_of(tmp_path, bf16=bf16), seconds=0.5) for bf16 in (False, True))
    assert half.depths[0].memory < full.depths[0].memory


def test_refusals(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from Rows(8).rows

    trainer = trainer_of(tmp_path, rows=Stream(), max_steps=4)
    assert estimate(trainer, seconds=0.5).profile.total_steps == 4
    for name, values in {"rows": (0, -5, 1.5), "seconds": (0, float("nan"), float("inf"))}.items():
        for wrong in values:
            with pytest.raises(ValueError, match=f"`{name}` is {wrong!r}; it must be a "):
                estimate(trainer, **{name: wrong})
    trainer.args.max_steps = -1
    with pytest.raises(ValueError, match="A Stream has no length"):
        estimate(trainer)
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="no `train_dataset`"):
        estimate(trainer)


def test_the_decision_is_that_of_the_run(tmp_path, pretrained):
    """What is told to freeze does freeze."""
    predictor = predictor_that_loses(0.4)
    callback = SmartFRZCallback(predictor=predictor)
    trainer = trainer_of(tmp_path, callbacks=[callback])
    told = estimate(trainer, seconds=0.5).chosen
    trainer.train()
    (stage,) = callback.ledger.stages
    assert (stage.step, stage.depth, stage.reason.partition(";")[0]) == (4, told.depth, told.reason)


def test_the_pilot_is_that_of_the_run(tmp_path, monkeypatch):
    """The same rows, dropout and learning rates give the same signals, to the last bit."""
    seen = []
    decide = SmartFRZPolicy.start

    def note(policy, observation, signals):
        seen.append(signals)
        return decide(policy, observation, signals)

    monkeypatch.setattr(SmartFRZPolicy, "start", note)
    model = build("bert")
    for dropout in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        dropout.p = 0.1
    trainer = trainer_of(tmp_path, model, rows=200, callbacks=[SmartFRZCallback()])
    result = estimate(trainer, seconds=20)
    told = seen[-1]
    assert result.profile.steps_taken == result.profile.pilot_steps == 6
    assert len(result.profile.earlier_depths["balanced"]) == 2
    trainer.train()
    assert told is not seen[-1] and told.steps == seen[-1].steps
    for name in ("gradient", "loss_change", "displacement"):
        assert torch.equal(getattr(told, name), getattr(seen[-1], name)), name


def test_what_is_uncertain_is_said(tmp_path, pretrained, monkeypatch):
    trainer = trainer_of(tmp_path, rows=1600, num_train_epochs=1)
    result = estimate(trainer, predictor=predictor_that_loses(0.4), seconds=0.01)
    assert (result.profile.steps_taken, result.profile.pilot_steps) == (4, 12)
    assert "only 4 of the 12 steps that the run looks at were taken here" in result.verdict
    assert result.chosen.sure and "in brackets" not in str(result)
    monkeypatch.setattr(SmartFRZPolicy, "start", lambda _, now, signals: Decision(min(2, signals.steps - 2), "a test"))
    result = estimate(trainer_of(tmp_path), seconds=0.5)
    assert (result.chosen.depth, result.chosen.least, result.chosen.most) == (2, 1, 2)
    assert "2 of 5 (1-2)" in str(result) and "a shorter pilot gave 1 to 2 units" in result.verdict
