"""What freezes from the start of a run: by the start predictor's points, or by the compute that is to be saved."""

import pytest
import torch
from architectures import build
from training import Rows, predictor_that_says, train

from smartfrz_hf import SmartFRZCallback, SmartFRZConfig, SmartFRZPredictor, SmartFRZPredictorConfig, load_predictor
from smartfrz_hf.predictor import StartPredictor, start_features
from smartfrz_hf.signals.pilot import PilotSignals

STEPS = 40


def predictor_that_loses(points, never=0.1, **config):
    """Freezing each further unit costs so many points, whatever the pilot shows; nothing freezes later."""
    predictor = predictor_that_says(never, start_size=4, **config)
    with torch.no_grad():
        for parameter in predictor.start.parameters():
            parameter.zero_()
        predictor.start.head[-1].bias.fill_(float(torch.tensor(points).expm1().log()))  # the inverse of softplus
    return predictor


def run(folder, predictor, **config):
    callback = SmartFRZCallback(SmartFRZConfig(activation_cache=False, **config), predictor)
    train(folder, [callback], dataset=Rows(4 * STEPS), max_steps=STEPS, num_train_epochs=1)
    return callback.ledger


@pytest.mark.parametrize(("point", "depth"), [("conservative", 0), ("balanced", 1), ("aggressive", 4)])
def test_the_deepest_front_within_the_tolerance(tmp_path, monkeypatch, point, depth):
    monkeypatch.setattr(PilotSignals, "agreement", 0.1)  # of a random model in four steps it has any sign
    ledger = run(tmp_path, predictor_that_loses(0.2), operating_point=point)
    assert ledger.depth == depth
    if depth:
        (stage,) = ledger.stages
        assert stage.step == 4 and f"and to lose {0.2 * depth:.1f} points" in stage.reason
        assert "the rest trains at" in stage.reason


def test_nothing_freezes_where_the_loss_does_not_fall(tmp_path, monkeypatch):
    monkeypatch.setattr(PilotSignals, "agreement", -0.1)
    assert run(tmp_path, predictor_that_loses(0.01), operating_point="aggressive").depth == 0


def test_it_can_be_turned_off(tmp_path):
    assert run(tmp_path, predictor_that_loses(0.2), start_stage=False).depth == 0
    assert run(tmp_path, predictor_that_says(0.1)).depth == 0, "this predictor knows no start stage"


@pytest.mark.parametrize("target", [0.2, 0.4])
def test_a_target_is_met_by_the_fewest_units(tmp_path, target):
    """Also with a predictor that knows no start stage."""
    ledger = run(tmp_path, predictor_that_says(0.1), target_saving=target)
    assert target <= ledger.compute_saved < target + 0.2
    shallower = SmartFRZCallback(SmartFRZConfig(policy="static", static_depth=float(ledger.depth - 1)))
    train(tmp_path, [shallower], dataset=Rows(4 * STEPS), max_steps=STEPS, num_train_epochs=1)
    assert shallower.ledger.compute_saved * 36 / STEPS < target


def test_a_target_needs_our_policy():
    with pytest.raises(ValueError, match='`target_saving` needs the policy "smartfrz"'):
        SmartFRZConfig(policy="static", target_saving=0.3)


def test_weights_that_are_not_finite_freeze_nothing(tmp_path):
    model = build("bert")
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    callback = SmartFRZCallback(SmartFRZConfig(activation_cache=False), predictor_that_loses(0.01))
    train(tmp_path, [callback], model=model, dataset=Rows(4 * STEPS), max_steps=STEPS)
    assert callback.ledger.depth == 0


def test_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    tolerances = {"conservative": 0.0, "balanced": 0.5, "aggressive": 2.0}
    config = SmartFRZPredictorConfig(window=4, weights_per_unit=32, start_size=8, start_tolerances=tolerances)
    predictor = SmartFRZPredictor(config).eval()
    predictor.save_pretrained(tmp_path)
    loaded = load_predictor(tmp_path)
    features = torch.randn(5, 9)
    assert torch.equal(loaded.start(features), predictor.start(features))
    assert loaded.config.start_tolerances == tolerances
    with pytest.raises(ValueError, match="start_tolerances"):
        SmartFRZPredictorConfig(start_tolerances={"balanced": 1.0})


def test_deeper_costs_more_and_padding_changes_nothing():
    torch.manual_seed(0)
    model = StartPredictor(8)
    features = torch.randn(2, 6, 9)
    active = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    lost = model(features, active)
    assert bool((lost.diff(dim=-1) > 0).all())
    torch.testing.assert_close(lost[1, :4], model(features[1, :4]))


def test_features_against_worked_numbers():
    signals = PilotSignals(
        steps=5,
        parameters=torch.tensor([100.0, 300.0, 600.0]),
        signal_to_noise=torch.tensor([0.5, 0.099, 1.0]),
        gradient=torch.tensor([0.01, 0.02, 1.0]),
        loss_change=torch.tensor([-1e-5, 1e-5, -1e-5]),
        weight=torch.ones(3),
        displacement=torch.tensor([0.001, 0.001, 1.0]),
    )
    torch.testing.assert_close(signals.reach, torch.tensor([0.001, 0.006]).double())
    contributions = torch.tensor([0.0011, 0.0006]).double()  # the second unit has raised the loss
    torch.testing.assert_close(signals.contributions, contributions)
    assert signals.agreement == pytest.approx((0.001 - 0.003) / 0.007)
    assert signals.rate_factor(0) == 1.0 and signals.rate_factor(1) == pytest.approx(17 / 6)
    assert signals.rate_factor(2) == 4.0
    features = start_features(signals, total_steps=1000, spent=0.01)
    shares, left = torch.tensor([11 / 17, 6 / 17]), torch.tensor([900.0, 600.0])
    wanted = [
        torch.tensor([0.5, 1.0]),
        (shares + 1e-4).log10(),
        (shares.cumsum(0) + 1e-3).log10(),
        torch.tensor([0.501, 0.1]).log10(),
        (left + 1).log10(),
        (left / 1000).log10(),
        torch.full((2,), 3.0),
        torch.full((2,), 0.171).log10(),
        torch.full((2,), -2 / 7),
    ]
    torch.testing.assert_close(features, torch.stack(wanted, dim=1))
