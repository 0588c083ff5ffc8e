"""The callback in a plain Trainer: exact when nothing freezes, and a frozen prefix that stays frozen."""

import logging
from types import SimpleNamespace

import peft
import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from architectures import ARCHITECTURES, build
from torch import nn
from training import Rows, Watcher, arguments, assert_same_run, smartfrz, train
from transformers import Trainer, TrainerCallback
from transformers.utils import logging as transformers_logging

from smartfrz_hf import SmartFRZCallback, SmartFRZConfig, SmartFRZTrainer, find_blocks


@pytest.mark.parametrize("name", ["bert", "resnet", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 3, "activation_checkpointing": True}])
def test_a_run_that_freezes_nothing_equals_plain_training(tmp_path, name, settings):
    if name == "resnet":
        settings = {key: value for key, value in settings.items() if key != "activation_checkpointing"}
    data = None
    if name == "gpt2":
        data = Rows()
        for row in data.rows:
            row["labels"] = row["input_ids"]
    plain = train(tmp_path, model=build(name), dataset=data, **settings)
    never = SmartFRZCallback(SmartFRZConfig(policy="never"))
    assert_same_run(plain, train(tmp_path, [never], build(name), dataset=data, **settings))
    # The predictor is asked at every stage, and always says no.
    no = smartfrz(0.1)
    assert_same_run(plain, train(tmp_path, [no], build(name), dataset=data, **settings))
    assert no.ledger.decisions > 15 and no.ledger.depth == 0


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "activation_checkpointing": True}])
def test_frozen_units_stay_as_they_were_to_the_end(tmp_path, settings):
    callback, watcher = smartfrz(0.9, first_decision=5, decide_every=5, max_depth=3), Watcher()
    trainer = train(tmp_path, [callback, watcher], **settings)
    assert callback.ledger.freeze_steps == {"stem": 5, "bert.encoder.layer.0": 5, "bert.encoder.layer.1": 5}
    prefix = {k for unit in find_blocks(trainer.model).units[:3] for k in unit.named_parameters()}
    for key in prefix:
        assert not torch.equal(watcher.weights[3][key], watcher.weights[4][key]), "active to step 5"
        for weights in watcher.weights[5:]:
            assert torch.equal(weights[key], watcher.weights[4][key]), key
    for key in ("bert.encoder.layer.2.output.dense.weight", "classifier.weight"):
        assert not torch.equal(watcher.weights[-1][key], watcher.weights[-2][key])
    parameters = dict(trainer.model.named_parameters())
    assert all(parameters[key] not in trainer.optimizer.state for key in prefix)
    assert all(parameters[key] in trainer.optimizer.state for key in parameters if key not in prefix)
    assert all(p.requires_grad for p in trainer.model.parameters()), "flags are restored when training ends"


def test_decisions_come_early_and_go_on(tmp_path):
    class Spy(TrainerCallback):
        steps = []

        def on_step_end(self, args, state, control, **kwargs):
            if callback.ledger.decisions > len(self.steps) + 1:  # one more is made before the first step
                self.steps.append(state.global_step)

    callback = smartfrz(0.1)
    train(tmp_path, [callback, Spy()], max_steps=120)
    assert Spy.steps == list(range(6, 120, 6)), "every 5 % of the run"


def test_several_units_freeze_in_one_stage_and_later_ones_follow(tmp_path):
    answers = iter([[0.9, 0.8, 0.2, 0.9, 0.9], [0.9, 0.1, 0.9], [0.9, 0.9], [0.7]])
    callback = smartfrz(0.5, first_decision=5, decide_every=5)
    callback.policy.score = lambda *_: (next(answers), torch.ones(5, 1))
    train(tmp_path, [callback])
    assert [(s.step, s.depth) for s in callback.ledger.stages] == [(5, 2), (10, 3), (15, 5)]
    assert "0.900, 0.800 against 0.7" in callback.ledger.stages[0].reason


