"""The front probe says what becomes of the model when its front goes back to what it was."""

import copy

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
from smartfrz_hf.front_history import FrontHistory, affordable_rows
from smartfrz_hf.predictor.inputs import moves
from smartfrz_hf.probe import FrontProbe, spread_tokens

# Something of the front goes round the boundary: all layers read the stem's table of positions, or the head its embeddings.
LEAKY = {"deberta-v2", "mpnet", "gpt2"}


def shaken(model, by=0.1):
    """Weights moved at random, as training moves them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean())


def put(unit, weights):
    with torch.no_grad():
        for name, parameter in unit.named_parameters().items():
            parameter.copy_(weights[name])


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "albert"])
def test_what_left_the_front_stands_for_its_weights(name):
    model = build(name)
    batch, stack = ARCHITECTURES[name].batch(model), find_blocks(model)
    probe = FrontProbe(stack, rows=3)
    model(**batch)
    assert probe.ready
    before = [{key: p.detach().clone() for key, p in unit.named_parameters().items()} for unit in stack.units]
    then = probe.look()
    shaken(model)
    now = probe.look()
    random_state = torch.get_rng_state()
    for unit in range(len(stack)):
        assert probe.rewound(now, now, unit).equal(now.output)
        said = probe.rewound(now, then, unit)
        assert not said.equal(now.output)
        if name not in LEAKY:
            other = copy.deepcopy(model)
            for rewound, weights in zip(find_blocks(other).units[: unit + 1], before, strict=False):
                put(rewound, weights)
            wanted = other.eval()(**{key: value[:3] for key, value in batch.items() if key != "labels"}).logits
            wanted = wanted if wanted.dim() == 2 else spread_tokens(wanted, batch["attention_mask"][:3])
            torch.testing.assert_close(said, wanted, rtol=1e-4, atol=1e-5)
    assert torch.get_rng_state().equal(random_state)
    assert model.training and all("forward" not in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def predictor(seed=0):
    """A predictor that makes something of all that it is told, and calls about half of it converged."""
    torch.manual_seed(seed)
    return SmartFRZPredictor(SmartFRZPredictorConfig(window=4, samples=32, front_probe=True))


def freezing(threshold=0.5, **config):
    return SmartFRZCallback(SmartFRZConfig(freeze_threshold=threshold, **config), predictor())


class Scores(TrainerCallback):
    """Notes what the policy said at each freezing stage."""

    def __init__(self, callback):
        self.said, policy = [], callback.policy
        score = policy.score

        def noted(observation, *args):
            changes = None if observation.front is None else observation.front.changes
            self.said.append((observation.step, score(observation, *args), changes))
            return self.said[-1][1]

        policy.score = noted


def test_looking_changes_nothing(tmp_path):
    watchers = Watcher(), Watcher()
    callback = freezing(threshold=1.0)
    train(tmp_path / "plain", [watchers[0]])
    train(tmp_path / "watched", [callback, watchers[1]])
    assert callback._front is None, "let go of"
    for plain, watched in zip(watchers[0].weights, watchers[1].weights, strict=True):
        assert all(plain[key].equal(watched[key]) for key in plain)


def test_looks_are_told_to_the_policy_and_paid_for(tmp_path):
    callback, blind = freezing(threshold=1.0), freezing(threshold=1.0, probe_rows=0)
    seen, unseen = Scores(callback), Scores(blind)
    for one in (callback, blind):
        train(tmp_path, [one])
    changes = [changes for *_, changes in seen.said]
    assert [step for step, *_ in seen.said] == list(range(4, 20)) and all(c.shape == (5, 4, 3) for c in changes)
    assert (changes[-1][:, -1, 2] > changes[-1][:, 0, 2]).all(), "further from the start than from a step ago"
    assert changes[-1][:, :, 0].gt(0).all()
    assert all(changes is None for *_, changes in unseen.said)
    assert seen.said[-1][1] != unseen.said[-1][1]
    assert callback.ledger.spent.backward == blind.ledger.spent.backward
    # Twenty looks, the first at the start, at as many rows as a batch has; after each but the first, for each of four
    # earlier looks and five units, what comes behind the unit.
    forward = [flops.forward for flops in callback.ledger.full_unit_flops.values()]
    behind = sum(sum(forward[unit + 1 :]) for unit in range(5))
    looks = callback.ledger.spent.forward - blind.ledger.spent.forward
    assert looks == pytest.approx(20 * sum(forward) + 19 * 4 * behind)


def test_rows_that_a_run_can_afford():
    assert affordable_rows(units=7, rows_between=10) == 4, "at least"
    assert affordable_rows(units=7, rows_between=3200) == 19


@pytest.mark.parametrize("killed_at", [3, 7])
def test_a_resumed_run_has_looked_at_the_same(tmp_path, killed_at):
    whole, resumed = freezing(threshold=0.9), freezing(threshold=0.9)
    said, said_after = Scores(whole), Scores(resumed)
    full = train(tmp_path / "whole", [whole], save_strategy="steps", save_steps=killed_at)
    checkpoint = tmp_path / "whole" / f"checkpoint-{killed_at}"
    again = train(tmp_path / "whole", [resumed], resume=str(checkpoint))
    assert whole.ledger.freeze_steps == resumed.ledger.freeze_steps != {}
    rest = [entry for entry in said.said if entry[0] > killed_at]
    assert len(rest) == len(said_after.said) > 0
    for (step, scores, changes), (step_after, scores_after, changes_after) in zip(rest, said_after.said, strict=True):
        assert (step, scores) == (step_after, scores_after) and changes.equal(changes_after)
    weights = again.model.state_dict()
    assert all(value.equal(weights[key]) for key, value in full.model.state_dict().items())


def test_a_model_that_cannot_be_looked_at(tmp_path, caplog):
    class Stubborn(type(build("bert"))):
        def forward(self, input_ids, attention_mask, *, labels, **kwargs):
            return super().forward(input_ids, attention_mask, labels=labels, **kwargs)

    model = build("bert")
    model.__class__ = Stubborn
    callback = freezing(threshold=1.0)
    seen = Scores(callback)
    train(tmp_path, [callback], model=model)
    assert caplog.text.count("The front probe does not work with Stubborn (TypeError") == 1
    assert len(seen.said) == 16 and all(changes is None for *_, changes in seen.said)


def test_blocks_that_run_several_times_are_not_looked_at(tmp_path):
    callback = freezing(threshold=1.0)
    seen = Scores(callback)
    train(tmp_path, [callback], model=build("albert"))
    assert seen.said and all(changes is None for *_, changes in seen.said)


def test_what_no_checkpoint_can_hold_is_not_looked_at():
    model = build("bert")
    front = FrontHistory(FrontProbe(find_blocks(model)))
    model(**ARCHITECTURES["bert"].batch(model))
    front.probe._inputs[1]["return_dict"] = object()
    with pytest.raises(TypeError, match="object among the model's inputs"):
        front.record(0)


def test_moves_know_no_scale_and_tell_what_is_to_come():
    changes = torch.tensor([[[0.01, 1.0, 0.02], [0.02, 2.0, 0.04], [0.04, 3.0, 0.1], [0.5, 10.0, 1.0]]])
    since, now = torch.tensor([0.5, 0.4, 0.2, 0.0]), torch.tensor(0.6)
    found = moves(changes, since, now)
    assert found.shape == (1, 14) and found[0, -1] == 1
    wanted = [0.01, 0.02, 0.04, 0.1, 0.2, 0.3, 0.02, 0.04, 0.1, 0.01 * 4, 0.02 * 2, 0.04 * 1, 0.5]
    torch.testing.assert_close(10 ** found[0, :-1], torch.tensor(wanted), rtol=1e-4, atol=0)
    torch.testing.assert_close(moves(1000 * changes, since, now), found)


def test_the_form_of_the_paper_is_not_told_of_the_front():
    with pytest.raises(ValueError, match="front_probe"):
        SmartFRZPredictorConfig(form="weights", front_probe=True)
