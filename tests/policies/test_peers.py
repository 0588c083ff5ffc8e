"""The rules of other papers: their formulas with worked numbers, tiny real runs, and resuming."""

import math

import pytest
import torch
from architectures import build
from quick_policies import QUICK
from resuming import assert_same_end
from torch import nn
from training import Rows, arguments, assert_left_alone, train
from transformers import Trainer

from smartfrz_hf import Decision, Policy, SmartFRZCallback, SmartFRZConfig, find_blocks
from smartfrz_hf.policies import (
    PEERS,
    AutoFreezePolicy,
    EgeriaPolicy,
    FreezeOutPolicy,
    GradESPolicy,
    Observation,
    RandomPolicy,
    SelfCKAPolicy,
)
from smartfrz_hf.policies.egeria import normalized_gram, similarity_loss, slope
from smartfrz_hf.policies.self_cka import centered_gram, linear_cka
from smartfrz_hf.signals.probe import ProbeSnapshot
from smartfrz_hf.signals.schedule import LearningRates
from smartfrz_hf.signals.steps import BeforeUpdate


def seen(step=50, depth=0, units=5, probe=None, rates=None):
    return Observation(step, 100, depth, [True] * units, rates or LearningRates([1.0] * 101), None, probe)


class Outputs:
    """A probe history of given outputs."""

    def __init__(self, first):
        self.first = self.last = self.snapshot(first)

    @staticmethod
    def snapshot(hidden):
        return ProbeSnapshot([torch.tensor(rows) for rows in hidden], torch.zeros(1))

    def then(self, hidden):
        self.last = self.snapshot(hidden)
        return self


class Stack(list):
    """Units of one 2 x 2 matrix each."""

    def __init__(self, count):
        super().__init__(nn.Linear(2, 2, bias=False) for _ in range(count))
        for i, layer in enumerate(self):
            layer.named_parameters = lambda i=i, layer=layer: {f"{i}.weight": layer.weight}


def with_gradients(stack, values, step=0, depth=0):
    for layer, value in zip(stack, values, strict=True):
        layer.weight.grad = None if value is None else torch.full((2, 2), float(value))
    return BeforeUpdate(step, 100, depth, stack)


def test_autofreeze_follows_its_formula():
    policy, stack = AutoFreezePolicy(), Stack(5)
    assert policy.decide(seen(step=0)).depth == 0, "nothing to compare before the first step"
    # Sums of the first interval: opposite gradients cancel, as in the paper's accumulated gradient.
    policy.before_update(with_gradients(stack, [9, 3, 3, 1, 1]))
    policy.before_update(with_gradients(stack, [9, -1, -1, 1, 1]))
    assert policy.decide(seen(step=5)).depth == 0  # norms of the blocks: 8, 8, 8, 8
    policy.before_update(with_gradients(stack, [1, 1.8, 1.6, 1, 4]))
    decision = policy.decide(seen(step=10))  # norms 7.2, 6.4, 4, 16: changes 0.1, 0.2, 0.5, 1; median 0.35
    assert decision.depth == 3 and "0.1, 0.2, 0.5, 1, limit 0.35" in decision.reason
    policy.before_update(with_gradients(stack, [None, None, None, 1, 4], depth=3))
    decision = policy.decide(seen(step=15, depth=3))  # of the active blocks: 0 and 0
    assert decision.depth == 3


def test_autofreeze_keeps_the_stem_while_the_first_block_trains():
    policy, stack = AutoFreezePolicy(), Stack(4)
    for values in ([1, 1, 1, 1], [1, 9, 1, 1]):
        policy.before_update(with_gradients(stack, values))
        decision = policy.decide(seen(units=4))
    assert decision.depth == 0


def test_grades_follows_its_formula():
    policy, stack = GradESPolicy(tau=1.0, alpha=0.5), Stack(4)

    def step(changes, number, depth=0):
        policy.before_update(BeforeUpdate(number, 100, depth, stack))
        with torch.no_grad():
            for layer, change in zip(stack, changes, strict=True):
                layer.weight += change
        return policy.decide(seen(number + 1, depth, units=4)).depth

    assert step([0, 0, 0, 0], 30) == 0, "before alpha"
    assert step([9, 0.1, 0.2, 0.3], 60) == 3, "sums of four changes: 0.4, 0.8, 1.2"
    assert step([0, 0, 0, 0.3], 61, depth=3) == 3
    assert step([0, 0, 0, 0.2], 62, depth=3) == 4