def test_everything_trains_again_when_the_learning_rate_rises_again(tmp_path):
    restarts = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}, "max_steps": 22}
    callback, watcher = smartfrz(0.9, first_decision=5, decide_every=2, record_every=1, max_depth=3), Watcher()
    trainer = train(tmp_path, [callback, watcher], **restarts)
    assert [(s.step, s.depth) for s in callback.ledger.stages] == [(5, 3), (12, 0), (15, 3)]
    assert callback.ledger.frozen_spans["stem"] == [(5, 12), (15, 22)] and callback.ledger.freeze_steps["stem"] == 15
    key = "bert.encoder.layer.0.output.dense.weight"
    still = [torch.equal(a[key], b[key]) for a, b in zip(watcher.weights, watcher.weights[1:], strict=False)]
    # From the end of step 5 to that of 12, and again from 15 on.
    assert still == [False] * 4 + [True] * 7 + [False] * 3 + [True] * 7
    assert 0 < callback.ledger.compute_saved < 1 and all(p.requires_grad for p in trainer.model.parameters())
    left = smartfrz(0.9, first_decision=5, decide_every=2, record_every=1, max_depth=3, unfreeze_on_restart=False)
    train(tmp_path, [left], **restarts)
    assert [(s.step, s.depth) for s in left.ledger.stages] == [(5, 3)]


def test_static_freezes_before_the_first_step(tmp_path):
    callback, watcher = SmartFRZCallback(SmartFRZConfig(policy="static", static_depth=2)), Watcher()
    model = build("bert")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(tmp_path, [callback, watcher], model, warmup_steps=0)
    for unit in find_blocks(model).units[:2]:
        for key in unit.named_parameters():
            assert torch.equal(watcher.weights[-1][key], before[key])
    assert callback.ledger.freeze_steps == {"stem": 0, "bert.encoder.layer.0": 0}
    half = SmartFRZCallback(SmartFRZConfig(policy="static", static_depth=0.5))
    train(tmp_path, [half], max_steps=1)
    assert half.ledger.depth == 2


def test_linear_grows_with_the_run(tmp_path):
    callback = SmartFRZCallback(SmartFRZConfig(policy="linear", linear_start=0.2, linear_depth=1.0, decide_every=1))
    train(tmp_path, [callback])
    depths = {stage.step: stage.depth for stage in callback.ledger.stages}
    assert depths == {8: 1, 11: 2, 14: 3, 17: 4}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_with_the_shipped_predictor_and_with_a_frozen_half(tmp_path, name):
    model = build(name)
    data = None
    if name in ("gpt2", "llama", "qwen2"):
        data = Rows()
        for row in data.rows:
            row["labels"] = row["input_ids"]
    units = len(find_blocks(model))
    callbacks = [SmartFRZCallback(), Watcher()]
    train(tmp_path, callbacks, model, dataset=data, max_steps=8)
    static = SmartFRZCallback(SmartFRZConfig(policy="static", static_depth=units // 2))
    train(tmp_path, [static], build(name), dataset=data, max_steps=2)
    assert static.ledger.depth == units // 2
    # With one repeated block only the stem is in front, and looking tokens up is no arithmetic.
    assert static.ledger.compute_saved > 0 or name == "albert"


def test_nan_freezes_nothing_and_is_said_once(tmp_path, caplog):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.bert.encoder.layer[1].output.dense.weight.fill_(float("nan"))

    transformers_logging.enable_propagation()
    callback = smartfrz(0.9, first_decision=5, decide_every=1)
    with caplog.at_level(logging.WARNING):
        train(tmp_path, [Poison(), callback])
    transformers_logging.disable_propagation()
    assert callback.ledger.decisions > 10 and callback.ledger.depth == 0
    assert sum("NaN" in record.message for record in caplog.records) == 1


def test_peft(tmp_path, recwarn):
    model = peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"))
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    callback, watcher = smartfrz(0.9, first_decision=5, max_depth=3), Watcher()
    train(tmp_path, [callback, watcher], model)
    assert callback.ledger.depth == 3
    assert 0 < callback.ledger.frozen_fraction < 1 and callback.ledger.compute_saved > 0
    frozen = [key for key in flags if "lora" in key and (".layer.0." in key or ".layer.1." in key)]
    active = [key for key in flags if "lora_B" in key and ".layer.2." in key]
    assert frozen and active
    for key in frozen:
        assert torch.equal(watcher.weights[4][key], watcher.weights[-1][key])
    assert not any(torch.equal(watcher.weights[4][key], watcher.weights[-1][key]) for key in active)
    assert flags == {key: p.requires_grad for key, p in model.named_parameters()}


test_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")(test_peft)


def test_training_twice_starts_anew(tmp_path):
    callback = smartfrz(0.9, first_decision=5, max_depth=2)
    trainer = train(tmp_path, [callback])
    first = callback.ledger
    trainer.train()
    assert callback.ledger is not first and callback.ledger.freeze_steps == first.freeze_steps
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in trainer.model.modules())


def test_user_flags_survive(tmp_path):
    model = build("bert")
    model.bert.embeddings.requires_grad_(False)
    callback = smartfrz(0.9, max_depth=2)
    train(tmp_path, [callback], model)
    assert callback.ledger.depth == 2
    assert not any(p.requires_grad for p in model.bert.embeddings.parameters())
    assert all(p.requires_grad for p in model.bert.encoder.parameters())


def test_bad_input_is_refused_before_training(tmp_path):
    def refused(match, callback, model=None, error=ValueError, **changes):
        model = build("bert") if model is None else model
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(error, match=match):
            train(tmp_path, [callback], model, **changes)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    class NoBlocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 2)

        def forward(self, input_ids, attention_mask, labels):
            return {"loss": nn.functional.cross_entropy(self.linear(input_ids.float()), labels)}

    refused("NoBlocks has no repeated blocks", smartfrz(), NoBlocks())
    refused("encoder.blocks", smartfrz(blocks=["encoder.blocks.*"]))
    refused("All 5 units .* are frozen already", smartfrz(), build("bert").requires_grad_(False))
    refused("must be at most 5", SmartFRZCallback(SmartFRZConfig(policy="static", static_depth=6)))


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match="DeepSpeed ZeRO.*Use DDP, FSDP2 or"):
        smartfrz().on_init_end(args, None, None, model=build("bert"))


