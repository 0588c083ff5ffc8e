"""Each policy answers as its rule says."""

from functools import partial

import pytest
import torch
from training import predictor_that_says

from smartfrz_hf import SmartFRZConfig, SmartFRZPredictor, SmartFRZPredictorConfig
from smartfrz_hf.policies import (
    GradESPolicy,
    LinearPolicy,
    NeverPolicy,
    Observation,
    SmartFRZPolicy,
    StaticPolicy,
    make_policy,
    register_policy,
    registry,
)
from smartfrz_hf.signals.schedule import LearningRates
from smartfrz_hf.signals.weights import WeightHistory


def seen(step=50, depth=0, units=5, history=None, trainable=None, learning_rate=1.0, **more):
    rates = LearningRates([*([1.0] * 100), learning_rate])
    rates.relative[step] = learning_rate
    return Observation(step, 100, depth, trainable or [True] * units, rates, history, **more)


def filled_history(units=5, records=4):
    history = WeightHistory(units, 4, 32)
    history._ring.normal_()
    history.steps = list(range(records))
    return history


def test_never():
    assert [NeverPolicy().decide(seen(depth=d)).depth for d in (0, 3)] == [0, 3]


def test_static():
    assert StaticPolicy(0.5).decide(seen(units=7)).depth == 3
    assert StaticPolicy(4.0).decide(seen(units=7)).depth == 4
    assert StaticPolicy(0.0).decide(seen(units=7)).depth == 0
    assert StaticPolicy(0.29).decide(seen(units=100)).depth == 29, "the product of these floats is a little less"
    with pytest.raises(ValueError, match="at most 7"):
        StaticPolicy(8).decide(seen(units=7))


def test_linear():
    policy = LinearPolicy(start=0.2, level=0.5)
    assert [policy.decide(seen(step, units=10)).depth for step in (0, 20, 37, 61, 100)] == [0, 0, 1, 2, 5]
    assert LinearPolicy(start=0.0, level=0.29).decide(seen(100, units=100)).depth == 29
    assert policy.decide(seen(36, depth=4, units=10)).depth == 4, "what is frozen stays frozen"


def test_smartfrz_freezes_the_converged_front_only():
    policy = SmartFRZPolicy(predictor_that_says(0.5), 0.6)
    for probabilities, depth, wanted in (
        ([0.7, 0.9, 0.5, 0.9, 0.9], 0, 2),
        ([0.5, 0.9, 0.9, 0.9, 0.9], 0, 0),
        ([0.6, 0.6, 0.6, 0.6, 0.6], 0, 5),
        ([0.9, 0.1, 0.9], 2, 3),
    ):
        policy.score = lambda *_, p=probabilities: (p, torch.ones(len(p), 1))
        assert policy.decide(seen(depth=depth, history=filled_history())).depth == wanted


def test_units_with_nothing_to_train_stand_in_no_way():
    policy = SmartFRZPolicy(predictor_that_says(0.5), 0.6)
    policy.score = lambda *_: ([0.1, 0.9, 0.1, 0.9, 0.9], torch.ones(5, 1))
    trainable = [False, True, False, True, True]
    assert policy.decide(seen(history=filled_history(), trainable=trainable)).depth == 5
    trainable = [False, True, True, True, True]
    assert policy.decide(seen(history=filled_history(), trainable=trainable)).depth == 2


def test_smartfrz_freezes_converged_units_wherever_they_are():
    policy = SmartFRZPolicy(predictor_that_says(0.5), 0.6)
    independent = partial(seen, order="independent", history=filled_history())
    for probabilities, depth, before, wanted in (
        ([0.5, 0.9, 0.9, 0.1, 0.9], 0, set(), (0, {1, 2, 4})),
        ([0.9, 0.5, 0.9, 0.1, 1.0], 0, {4}, (1, {2, 4})),
        ([0.9, 1.0, 0.1], 2, {3}, (4, set())),
    ):
        policy.score = lambda *_, p=probabilities: (p, torch.ones(len(p), 1))
        decision = policy.decide(independent(depth=depth, apart=frozenset(before)))
        assert (decision.depth, set(decision.apart)) == wanted
    trainable = [False, True, False, False, True]
    policy.score = lambda *_: ([0.1, 0.1, 0.1, 0.9, 0.9], torch.ones(5, 1))
    decision = policy.decide(independent(trainable=trainable))
    assert (decision.depth, decision.apart) == (1, {4}), "what has nothing to train freezes with the front only"


