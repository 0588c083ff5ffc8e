"""Units that are frozen behind units that train."""

import copy
import json
from functools import partial

import numpy as np
import peft
import pytest
import torch
from apart import PLAN, Told, freeze_by_hand
from architectures import ARCHITECTURES, build
from launching import results
from odd_models import ODD_MODELS
from resuming import assert_same_end, run, undecided_predictor
from training import assert_left_alone, smartfrz, train
from versions import checkpoint_activations, resume_on_two_cpu_ranks

from smartfrz_hf import (
    Decision,
    Freezer,
    FreezingRun,
    SmartFRZCallback,
    SmartFRZConfig,
    SmartFRZPredictor,
    SmartFRZPredictorConfig,
    SmartFRZTrainer,
    find_blocks,
)
from smartfrz_hf._compat import CHECKPOINT_FUNCTION
from smartfrz_hf.checkpoint import load_state, save_state
from smartfrz_hf.report import write_report

STEPS = 18
EACH_STEP = {"order": "independent", "first_decision": 1, "decide_every": 1}


def step(model, batch, optimizer):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def in_a_loop(name, by_hand, checkpointing=None, plan=PLAN, **config):
    """Train for some steps with dropout, momentum and decay, and give the model and the run back."""
    torch.manual_seed(0)
    model = build(name)
    if checkpointing is not None:
        checkpoint_activations(model, checkpointing == "reentrant")
    batch, stack = ARCHITECTURES[name].batch(model), find_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    if by_hand:
        for done in range(STEPS):
            model.train()
            due = [units for begin, units in plan.items() if begin <= done]
            freeze_by_hand(stack, due[-1] if due else ())
            step(model, batch, optimizer)
        return model, None
    with FreezingRun(model, optimizer, STEPS, EACH_STEP | config, policy=Told(plan)) as freezing:
        for _ in range(STEPS):
            model.train()
            step(model, batch, optimizer)
            freezing.step()
        frozen = [freezing.stack[index] for index in freezing.front.freezer.frozen]
        for p in (p for unit in frozen for p in unit.named_parameters().values()):
            assert p.grad is None and p not in optimizer.state
    return model, freezing


