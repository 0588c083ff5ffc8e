"""The front probe shows how much the outputs of each unit, and of the model, have changed."""

import json

import pytest
import torch
from architectures import ARCHITECTURES, build
from training import Watcher, train
from transformers import TrainerCallback

from smartfrz_hf import (
    SmartFRZCallback,
    SmartFRZConfig,
    SmartFRZPredictor,
    SmartFRZPredictorConfig,
    find_blocks,
)
from smartfrz_hf.activation_cache.monitor import CacheMonitor
from smartfrz_hf.model.nested import from_state, to_state
from smartfrz_hf.predictor.features import probe_features
from smartfrz_hf.signals.probe import MAX_FEATURES, FirstBatch, FrontProbe, shift, spread_tokens, thinned
from smartfrz_hf.signals.probe_history import ProbeHistory, affordable_rows


def shaken(model, by=0.1):
    """Weights moved at random, as training moves them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_snapshot_is_the_output_for_the_first_rows(name):
    model = build(name)
    batch, stack = ARCHITECTURES[name].batch(model), find_blocks(model)
    probe = FrontProbe(stack, rows=3)
    model(**batch)
    assert probe.ready
    random_state = torch.get_rng_state()
    then = probe.run()
    shaken(model)
    now = probe.run()
    assert torch.get_rng_state().equal(random_state)
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    rows = {key: value[:3] for key, value in batch.items() if key != "labels"}
    seen = {}
    entered = lambda module, args, kwargs: seen.update({0: args[0] if args else kwargs["hidden_states"]})  # noqa: E731
    stack.blocks[0].register_forward_pre_hook(entered, with_kwargs=True)
    for unit, block in enumerate(stack.blocks, start=1):
        block.register_forward_hook(lambda module, args, output, unit=unit: seen.update({unit: output}))
    said = model.eval()(**rows).logits
    said = said if said.dim() == 2 else spread_tokens(said, batch["attention_mask"][:3])
    torch.testing.assert_close(now.output, said)
    assert sorted(seen) == list(range(len(stack)))
    for unit, output in seen.items():
        output = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(now.hidden[unit], output.flatten(1))
    changes = now.changes(then)
    assert changes.shape == (len(stack), 2) and changes.gt(0).all()
    assert changes[:, 1].tolist() == pytest.approx([shift(now.output, then.output)] * len(stack))
    wanted = [(a - b).pow(2).mean().item() for a, b in zip(now.hidden, then.hidden, strict=True)]
    assert changes[:, 0].tolist() == pytest.approx(wanted)
    assert now.changes(now).eq(0).all()


def test_of_much_that_leaves_a_unit_some_is_kept():
    hidden = torch.arange(2 * 4 * MAX_FEATURES).view(2, -1, 64)
    kept = thinned(hidden)
    assert kept.is_contiguous() and kept[0].tolist() == list(range(0, 4 * MAX_FEATURES, 5))
    assert (kept[0] % 64).unique().tolist() == list(range(64)), "of all features"
    assert thinned(hidden[:, :5]).equal(hidden[:, :5].flatten(1)), "all of little"


def predictor(seed=3):
    """A predictor whose answer depends on all of its inputs, and which calls about half of the units converged."""
    torch.manual_seed(seed)
    return SmartFRZPredictor(SmartFRZPredictorConfig(window=4, weights_per_unit=32, front_probe=True))


def freezing(threshold=0.5, **config):
    return SmartFRZCallback(SmartFRZConfig(freeze_threshold=threshold, **config), predictor())


class Scores(TrainerCallback):
    """Notes the scores of each freezing stage, and the probe's changes that they were made from."""

    def __init__(self, callback):
        self.stages, policy = [], callback.policy
        score = policy.score

        def noted(observation, *args):
            changes = None if observation.probe is None else observation.probe.changes
            result = score(observation, *args)
            self.stages.append((observation.step, result[0], changes))
            return result

        policy.score = noted


