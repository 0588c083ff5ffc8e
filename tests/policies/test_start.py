"""What freezes from the start of a run: by the start predictor's points, or by the compute that is to be saved."""

import math
import re
from dataclasses import replace

import pytest
import torch
import transformers
from architectures import build
from torch.utils.data import DataLoader
from training import START_LIMITS, Rows, predictor_that_loses, predictor_that_says, train
from zoo import build_tiny, loss_of, make_batch

from smartfrz_hf import (
    FreezingRun,
    SmartFRZCallback,
    SmartFRZConfig,
    SmartFRZPredictorConfig,
    find_blocks,
    load_predictor,
)
from smartfrz_hf.policies import Observation
from smartfrz_hf.policies.registry import PEERS, make_policy
from smartfrz_hf.predictor import StartPredictor
from smartfrz_hf.signals import pilot
from smartfrz_hf.signals.pilot_signals import PilotSignals
from smartfrz_hf.signals.schedule import LearningRates

STEPS = 40


@pytest.fixture
def shares(monkeypatch):
    """As in a pretrained model: all units contribute the same, the loss falls, and no block is as it was initialized."""
    monkeypatch.setattr(pilot, "is_fresh", lambda block: False)
    monkeypatch.setattr(PilotSignals, "agreement", 0.1)
    monkeypatch.setattr(PilotSignals, "contributions", torch.ones(5))


def run(folder, predictor, **config):
    callback = SmartFRZCallback(SmartFRZConfig(activation_cache=False, **config), predictor)
    train(folder, [callback], dataset=Rows(4 * STEPS), max_steps=STEPS, num_train_epochs=1)
    return callback.ledger


@pytest.mark.parametrize(
    ("point", "points", "depth"), [("conservative", 0.4, 1), ("conservative", 0.1, 2), ("balanced", 0.4, 3)]
)
def test_the_deepest_front_within_the_limits(tmp_path, shares, point, points, depth):
    ledger = run(tmp_path, predictor_that_loses(points), operating_point=point)
    (stage,) = ledger.stages
    assert (ledger.depth, stage.step) == (depth, 4) and f"and to lose {points * depth / 5:.1f} points" in stage.reason
    assert f"the rest trains at {5 / (5 - depth):.2f} times the learning rate" in stage.reason


def test_what_would_save_nothing_trains(tmp_path, shares, monkeypatch):
    """The patch embedding of a ViT, which saves next to nothing: a part of 1,000 in models of usual size, 5 % of this one."""
    monkeypatch.setattr("smartfrz_hf.policies.smartfrz.LEAST_SAVING", 0.1)
    callback = SmartFRZCallback(
        SmartFRZConfig(activation_cache=False, operating_point="conservative"), predictor_that_loses(0.4)
    )
    model, rows = build("vit"), Rows(4 * STEPS, images=True)
    train(tmp_path, [callback], model=model, dataset=rows, max_steps=STEPS, num_train_epochs=1)
    start = callback.ledger.start
    assert callback.ledger.depth == 0 and not callback.ledger.stages and start.rate_factor == 1
    assert start.reason == "what may freeze from the start would save less than 10% of the compute"


@pytest.mark.parametrize(("agreement", "freezes"), [(-0.11, False), (float("nan"), False), (-0.05, True)])
def test_nothing_freezes_where_the_loss_clearly_rises(tmp_path, shares, monkeypatch, agreement, freezes):
    monkeypatch.setattr(PilotSignals, "agreement", agreement)
    stages = run(tmp_path, predictor_that_loses(0.01)).stages
    assert freezes == any(stage.reason.startswith("from the start") for stage in stages)


def test_nothing_freezes_where_no_weight_moves(tmp_path, monkeypatch):
    monkeypatch.setattr(pilot, "is_fresh", lambda block: False)
    monkeypatch.setattr(PilotSignals, "reach", torch.zeros(5, dtype=torch.float64))
    assert run(tmp_path, predictor_that_loses(0.01)).depth == 0


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "resnet", "convnext"])
def test_a_model_from_scratch_is_known(name):
    stack = find_blocks(build(name))
    assert all(pilot.is_fresh(unit) for unit in stack[1:])
    optimizer = torch.optim.AdamW(stack.model.parameters(), lr=1e-4)
    rows = Rows(8, images=name in ("vit", "resnet", "convnext"))
    for batch in DataLoader(rows, batch_size=4):
        causal = name in ("gpt2", "llama")
        stack.model(**batch | ({"labels": batch["input_ids"]} if causal else {})).loss.backward()
        optimizer.step()
    assert not any(pilot.is_fresh(unit) for unit in stack[1:]), "training changes each block at once"