def test_similarities_equal_their_definitions():
    first = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]])
    second = torch.tensor([[2.0], [1.0], [0.0]])
    x, y = first - first.mean(0), second - second.mean(0)
    cka = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())  # Kornblith et al., equation 3
    assert linear_cka(centered_gram(first), centered_gram(second)) == pytest.approx(float(cka), rel=1e-5)
    assert linear_cka(centered_gram(first), centered_gram(3 * first + 1)) == pytest.approx(1.0, rel=1e-5)
    assert linear_cka(centered_gram(first), torch.zeros(3, 3)) == 0

    one, other = torch.eye(2), torch.ones(2, 2)
    # G of the first is the identity; of the second, both rows are (1, 1) / sqrt(2).
    root = 1 / math.sqrt(2)
    wanted = (2 * (1 - root) ** 2 + 2 * root**2) / 4
    assert similarity_loss(normalized_gram(one), normalized_gram(other)) == pytest.approx(wanted)
    assert slope([1.0, 3.0, 5.0, 7.0]) == pytest.approx(2.0) and slope([4.0]) == 0
    assert slope([0.0, 1.0, 0.0]) == 0


def test_self_cka_freezes_the_steady_front():
    policy = SelfCKAPolicy(tolerance=0.05)
    start = [[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]]
    moved = [[1.0, 0.0], [0.0, -4.0], [2.0, 3.0]]
    probe = Outputs([start] * 4)
    assert policy.decide(seen(units=4)).depth == 0, "without outputs"
    assert policy.decide(seen(units=4, probe=probe.then([moved, start, start, start]))).depth == 0
    assert policy.decide(seen(units=4, probe=probe.then([moved, start, moved, start]))).depth == 2
    assert policy.decide(seen(units=4, depth=2, probe=probe.then([moved, start, moved, start]))).depth == 4


def test_egeria_freezes_one_block_at_a_time_and_unfreezes_when_the_rate_drops():
    policy = EgeriaPolicy(window=2, tolerance=0.2, renew_every=100, drop=0.1)
    rates = LearningRates([1.0] * 60 + [0.1] * 41)
    start = [[1.0, 0.0], [0.0, 1.0]]
    depth, probe, depths = 0, Outputs([start] * 4), []
    for stage in range(12):
        # Block 1 settles at once after the first stages, block 2 later, block 3 never.
        settled = [[1.0, 0.9], [0.9, 1.0]]
        moving = [[1.0, 0.1 * stage], [0.0, 1.0]]
        probe.then([moving, settled, settled if stage > 3 else start, moving])
        decision = policy.decide(seen(5 * stage, depth, units=4, probe=probe, rates=rates))
        assert decision.depth <= max(2, depth + 1), "one block at a time"
        depth = decision.depth
        depths.append(depth)
    assert depths[:3] == [0, 0, 0] and 2 in depths and max(depths) == 3, depths
    decision = policy.decide(seen(60, depth, units=4, probe=probe, rates=rates))
    assert decision.unfreeze and decision.depth == 0
    assert not policy.decide(seen(61, 0, units=4, probe=probe, rates=rates)).unfreeze, "once a drop"


@pytest.mark.parametrize(
    ("rates", "drops"),
    [
        ([1 - step / 100 for step in range(101)], False),
        ([(1 + math.cos(math.pi * step / 100)) / 2 for step in range(101)], False),
        ([0.97**step for step in range(101)], False),
        ([1.0] * 50 + [0.1] * 51, True),
        ([1.0] * 30 + [0.3] * 30 + [0.09] * 41, True),
        ([1.0] * 50 + [0.2] * 51, False),
    ],
)
def test_egeria_tells_a_drop_from_a_smooth_decay(rates, drops):
    policy, rates = EgeriaPolicy(window=2, tolerance=1.0), LearningRates(rates)
    probe, depth, unfroze = Outputs([[[1.0, 0.0], [0.0, 1.0]]] * 4), 0, False
    for step in range(0, 101, 2):
        probe.then([[[1.0, 0.1 * step], [0.0, 1.0]]] * 4)
        decision = policy.decide(seen(step, depth, units=4, probe=probe, rates=rates))
        depth, unfroze = decision.depth, unfroze or decision.unfreeze
    assert unfroze is drops