def test_the_probe_changes_nothing(tmp_path):
    watchers = Watcher(), Watcher()
    callback = freezing(threshold=1.0)
    train(tmp_path / "plain", [watchers[0]])
    train(tmp_path / "probed", [callback, watchers[1]])
    assert callback.run.observer.probe is None, "given back at the end"
    for plain, probed in zip(watchers[0].weights, watchers[1].weights, strict=True):
        assert all(plain[key].equal(probed[key]) for key in plain)


def test_the_policy_gets_the_changes_and_the_ledger_their_cost(tmp_path, affordable):
    probed, blind = (
        freezing(threshold=1.0, decide_every=0.025),
        freezing(threshold=1.0, decide_every=0.025, probe_examples=0),
    )
    seen, unseen = Scores(probed), Scores(blind)
    for callback in (probed, blind):
        train(tmp_path, [callback])
    changes = [changes for *_, changes in seen.stages]
    assert [step for step, *_ in seen.stages] == list(range(4, 20)) and all(c.shape == (5, 4, 2) for c in changes)
    assert (changes[-1][:, -1] > changes[-1][:, 0]).all(), "further from the start than from a step ago"
    assert changes[-1].gt(0).all()
    assert all(changes is None for *_, changes in unseen.stages)
    assert seen.stages[-1][1] != unseen.stages[-1][1]
    assert probed.ledger.spent.backward == blind.ledger.spent.backward
    # Twenty snapshots, the first at the start, at as many rows as a batch has.
    forward = [flops.forward for flops in probed.ledger.full_unit_flops.values()]
    difference = probed.ledger.spent.forward - blind.ledger.spent.forward
    assert difference == pytest.approx(20 * sum(forward))


def test_the_probe_sees_a_front_that_is_in_host_memory(tmp_path, monkeypatch, affordable):
    here, offloaded = (freezing(max_depth=3, offload_frozen=offload) for offload in (False, True))
    seen, seen_offloaded, was_away = Scores(here), Scores(offloaded), []
    record = ProbeHistory.record

    def noted(self, step):
        was_away.append(offloaded.run is not None and offloaded.run.front.freezer.weights.offloaded)
        record(self, step)

    monkeypatch.setattr(ProbeHistory, "record", noted)
    monkeypatch.setattr(CacheMonitor, "loss", lambda self: None)  # on a busy machine the cache may not pay
    for callback in (here, offloaded):
        train(tmp_path, [callback], max_steps=80)
    assert any(was_away)
    assert len(seen.stages) == len(seen_offloaded.stages)
    for (_, scores, changes), (_, scores_away, changes_away) in zip(seen.stages, seen_offloaded.stages, strict=True):
        assert scores == pytest.approx(scores_away, abs=1e-3)
        torch.testing.assert_close(changes, changes_away, rtol=1e-2, atol=1e-9)
        assert changes.isfinite().all()


def test_rows_that_a_run_can_afford():
    assert affordable_rows(rows_between=33) == 0
    assert affordable_rows(rows_between=160) == 4


@pytest.mark.parametrize(("batch", "rows"), [(4, 0), (16, 2)])
def test_the_probe_costs_at_most_one_percent_of_a_run(tmp_path, batch, rows):
    callback = SmartFRZCallback(SmartFRZConfig(max_depth=0))
    train(tmp_path, [callback], max_steps=100, per_device_train_batch_size=batch)
    cost = 20 * rows / (100 * batch) / 3
    assert callback.ledger.compute_saved == pytest.approx(-cost, rel=0.05)
    assert -0.01 <= callback.ledger.compute_saved <= 0


@pytest.mark.parametrize("killed_at", [3, 7])
def test_a_resumed_run_has_the_same_snapshots(tmp_path, killed_at, affordable):
    whole, resumed = freezing(threshold=0.65), freezing(threshold=0.65)
    seen, seen_after = Scores(whole), Scores(resumed)
    full = train(tmp_path / "whole", [whole], save_strategy="steps", save_steps=killed_at)
    checkpoint = tmp_path / "whole" / f"checkpoint-{killed_at}"
    again = train(tmp_path / "whole", [resumed], resume=str(checkpoint))
    assert whole.ledger.freeze_steps == resumed.ledger.freeze_steps != {}
    rest = [entry for entry in seen.stages if entry[0] > killed_at]
    assert len(rest) == len(seen_after.stages) > 0
    for (step, scores, changes), (step_after, scores_after, changes_after) in zip(
        rest, seen_after.stages, strict=True
    ):
        assert (step, scores) == (step_after, scores_after) and changes.equal(changes_after)
    weights = again.model.state_dict()
    assert all(value.equal(weights[key]) for key, value in full.model.state_dict().items())