def test_a_model_from_scratch_freezes_nothing_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(PilotSignals, "agreement", 0.1)
    assert run(tmp_path, predictor_that_loses(0.01), operating_point="aggressive").depth == 0


def test_it_can_be_turned_off(tmp_path):
    assert run(tmp_path, predictor_that_loses(0.01), start_stage=False).depth == 0
    assert run(tmp_path, predictor_that_says(0.1)).depth == 0, "this predictor knows no start stage"


@pytest.mark.parametrize("target", [0.2, 0.4])
def test_a_target_is_met_by_the_fewest_units(tmp_path, target):
    """Also with a predictor that knows no start stage."""
    ledger = run(tmp_path, predictor_that_says(0.1), target_saving=target)
    assert target <= ledger.compute_saved < target + 0.2
    shallower = SmartFRZCallback(SmartFRZConfig(policy="static", static_depth=float(ledger.depth - 1)))
    train(tmp_path, [shallower], dataset=Rows(4 * STEPS), max_steps=STEPS, num_train_epochs=1)
    assert shallower.ledger.compute_saved * 36 / STEPS < target


@pytest.mark.parametrize("target", [None, 0.6])
def test_the_reason_tells_of_what_may_freeze(tmp_path, shares, target):
    """Not of the deeper front that the policy would freeze without `max_depth`, neither what it saves nor what it costs."""
    stages = [
        run(tmp_path, predictor_that_loses(0.1), target_saving=target, operating_point="aggressive", **limit).stages[0]
        for limit in ({"max_depth": 1}, {})
    ]
    saved = [int(re.search(r"save (\d+)% of the compute", stage.reason)[1]) for stage in stages]
    assert [stage.depth for stage in stages] == [1, 5] and saved[0] < 10 < 50 < saved[1]
    assert (", as no more units may freeze" if target else "and to lose 0.0 points") in stages[0].reason