def test_what_is_distributed_in_another_way_is_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setattr(type(args), "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="2 devices in one process .*accelerate launch"):
        smartfrz().on_init_end(args, None, None, model=build("bert"))
    monkeypatch.setattr(type(args), "n_gpu", property(lambda self: 0))
    monkeypatch.setattr(type(args), "world_size", property(lambda self: 2))
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MEGATRON_LM)
    with pytest.raises(ValueError, match="under DDP and FSDP2, not MEGATRON_LM"):
        smartfrz().on_init_end(args, None, None, model=build("bert"))


@pytest.mark.parametrize(
    ("plugin", "changes", "config", "why"),
    [
        ({"fsdp_version": 1}, {}, {}, "cannot freeze under FSDP1.*Use FSDP2"),
        ({"activation_checkpointing": True}, {}, {}, "Use `TrainingArguments.activation_checkpointing=True"),
        ({}, {}, {"frozen_dtype": "bfloat16"}, "`frozen_dtype` and `offload_frozen` do not work under FSDP2"),
        ({}, {"torch_compile": True}, {}, "does not work with `torch_compile`"),
        ({}, {"save_strategy": "steps"}, {}, "A plain Trainer cannot load .* Use `SmartFRZTrainer`"),
    ],
)
def test_what_fsdp_cannot_serve_is_refused(tmp_path, monkeypatch, plugin, changes, config, why):
    args = arguments(tmp_path, **changes)
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2} | plugin)
    state = SimpleNamespace(fsdp_plugin=plugin, parallelism_config=None)
    monkeypatch.setattr("smartfrz_hf.checks.AcceleratorState", lambda: state)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=why):
        smartfrz(**config).on_init_end(args, None, None, model=build("bert"))


@pytest.mark.parametrize("sizes", [{"dp_replicate_size": 2}, {"tp_size": 2}, {"cp_size": 2}])
def test_sharding_in_more_than_one_way_is_refused(tmp_path, monkeypatch, sizes):
    """HSDP, tensor and context parallelism."""
    args = arguments(tmp_path)
    parallel = ParallelismConfig(dp_shard_size=2, **sizes)
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2), parallelism_config=parallel)
    monkeypatch.setattr("smartfrz_hf.checks.AcceleratorState", lambda: state)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    ((name, _),) = sizes.items()
    with pytest.raises(ValueError, match=f"over all processes only, not {name}=2. Set `dp_shard_size` alone above 1"):
        smartfrz().on_init_end(args, None, None, model=build("bert"))


def test_a_model_sharded_while_loading_is_refused(tmp_path, monkeypatch):
    model = build("bert")
    monkeypatch.setattr(type(model), "is_distributed_loading_by_transformers", True, raising=False)
    with pytest.raises(ValueError, match="Load it whole"):
        smartfrz().on_init_end(arguments(tmp_path), None, None, model=model)


def test_predictor_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(OSError, match="lacks config.json"):
        SmartFRZCallback(SmartFRZConfig(predictor=str(tmp_path)))