def test_labels_that_a_model_needs_are_kept():
    class Strict(type(build("bert"))):
        def forward(self, input_ids, attention_mask, *, labels, **kwargs):
            return super().forward(input_ids, attention_mask, labels=labels, **kwargs)

    model = build("bert")
    model.__class__ = Strict
    probe = FrontProbe(find_blocks(model))
    model(**ARCHITECTURES["bert"].batch(model))
    assert "labels" in probe.batch.inputs[1] and probe.run().output.shape == (4, 2)


def test_a_model_that_cannot_be_probed(tmp_path, caplog, affordable):
    class Stubborn(type(build("bert"))):
        def forward(self, input_ids, attention_mask, labels=None, **kwargs):
            if not self.training:
                raise TypeError("this model does nothing but train")
            return super().forward(input_ids, attention_mask, labels=labels, **kwargs)

    model = build("bert")
    model.__class__ = Stubborn
    callback = freezing(threshold=1.0)
    seen = Scores(callback)
    train(tmp_path, [callback], model=model)
    assert caplog.text.count("The front probe does not work with Stubborn (TypeError") == 1
    assert len(seen.stages) == 16 and all(changes is None for *_, changes in seen.stages)


def test_inputs_that_no_checkpoint_can_hold_are_refused():
    model = build("bert")
    front = ProbeHistory(FrontProbe(find_blocks(model)))
    model(**ARCHITECTURES["bert"].batch(model))
    front.probe.batch.inputs[1]["return_dict"] = object()
    with pytest.raises(TypeError, match="input of type object, which a checkpoint cannot hold"):
        front.record(0)


def test_moves_know_no_scale():
    changes = torch.tensor([[[1.0, 0.02], [2.0, 0.04], [3.0, 0.1], [10.0, 1.0]]])
    found = probe_features(changes)
    assert found.shape == (1, 7) and found[0, -1] == 1
    torch.testing.assert_close(10 ** found[0, :-1], torch.tensor([0.1, 0.2, 0.3, 0.02, 0.04, 0.1]))
    torch.testing.assert_close(probe_features(1000 * changes), found)


def test_the_form_of_the_paper_is_not_told_of_the_front():
    with pytest.raises(ValueError, match="front_probe"):
        SmartFRZPredictorConfig(form="weights", front_probe=True)


def test_the_first_batch():
    model = build("bert")
    batch = ARCHITECTURES["bert"].batch(model)
    first = FirstBatch(model, lambda rows: rows // 2)
    model.eval()(**batch)
    assert not first.ready and first.elements == 1, "evaluation does not count"
    model.train()(**batch)
    model(**{key: value.flip(0) for key, value in batch.items()})
    args, kwargs = first.inputs
    assert first.ready and args == () and kwargs.keys() == {"input_ids", "attention_mask"}
    assert kwargs["input_ids"].equal(batch["input_ids"][:2]) and first.elements == 32
    assert not model._forward_pre_hooks
    other = FirstBatch(model, 2)
    other.load_state_dict(first.state_dict())
    assert other.inputs[1]["input_ids"].equal(kwargs["input_ids"]) and not model._forward_pre_hooks
    nested = ({"a": [torch.ones(2), None, "word"]}, (True, 1.5))
    restored = from_state(json.loads(json.dumps(to_state(({"a": [None, "word"]}, (True, 1.5))))))
    assert restored == ({"a": [None, "word"]}, (True, 1.5))
    assert from_state(to_state(nested))[0]["a"][0].equal(torch.ones(2))
    assert from_state(to_state([torch.Size((3, 4))])) == [(3, 4)], "a subclass of a container is one"