def test_each_unit_is_scored_by_itself():
    """Without the odds of the units in front of it, and of those that are frozen."""
    torch.manual_seed(0)
    predictor = SmartFRZPredictor(SmartFRZPredictorConfig(window=4, weights_per_unit=32))
    alone = SmartFRZPredictor(SmartFRZPredictorConfig(window=4, weights_per_unit=32, front_sum=False))
    alone.load_state_dict(predictor.state_dict())
    history = filled_history()
    snapshots = history.snapshots()
    front, independent, other = (
        SmartFRZPolicy(each, 0.5).score(seen(history=history, order=order), history, snapshots)[0]
        for each, order in ((predictor, "front"), (predictor, "independent"), (alone, "front"))
    )
    assert independent == other and independent[0] == front[0]
    assert all(own > summed for own, summed in zip(independent[1:], front[1:], strict=True))
    apart = seen(history=history, order="independent", apart=frozenset({3}))
    assert SmartFRZPolicy(predictor, 0.5).score(apart, history, snapshots)[0][3] == 1.0


def test_grades_freezes_blocks_wherever_they_are():
    policy, weight = GradESPolicy(tau=1.0), torch.nn.Parameter(torch.zeros(2, 2))
    changed = [0.0, 9.0, 0.0, 9.0]  # of the blocks
    for order, wanted in (("front", (2, set())), ("independent", (2, {3}))):
        policy._before = {unit: [(weight, torch.full((2, 2), change))] for unit, change in enumerate(changed, 1)}
        decision = policy.decide(seen(order=order))
        assert (decision.depth, {unit for unit in decision.apart if unit >= decision.depth}) == wanted
    policy._before = {}
    assert policy.decide(seen(order="independent")).depth == 0


def test_smartfrz_waits_for_history():
    policy = SmartFRZPolicy(predictor_that_says(0.9), 0.5)
    assert policy.decide(seen(history=filled_history(records=2))).depth == 0
    assert policy.decide(seen(history=filled_history(records=3))).depth == 5


def test_nothing_freezes_early_near_the_peak_of_the_learning_rate():
    policy = SmartFRZPolicy(predictor_that_says(0.9), 0.5)
    for step, learning_rate, depth in ((5, 1.0, 0), (19, 0.8, 0), (5, 0.5, 5), (20, 1.0, 5), (60, 0.4, 5)):
        history = filled_history()
        assert policy.decide(seen(step, history=history, learning_rate=learning_rate)).depth == depth


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_freeze_nothing(value):
    policy = SmartFRZPolicy(predictor_that_says(0.9), 0.5)
    history = filled_history()
    history._ring[4, 0, 0] = value
    decision = policy.decide(seen(history=history))
    assert decision.depth == 0 and "not finite" in decision.reason


def test_only_what_makes_a_policy_can_be_registered():
    for make in (3, NeverPolicy()):
        with pytest.raises(TypeError, match="`make` is .*must be a function that takes a `SmartFRZConfig`"):
            register_policy("x", make)
    with pytest.raises(TypeError, match="The name of a policy is 3"):
        register_policy(3, NeverPolicy)
    with pytest.raises(ValueError, match="There is a policy 'never' already"):
        register_policy("never", NeverPolicy)


def test_what_is_registered_must_return_a_policy(monkeypatch):
    monkeypatch.setitem(registry._makers, "never", lambda config: NeverPolicy)
    with pytest.raises(TypeError, match="registered as 'never' returned <class .*; it must return an instance"):
        make_policy(SmartFRZConfig(policy="never"))


def test_how_many_units_may_freeze_at_most():
    told = [policy.most(7) for policy in (StaticPolicy(0.5), StaticPolicy(4), LinearPolicy(0.5, 0.5), NeverPolicy())]
    assert told == [3, 4, 3, 0]


def test_make_policy():
    predictor = predictor_that_says(0.5)
    assert isinstance(make_policy(SmartFRZConfig(), predictor), SmartFRZPolicy)
    assert isinstance(make_policy(SmartFRZConfig(policy="static")), StaticPolicy)
    assert isinstance(make_policy(SmartFRZConfig(policy="linear")), LinearPolicy)
    assert isinstance(make_policy(SmartFRZConfig(policy="never")), NeverPolicy)