class TwoCallbacks:
    """Both ways to have two, which would leave parameters frozen at the end."""

    in_one_trainer = (Trainer, lambda: [SmartFRZCallback(policy="never"), SmartFRZCallback(policy="never")])
    beside_the_mixin = (SmartFRZTrainer, lambda: [SmartFRZCallback(policy="never")])


@pytest.mark.parametrize("case", ["in_one_trainer", "beside_the_mixin"])
def test_two_callbacks_are_refused(tmp_path, case):
    trainer_class, callbacks = getattr(TwoCallbacks, case)
    with pytest.raises(ValueError, match="two `SmartFRZCallback`s"):
        trainer_class(build("bert"), arguments(tmp_path), train_dataset=Rows(), callbacks=callbacks())


def test_a_second_callback_that_comes_later_is_refused(tmp_path):
    trainer = Trainer(build("bert"), arguments(tmp_path), train_dataset=Rows(), callbacks=[SmartFRZCallback()])
    trainer.add_callback(SmartFRZCallback())
    with pytest.raises(ValueError, match="two `SmartFRZCallback`s"):
        trainer.train()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_a_callback_can_be_replaced(tmp_path):
    """Its place is free again, and its figures are no longer logged."""
    first, second = (
        SmartFRZCallback(policy="static", static_depth=3, first_decision=1),
        SmartFRZCallback(policy="never"),
    )
    trainer = Trainer(build("bert"), arguments(tmp_path), train_dataset=Rows(), callbacks=[first])
    trainer.train()
    trainer.remove_callback(first)
    trainer.train()
    assert "freeze/depth" not in trainer.state.log_history[-1]
    trainer.add_callback(second)
    trainer.train()
    assert trainer.state.log_history[-1]["freeze/depth"] == 0


class Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 8:
            raise KeyboardInterrupt


def test_an_interrupted_run_leaves_nothing_frozen_to_the_next_trainer(tmp_path):
    model, callback = build("bert"), SmartFRZCallback(policy="static")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [callback, Interrupt()], model)
    assert not all(parameter.requires_grad for parameter in model.parameters()), "nobody told the callback"
    other = SmartFRZCallback(policy="never")
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Rows(), callbacks=[other])
    assert_left_alone_but_for(model, other)
    trainer.train()
    assert all(parameter in trainer.optimizer.state for parameter in model.parameters())


def assert_left_alone_but_for(model, callback):
    assert callback.run is None and all(parameter.requires_grad for parameter in model.parameters())


def test_one_callback_serves_one_trainer_after_the_other(tmp_path):
    callback = SmartFRZCallback(policy="static", static_depth=2)
    for name in ("bert", "roberta"):
        train(tmp_path, [callback], build(name))
        assert callback.ledger.depth == 2 and callback.ledger.units[1].startswith(name)


def lora_model():
    """Nothing is trainable outside the units."""
    return peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query", "value"]))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # by peft
def test_something_trainable_always_stays(tmp_path):
    callback = smartfrz(0.9)
    trainer = train(tmp_path, [callback], lora_model())
    assert trainer.state.global_step == 20 and callback.ledger.depth == 4
    assert "bert.encoder.layer.3" not in callback.ledger.freeze_steps


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # by peft
def test_training_ends_when_all_is_frozen_if_asked(tmp_path):
    callback = smartfrz(0.9, when_all_frozen="stop", first_decision=5)
    trainer = train(tmp_path, [callback], lora_model())
    assert trainer.state.global_step == 5
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_run_that_goes_on_trains_its_front_again(tmp_path):
    """The learning rate had come to zero, and rises again with the new number of steps."""
    settings = {"save_strategy": "steps", "save_steps": 10}
    train(tmp_path, [smartfrz(0.9, first_decision=5)], max_steps=10, **settings)
    watcher, callback = Watcher(), smartfrz(0.9, first_decision=5, decide_every=100)
    train(tmp_path, [watcher, callback], max_steps=30, resume=str(tmp_path / "checkpoint-10"), **settings)
    assert [(stage.step, stage.depth) for stage in callback.ledger.stages][-1] == (11, 0)
    assert len(watcher.trainable[0]) < len(watcher.trainable[1]) == len(watcher.trainable[-1])


def test_schedules_of_torch_restart(tmp_path):
    model = build("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10)
    callback = smartfrz(0.9, first_decision=8, decide_every=100)
    train(tmp_path, [callback], model, trainer_kwargs={"optimizers": (optimizer, schedule)})
    assert [(stage.step, stage.depth) for stage in callback.ledger.stages] == [(8, 5), (10, 0)]