@pytest.mark.parametrize("name", ["bert", "resnet", "llama", "swin"])
def test_equals_a_freeze_by_hand(name):
    """Bit for bit, running statistics, too."""
    mine, freezing = in_a_loop(name, by_hand=False)
    other, _ = in_a_loop(name, by_hand=True)
    for (key, value), wanted in zip(mine.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), key
    names = freezing.stack.names
    assert [(stage.step, stage.depth, stage.units, stage.apart) for stage in freezing.ledger.stages] == [
        (4, 0, [names[3]], [names[3]]),
        (7, 1, [names[0]], [names[3]]),
        (10, 1, [names[2]], names[2:4]),
        (14, 4, [names[1]], []),
    ]
    assert freezing.ledger.freeze_steps == {names[3]: 4, names[0]: 7, names[2]: 10, names[1]: 14}
    assert_left_alone(mine)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_activation_checkpointing_changes_nothing(name, checkpointing):
    mine, _ = in_a_loop(name, by_hand=False, checkpointing=checkpointing)
    other, _ = in_a_loop(name, by_hand=True)
    for (key, value), wanted in zip(mine.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, wanted, msg=key)
    functions = [getattr(module, CHECKPOINT_FUNCTION, None) for module in mine.modules()]
    assert {type(function) for function in functions} <= {partial, type(None)}, "as Transformers has set them"


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_in_the_gap_stays_under_activation_checkpointing(reentrant):
    """It runs again in the backward pass, in evaluation mode both times; in evaluation it runs once."""
    model = build("bert")
    checkpoint_activations(model, reentrant)
    stack, batch, seen = find_blocks(model), ARCHITECTURES["bert"].batch(model), []
    Freezer(stack).freeze([2])
    block = stack.blocks[1]
    block.output.register_forward_pre_hook(lambda module, _: seen.append((module.training, block.training)))
    model.train()
    model(**batch).loss.backward()
    assert seen == [(False, False)] * 2
    model.eval()
    with torch.no_grad():
        model(**batch)
    assert len(seen) == 3 and not block.training


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_decoder_trains_whose_embeddings_are_frozen_with_the_encoder(reentrant):
    torch.manual_seed(0)
    make, _, batch = ODD_MODELS["bart"]
    model = make()
    checkpointed = copy.deepcopy(model)
    checkpoint_activations(checkpointed, reentrant)
    gradients = []
    for each in (model, checkpointed):
        stack = find_blocks(each, inputs=batch)
        last = max(index for index, unit in enumerate(stack) if "encoder" in unit.name)
        Freezer(stack).freeze([0, last])
        torch.manual_seed(1)
        each.train()(**batch).loss.backward()
        gradients.append({key: p.grad for key, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("decoder.layers.0" in key for key in gradients[0])
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


def test_unfreezing():
    model = build("bert")
    freezer = Freezer(find_blocks(model))
    freezer.freeze([1, 3])
    assert (freezer.depth, freezer.apart, freezer.frozen) == (0, {1, 3}, {1, 3})
    freezer.freeze([0, 4])
    assert (freezer.depth, freezer.apart) == (2, {3, 4})
    assert [unit.name for unit in freezer.unfreeze_to(1)] == [freezer.stack.names[unit] for unit in (1, 3, 4)]
    assert (freezer.depth, freezer.apart) == (1, set())
    freezer.unfreeze_to(0)
    assert_left_alone(model)
    with pytest.raises(ValueError, match="There is no unit 5; the units have the numbers 0 to 4"):
        freezer.freeze([5])


@pytest.mark.parametrize("after", [4, 8, 11, 14])
def test_resuming_equals_never_having_stopped(tmp_path, after):
    whole = run(tmp_path, policy=Told(), config=EACH_STEP)
    assert whole[1].ledger.gap > 0
    checkpoint = str(tmp_path / f"checkpoint-{after}")
    resumed = run(tmp_path, policy=Told(), config=EACH_STEP, resume=checkpoint, save_strategy="no")
    assert_same_end(whole, resumed)
    assert resumed[1].ledger.gap == pytest.approx(whole[1].ledger.gap)


@pytest.mark.parametrize("sums", [False, True])
def test_the_predictor_freezes_units_apart(tmp_path, sums):
    """Also one that sums the odds of a front. What is frozen is no longer recorded, and a resumed run is the same."""
    torch.manual_seed(2)  # with which the last units score highest
    predictor = SmartFRZPredictor(SmartFRZPredictorConfig(window=4, weights_per_unit=32, front_sum=sums))
    config = {"order": "independent", "freeze_threshold": 0.96}
    whole = run(tmp_path, predictor=predictor, config=config)
    opened = [stage for stage in whole[1].ledger.stages if stage.apart]
    assert opened, "the test needs a gap"
    history = whole[1].run.observer.history
    write_report(tmp_path, tmp_path / "report.html")
    assert (
        "of the compute ran back through units frozen behind units that train"
        in (tmp_path / "report.html").read_text()
    )
    unit = whole[1].ledger.units.index(opened[0].apart[0])
    assert len(history.snapshots()[unit].unique(dim=0)) == history.window, "frozen weights were recorded again"
    resumed = run(
        tmp_path,
        predictor=predictor,
        config=config,
        resume=str(tmp_path / f"checkpoint-{opened[0].step + 1}"),
        save_strategy="no",
    )
    assert_same_end(whole, resumed)


def test_the_cache_serves_a_gap_once_it_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("smartfrz_hf.activation_cache.monitor.CacheMonitor.loss", lambda self: None)
    losses, caches = [], []
    for cache in (False, True):
        trainer = train(
            tmp_path,
            trainer_class=SmartFRZTrainer,
            trainer_kwargs={"smartfrz": EACH_STEP | {"activation_cache": cache}, "policy": Told()},
            logging_steps=1,
            max_steps=40,
        )
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        caches.append(trainer.ledger.cache)
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert caches[1].off is None and caches[1].rows > caches[1].hits > 0
    # One row is looked up in each of 4 batches a step from the step on in which the gap has closed.
    assert caches[1].rows <= 4 * (40 - 14)


def test_a_limit_holds_for_all_units_and_a_front_has_none_apart():
    _, freezing = in_a_loop("resnet", False, plan={2: {1, 2, 3}}, max_depth=3)
    assert list(freezing.ledger.freeze_steps) == freezing.stack.names[1:3]
    model = build("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with FreezingRun(model, optimizer, 4, {**EACH_STEP, "order": "front"}, policy=Told({0: {1, 3}})) as freezing:
        freezing.step(1)
        assert freezing.frozen_units == 0


@pytest.mark.parametrize("when", ["keep_last", "stop"])
def test_nothing_left_to_train(when):
    model = build("bert")
    for parameter in (*model.classifier.parameters(), *model.bert.pooler.parameters()):
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = EACH_STEP | {"when_all_frozen": when}
    with FreezingRun(model, optimizer, 4, config, policy=Told({1: {2, 4}, 2: {0, 1, 2, 3, 4}})) as freezing:
        freezing.step(1)
        assert freezing.front.freezer.frozen == {2} and not freezing.should_stop
        freezing.step(2)
        assert freezing.depth == 4 and freezing.should_stop == (when == "stop")


def test_everything_trains_again_when_the_learning_rate_rises(tmp_path):
    callback = SmartFRZCallback(
        SmartFRZConfig(order="independent", first_decision=3, decide_every=1, record_every=1, max_depth=4),
        undecided_predictor(),
        policy=None,
    )
    callback.policy.decide = Told({4: {2}, 12: {2}}).decide
    schedule = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}
    train(tmp_path, [callback], warmup_steps=0, **schedule)
    name = callback.ledger.units[2]
    assert [(begin < end) for begin, end in callback.ledger.frozen_spans[name]] == [True, True]
    assert len(callback.ledger.stages) == 3 and callback.ledger.stages[1].apart == []


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # by peft
def test_units_with_nothing_to_train_leave_no_gap(tmp_path):
    """The stem under LoRA."""
    model = peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query", "value"]))
    config = EACH_STEP | {"when_all_frozen": "stop"}
    callback = SmartFRZCallback(config, policy=Told({2: {3}, 4: {1, 3}, 6: {1, 2, 3, 4}}))
    trainer = train(tmp_path, [callback], model)
    opened, grown, closed = callback.ledger.stages
    assert [(stage.depth, len(stage.apart)) for stage in (opened, grown, closed)] == [(0, 1), (2, 1), (4, 0)]
    assert trainer.state.global_step == 6, "nothing is left to train"


@pytest.mark.parametrize(
    ("depth", "apart"),
    [
        (0, {-1}),
        (0, {5}),
        (0, {2.5}),
        (0, {"2"}),
        (0, 3),
        (0, None),
        (float("nan"), ()),
        (float("inf"), ()),
        (None, ()),
        (0.5, ()),
    ],
)
def test_a_decision_that_makes_no_sense_is_refused(depth, apart):
    model, policy = build("bert"), Told()
    policy.decide = lambda observation: Decision(depth, "told", apart=apart)
    with pytest.raises(ValueError, match=r"`decide` of Told gave depth=.* from 0 to 4"):
        FreezingRun(model, torch.optim.SGD(model.parameters()), 4, EACH_STEP, policy=policy).begin()


def test_numbers_of_numpy_and_torch_are_good_indices(tmp_path):
    model, policy = build("bert"), Told()
    policy.decide = lambda observation: Decision(
        np.int64(1), "told", apart=[torch.tensor(2), *np.array([2, 3]), *torch.tensor([3])]
    )
    with FreezingRun(model, torch.optim.SGD(model.parameters()), 4, EACH_STEP, policy=policy) as freezing:
        save_state(freezing.state_dict(), tmp_path)
    assert load_state(tmp_path)["apart"] == [2, 3]


def test_a_policy_that_freezes_the_front_only_is_refused():
    with pytest.raises(ValueError, match="LinearPolicy freezes the front only"):
        SmartFRZCallback(policy="linear", order="independent")
    with pytest.raises(ValueError, match="'front', 'independent'"):
        SmartFRZConfig(order="paper")


def test_logs_and_summary_say_what_the_gap_costs(tmp_path):
    callback = SmartFRZCallback(EACH_STEP, policy=Told({4: {2, 3}}))
    trainer = train(tmp_path, [callback])
    ledger = callback.ledger
    assert ledger.depth == 0 and ledger.frozen_units == 2 and ledger.frozen_fraction > 0 and ledger.compute_saved > 0
    assert f"gap: {ledger.units[2]}, {ledger.units[3]} frozen behind units that train; {ledger.gap_share:.1%}" in str(
        ledger
    )
    assert json.loads(json.dumps(ledger.to_dict()))["gap"] == ledger.gap > 0
    keys = {key for log in trainer.state.log_history for key in log if key.startswith("freeze/")}
    assert keys == set(ledger.logs())
    everything = smartfrz(0.9, first_decision=5)
    train(tmp_path, [everything])
    assert everything.ledger.gap == 0 and "gap" not in str(everything.ledger)


RANKS = ["--apart", json.dumps({3: [3], 6: [0, 3], 9: [0, 2, 3], 12: [0, 1, 2, 3]}), "--stages", "{}"]
OPENED = [[3, 0, 1], [6, 1, 1], [9, 1, 2], [12, 4, 0]]


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    found, weights = results(tmp_path / "two", *RANKS)
    (one,), alone = results(tmp_path / "one", *RANKS, ranks=1)
    assert [part["apart"] for part in found] == [OPENED, OPENED] == [one["apart"]] * 2
    assert found[0]["losses"] == pytest.approx(one["losses"], abs=1e-5)
    for key, value in alone.items():
        torch.testing.assert_close(weights[key], value, atol=1e-4, rtol=1e-4)
    for part in found:
        assert part["sent"] == part["active"] and part["sent"][2] > part["sent"][4] > part["sent"][10]


@pytest.mark.slow
@resume_on_two_cpu_ranks
@pytest.mark.parametrize("kind", [[], ["--fsdp=launcher"]], ids=["ddp", "fsdp2"])
def test_resuming_on_two_ranks(tmp_path, kind):
    recipe = {"recipe": "fsdp2_cpu"} if kind else {}
    whole, weights = results(tmp_path / "whole", *RANKS, *kind, **recipe)
    assert [part["apart"] for part in whole] == [OPENED, OPENED]
    for step in (4, 8):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        again, end = results(tmp_path / f"again-{step}", *RANKS, *kind, f"--resume={checkpoint}", **recipe)
        assert all(torch.equal(value, weights[key]) for key, value in end.items())
        assert again[0]["apart"] == OPENED and again[0]["losses"] == whole[0]["losses"]


@pytest.mark.slow
def test_fsdp2_trains_as_ddp(tmp_path):
    found, weights = results(tmp_path / "sharded", *RANKS, "--fsdp=launcher", recipe="fsdp2_cpu")
    other, wanted = results(tmp_path / "ddp", *RANKS)
    assert [part["apart"] for part in found] == [part["apart"] for part in other]
    assert found[0]["losses"] == pytest.approx(other[0]["losses"], abs=1e-5)
    for key, value in wanted.items():
        torch.testing.assert_close(weights[key], value, atol=1e-5, rtol=1e-5)
    assert [part["states"] for part in found] == [part["states"] for part in other]