def test_a_run_too_short_for_a_target_says_so(tmp_path, capsys):
    train(tmp_path, [SmartFRZCallback(SmartFRZConfig(target_saving=0.4), predictor_that_says(0.1))])
    assert (
        "(predictor, balanced; the run is too short to save 40% of the compute from the start)"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("policy", sorted({"linear", "never", "static", *PEERS}))
def test_a_target_needs_our_policy(policy):
    with pytest.raises(ValueError, match='`target_saving` needs the policy "smartfrz"'):
        SmartFRZConfig(policy=policy, target_saving=0.3)


def test_a_target_needs_our_policy_when_an_instance_is_passed():
    with pytest.raises(ValueError, match='`target_saving` needs the policy "smartfrz"'):
        SmartFRZCallback(policy=PEERS["egeria"](), target_saving=0.3)


@pytest.mark.parametrize("target", [None, 0.3])
def test_weights_that_are_not_finite_freeze_nothing(tmp_path, monkeypatch, target):
    monkeypatch.setattr(pilot, "is_fresh", lambda block: False)
    model = build("bert")
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    config = SmartFRZConfig(activation_cache=False, target_saving=target)
    callback = SmartFRZCallback(config, predictor_that_loses(0.01))
    train(tmp_path, [callback], model=model, dataset=Rows(4 * STEPS), max_steps=STEPS)
    assert callback.ledger.depth == 0
    assert "not finite in the pilot" in callback.ledger.start.reason


def test_everything_trains_in_the_pilot(tmp_path, shares):
    """Later stages would freeze everything as soon as there are three snapshots, in the warm-up."""
    callback = SmartFRZCallback(SmartFRZConfig(activation_cache=False), predictor_that_loses(0.1, never=0.95))
    train(tmp_path, [callback], dataset=Rows(4 * STEPS), max_steps=STEPS, warmup_steps=8)
    first = callback.ledger.stages[0]
    assert (first.step, callback.ledger.start.step) == (4, 4) and first.reason.startswith("from the start")


def test_saved_and_loaded(tmp_path):
    limits = {
        point: {"points": 0.2, "share": 0.3, "blocks": 0.4} for point in ("conservative", "balanced", "aggressive")
    }
    predictor = predictor_that_loses(3.0, start_limits=limits)
    predictor.save_pretrained(tmp_path)
    loaded = load_predictor(tmp_path)
    inputs = torch.rand(5), 1e6 * torch.rand(5)
    assert torch.equal(loaded.start(*inputs), predictor.start(*inputs))
    assert loaded.config.start_limits == limits
    no_number = dict.fromkeys(limits, {"points": "0.2", "share": 0.3, "blocks": 0.4})
    for wrong in ({"balanced": limits["balanced"]}, dict.fromkeys(limits, {"points": 1.0}), no_number):
        with pytest.raises(ValueError, match="start_limits"):
            SmartFRZPredictorConfig(start_limits=wrong)


def test_limits_belong_to_one_configuration():
    before = SmartFRZPredictorConfig().start_limits["balanced"]["points"]
    changed = SmartFRZPredictorConfig()
    changed.start_limits["balanced"]["points"] = before + 1
    assert SmartFRZPredictorConfig().start_limits["balanced"]["points"] == before


def test_at_most_a_fraction_of_the_blocks(tmp_path, shares):
    limits = {point: {"points": 1.0, "share": 1.0, "blocks": 0.5} for point, _, _ in START_LIMITS}
    assert run(tmp_path, predictor_that_loses(0.01, start_limits=limits)).depth == 3, "the stem and two of four blocks"


def test_a_regression_freezes_nothing_from_the_start(tmp_path, shares):
    """Its first steps learn the mean of the labels, whatever is in front."""
    model = build("bert")
    model.config.problem_type = "regression"
    assert pilot.is_regression(model) and not pilot.is_regression(build("bert"))
    callback = SmartFRZCallback(SmartFRZConfig(activation_cache=False), predictor_that_loses(0.01))
    rows = Rows(4 * STEPS)
    for row in rows.rows:
        row["labels"] = row["labels"].float()
    model.classifier, model.num_labels = torch.nn.Linear(model.config.hidden_size, 1), 1
    train(tmp_path, [callback], model=model, dataset=rows, max_steps=STEPS)
    assert callback.ledger.depth == 0


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_language_model_freezes_nothing_from_the_start(shares, name):
    """It needs its whole depth, stem and all: the loss of a text falls with every block that trains."""
    model = build_tiny(name)
    assert pilot.is_language_model(model) and not pilot.is_language_model(build("bert"))
    assert pilot.is_language_model(torch.nn.ModuleList([model])), "a model of one's own around it"
    optimizer, batch = torch.optim.AdamW(model.parameters()), make_batch(model)
    with FreezingRun(model, optimizer, STEPS, predictor=predictor_that_loses(0.01), inputs=batch) as run:
        for _ in range(STEPS):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
    assert run.ledger.depth == 0


@pytest.mark.parametrize("kind", ["TokenClassification", "QuestionAnswering"])
def test_with_an_output_for_each_token_nothing_freezes_from_the_start(shares, kind):
    """With tags, a third of the blocks cost more than a point on average, where 0.5 to 0.7 were expected."""
    config = build("bert").config
    model, ids = getattr(transformers, f"BertFor{kind}")(config), torch.arange(8).reshape(2, 4)
    assert pilot.labels_positions(torch.nn.ModuleList([model])) and not pilot.labels_positions(build("bert"))
    labels = (
        {"labels": ids % 2}
        if kind == "TokenClassification"
        else {"start_positions": ids[:, 0] % 4, "end_positions": ids[:, 1] % 4}
    )
    batch, optimizer = {"input_ids": ids, **labels}, torch.optim.AdamW(model.parameters())
    with FreezingRun(model, optimizer, STEPS, predictor=predictor_that_loses(0.01), inputs=batch) as run:
        for _ in range(STEPS):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
    assert run.ledger.depth == 0 and "output for each token" in str(run.ledger.start)


@pytest.mark.parametrize("kind", ["tags", "regression", "classes"])
@pytest.mark.parametrize("threshold", [None, 0.6])
def test_outputs_that_the_predictor_has_not_learned_from_have_the_most_careful_threshold(kind, threshold):
    """At that of the operating point, names lost 1.6 points of F1, and STS-B 1.1 points. A threshold that the user has set holds."""
    points = {"conservative": 0.99, "balanced": 0.6, "aggressive": 0.5}
    config, ids = build("bert").config, torch.arange(8).reshape(2, 4)
    config.num_labels = 1 if kind == "regression" else 2
    name = "Token" if kind == "tags" else "Sequence"
    model = getattr(transformers, f"BertFor{name}Classification")(config)
    labels = {"tags": ids % 2, "regression": ids[:, 0].float(), "classes": ids[:, 0] % 2}[kind]
    batch, optimizer = {"input_ids": ids, "labels": labels}, torch.optim.AdamW(model.parameters())
    within = torch.nn.ModuleList([model])  # a model of one's own around it
    assert (pilot.is_regression(within), pilot.labels_positions(within)) == (kind == "regression", kind == "tags")
    assert not pilot.is_regression(torch.nn.ModuleList([model.bert])), "a backbone has no such output"
    settings = SmartFRZConfig(freeze_threshold=threshold, max_depth=2)
    predictor = predictor_that_says(0.7, operating_points=points)
    with FreezingRun(model, optimizer, STEPS, settings, predictor=predictor, inputs=batch) as run:
        for _ in range(STEPS):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
    assert run.ledger.depth == (0 if threshold is None and kind != "classes" else 2)


def test_the_formula():
    model = StartPredictor()
    with torch.no_grad():
        model.log_scale.fill_(math.log(2.0))
        model.log_share_power.fill_(math.log(0.5))
        model.log_size_power.fill_(math.log(1.5))
    lost = model(torch.tensor([0.25, 0.0, 1.0]), torch.tensor([20e6, 5e6, 0.0]))
    torch.testing.assert_close(lost, torch.tensor([2 * 0.5 / 8, 2 * 0.001**0.5, 100.0]))


def test_what_the_pilot_shows_against_worked_numbers():
    signals = PilotSignals(
        steps=5,
        parameters=torch.tensor([100.0, 300.0, 600.0]),
        gradient=torch.tensor([0.01, 0.02, 1.0]),
        loss_change=torch.tensor([-1e-5, 1e-5, -1e-5]),
        displacement=torch.tensor([0.001, 0.001, 1.0]),
        motion=torch.tensor([0.1, 0.1, 0.1]),
        pretrained=2,
    )
    torch.testing.assert_close(signals.reach, torch.tensor([0.001, 0.006]).double())
    contributions = torch.tensor([0.0011, 0.0006]).double()  # the second unit has raised the loss
    torch.testing.assert_close(signals.contributions, contributions)
    assert signals.agreement == pytest.approx((0.001 - 0.003) / 0.007)
    assert signals.rate_factor(0) == 1.0 and signals.rate_factor(1) == pytest.approx(17 / 6)
    assert signals.rate_factor(2) == 4.0
    torch.testing.assert_close(signals.front_shares, torch.tensor([11 / 17, 1.0]).double())
    assert signals.parameters_left.tolist() == [900.0, 600.0]


@pytest.mark.parametrize(
    ("motion", "factor"), [(0.0002, 2.0), (0.000625, 1.6), (0.002, 4 / 3), (0.0, 2.0), (float("inf"), 4 / 3)]
)
def test_the_rate_rises_with_the_units_that_no_longer_train(monkeypatch, motion, factor):
    """As long as steps stay small against the weights that train, and at least for what the front has brought."""
    monkeypatch.setattr(PilotSignals, "contributions", torch.tensor([1.0, 1.0, 4.0, 2.0]))
    ones, moved = torch.ones(5), torch.tensor([9.0, 9.0, motion, motion / 2, 9.0])
    signals = PilotSignals(4, ones, ones, -ones, ones, motion=moved, pretrained=4)
    assert signals.rate_factor(2) == pytest.approx(factor)
    idle = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
    idle = replace(signals, parameters=idle, motion=moved.new_zeros(5))
    assert idle.rate_factor(2) == pytest.approx(4 / 3), "what trains is as much as before"
    assert signals.rate_factor(0) == 1.0 and signals.rate_factor(4) == 4.0


def test_later_stages_once_a_front_has_frozen(tmp_path, shares, monkeypatch):
    """They have a threshold of their own, also after a resume, unless the user has set one, and wait for 65 % of the run."""
    some = {point: {"points": 9.0, "share": 0.5, "blocks": 1.0} for point, _, _ in START_LIMITS}
    points = {"conservative": 0.99, "balanced": 0.8, "aggressive": 0.5}
    known = {"operating_points": points, "operating_points_after_start": points}
    sure = predictor_that_loses(1.0, never=0.7, start_limits=some, **known)
    assert run(tmp_path, sure).depth == 2
    later = run(tmp_path, sure, operating_point="aggressive").stages
    assert [stage.step for stage in later[:2]] == [4, 26] and later[1].depth > 2
    assert run(tmp_path, sure, freeze_threshold=0.6).stages[1].step == 26
    assert run(tmp_path, sure, freeze_threshold=0.6, start_stage=False).stages[0].step < 20
    assert run(tmp_path, sure, operating_point="aggressive", order="independent").depth == 2
    for held in ({"compensate_rate": False}, {}):  # the rate of the rest stays, or rises little
        if not held:
            monkeypatch.setattr(PilotSignals, "rate_factor", lambda self, depth: 1.2)
        assert run(tmp_path, sure, operating_point="aggressive", **held).depth == 2
    policy = make_policy(SmartFRZConfig(operating_point="aggressive"), predictor_that_loses(1.0, **known))
    policy.load_state_dict({"started": True, "raised": True})
    policy.threshold = 0.9
    seen = Observation(30, 40, 2, [True] * 13, LearningRates([1.0] * 41))
    thresholds = [policy.threshold_of(unit, seen) for unit in range(13)]
    assert thresholds == [0.5] * 11 + [0.9] * 2, "the stem and five sixths of twelve blocks"
    policy = make_policy(SmartFRZConfig(), sure)
    assert policy.state_dict() == {"started": False, "raised": False}
    policy.load_state_dict({"started": True, "raised": True})
    assert policy.state_dict() == {"started": True, "raised": True}
    callback = SmartFRZCallback(SmartFRZConfig(activation_cache=False), policy=policy)
    train(tmp_path, [callback], max_steps=20)  # too short for a pilot
    assert policy.state_dict() == {"started": False, "raised": False}, "another run of the same policy"


def test_a_warm_restart_ends_what_a_front_from_the_start_brought(shares):
    """The rate of the rest is that of the schedule again, and so is the threshold."""
    known = {"operating_points_after_start": {"conservative": 0.9, "balanced": 0.6, "aggressive": 0.4}}
    predictor = predictor_that_loses(0.4, never=0.7, **known)
    model = build("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, STEPS // 2)
    config = SmartFRZConfig(activation_cache=False)
    with FreezingRun(model, optimizer, STEPS, config, predictor=predictor, lr_scheduler=schedule) as restarted:
        for batch in DataLoader(Rows(4 * STEPS), batch_size=4):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            restarted.step()
        assert [stage.depth for stage in restarted.ledger.stages] == [3, 0]
        assert restarted.policy.state_dict() == {"started": False, "raised": False}


def test_a_front_with_nothing_to_train_is_none(shares):
    """Freezing it changes nothing, so the rate of the rest and the later thresholds stay."""
    model = build("bert")
    for unit in find_blocks(model).units[:3]:
        for parameter in unit.named_parameters().values():
            parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    config, predictor = SmartFRZConfig(activation_cache=False), predictor_that_loses(0.4)
    with FreezingRun(model, optimizer, STEPS, config, predictor=predictor) as idle:
        for batch in DataLoader(Rows(32), batch_size=4):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            idle.step()
        assert not idle.policy.state_dict()["started"]


def test_steps_that_a_loss_scaler_skips_do_not_count_as_motion():
    """The mean of the rates counts, so one step of four gives the motion that four would."""
    motions = []
    for skipped in (0, 3):
        model = build("bert")
        seen = pilot.Pilot(find_blocks(model), seed=0)
        for step, batch in enumerate(DataLoader(Rows(16), batch_size=4)):
            model(**batch).loss.backward()
            if step < skipped:
                next(model.parameters()).grad.fill_(math.inf)
            seen.before_update()
            for parameter in model.parameters() if step >= skipped else ():
                parameter.data -= 1e-4 * parameter.grad.sign()  # all steps are of one size
            model.zero_grad()
        motions.append(seen.signals(torch.ones(4)).motion[1:-1])
    torch.testing.assert_close(motions[0], motions[1], rtol=0.05, atol=0)