def test_freezeout_has_the_papers_rates_under_a_cosine_schedule():
    policy = FreezeOutPolicy()
    times = policy.freeze_times(5)
    assert times == pytest.approx([0.8**3, 0.84**3, 0.88**3, 0.92**3, 0.96**3])
    for progress in (0.0, 0.3, 0.6, 0.9):
        head = (1 + math.cos(math.pi * progress)) / 2
        for time, factor in zip(times, policy.rate_factors(progress, 5), strict=True):
            annealed = 0.5 / time * (1 + math.cos(math.pi * progress / time)) if progress < time else 0.0
            assert factor * head == pytest.approx(annealed)
    assert [policy.decide(seen(step)).depth for step in (51, 52, 59, 60, 100)] == [0, 1, 1, 2, 5]
    assert FreezeOutPolicy(0.5, 1, scaled=False).rate_factors(0.0, 2) == [1.0, 1.0]
    with pytest.raises(ValueError, match="`start` is 0"):
        FreezeOutPolicy(start=0)


def test_random_times_have_the_ratio():
    for ratio in (0.2, 0.5, 0.9):
        for seed in range(3):
            times = RandomPolicy(ratio, seed).freeze_times(13)
            assert sum(1 - time for time in times) / 13 == pytest.approx(ratio, abs=1e-3)
            assert times == sorted(times)
    assert RandomPolicy(0.0).decide(seen(100)).depth == 0
    with pytest.raises(ValueError, match="below 1"):
        RandomPolicy(1.0)


@pytest.mark.parametrize("name", [*sorted(PEERS)])
def test_each_runs_by_its_name(tmp_path, name):
    callback = SmartFRZCallback(policy=name)
    trainer = train(tmp_path, [callback], build("bert"))
    assert callback.ledger.decisions > 10
    assert type(callback.policy) is PEERS[name]
    assert_left_alone(trainer.model)


def train_with(policy, folder, resume=None):
    config = SmartFRZConfig(activation_cache=False, first_decision=3, decide_every=2)
    callback = SmartFRZCallback(config, policy=policy)
    changes = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "resume": resume}
    return train(folder, [callback], build("bert"), dataset=Rows(40), **changes), callback


@pytest.mark.parametrize("name", sorted(QUICK))
def test_a_resumed_run_is_the_same_run(tmp_path, name):
    whole = train_with(QUICK[name](), tmp_path)
    assert whole[1].ledger.stages, "nothing froze"
    resumed = train_with(QUICK[name](), tmp_path, resume=tmp_path / "checkpoint-8")
    assert_same_end(whole, resumed)


def test_rates_of_units_last_for_the_step_only(tmp_path):
    class Slow(Policy):
        """The stem and the first block stand still, the second learns at half the rate."""

        def decide(self, observation):
            return Decision(0, "never")

        def rate_factors(self, progress, units):
            return [0.0, 0.0, 0.5, 1.0, 1.0]

    def weights(policy):
        model = build("bert")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        callback = SmartFRZCallback(policy=policy)
        options = {"max_steps": 1, "warmup_steps": 0, "weight_decay": 0.0, "lr_scheduler_type": "constant"}
        trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=Rows(), callbacks=[callback])
        trainer.train()
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-3, 1e-3]
        assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(before)
        units = {name: i for i, unit in enumerate(find_blocks(model)) for name in unit.named_parameters()}
        return {name: (p.detach() - before[name], units.get(name, 5)) for name, p in model.named_parameters()}

    plain, slow = weights("never"), weights(Slow())
    factors = [0.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    for name, (change, unit) in slow.items():
        assert torch.allclose(change, factors[unit] * plain[name][0], atol=1e-6), name


def test_a_decision_can_unfreeze(tmp_path):
    class BackAndForth(Policy):
        def decide(self, observation):
            if observation.step == 10:
                return Decision(1, "again from the stem", unfreeze=True)
            return Decision(3 if observation.step >= 5 else -7, "to the third unit")

    callback = SmartFRZCallback(SmartFRZConfig(first_decision=5, decide_every=5), policy=BackAndForth())
    trainer = train(tmp_path, [callback], build("bert"))
    assert [(stage.step, stage.depth) for stage in callback.ledger.stages] == [(5, 3), (10, 0), (10, 1), (15, 3)]
    assert_left_alone(trainer.model)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("autofreeze", "percentile", 150),
        ("egeria", "window", 1),
        ("egeria", "renew_every", 0),
        ("egeria", "drop", 1),
        ("egeria", "tolerance", -0.1),
        ("freezeout", "power", 0),
        ("grades", "tau", float("nan")),
        ("grades", "alpha", 2),
        ("self_cka", "tolerance", float("nan")),
    ],
)
def test_settings_that_cannot_work_are_refused(name, setting, value):
    with pytest.raises(ValueError, match=f"`{setting}` is {value}; it must be "):
        PEERS[name](**{setting: value})
