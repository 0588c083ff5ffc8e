"""The predictor equals its reference in plain loops, knows no scale or order, and is refused when damaged."""

import json

import pytest
import torch

from smartfrz_hf import SmartFRZPredictor, SmartFRZPredictorConfig, load_predictor
from smartfrz_hf.predictor import configuration
from smartfrz_hf.predictor.reference import predict_reference


def make(form="dynamics", **sizes):
    torch.manual_seed(1)
    predictor = SmartFRZPredictor(SmartFRZPredictorConfig(form=form, **{"window": 6, "samples": 11} | sizes))
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        if form == "dynamics":
            predictor.feature_mean.normal_()
            predictor.feature_std.uniform_(0.5, 2)
    return predictor.eval()


def histories(units=5, window=6, samples=11):
    torch.manual_seed(2)
    start = torch.randn(units, samples)
    snapshots = start.unsqueeze(1) + torch.randn(units, window, samples).mul(0.1).cumsum(1)
    mask = torch.ones(units, window, dtype=torch.bool)
    mask[1, :3], mask[2, :4] = False, False
    return {"snapshots": snapshots, "start": start, "mask": mask, "context": torch.rand(units, 4)}


@pytest.mark.parametrize("form", ["dynamics", "weights"])
def test_equals_the_reference(form):
    predictor, inputs = make(form), histories()
    output = predictor(**inputs)
    for unit in range(5):
        logit, attention = predict_reference(predictor, *(value[unit].tolist() for value in inputs.values()))
        assert abs(logit) > 0.01
        assert output.logits[unit].item() == pytest.approx(logit, abs=1e-5)  # what float32 can hold
        assert output.attentions[unit].tolist() == pytest.approx(attention, abs=1e-5)
    double = predictor.double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    output = double(**inputs)
    for unit in range(5):
        logit, attention = predict_reference(double, *(value[unit].tolist() for value in inputs.values()))
        assert output.logits[unit].item() == pytest.approx(logit, abs=1e-9)
        assert output.attentions[unit].tolist() == pytest.approx(attention, abs=1e-9)


@pytest.mark.parametrize("form", ["dynamics", "weights"])
def test_output(form):
    inputs = histories()
    output = make(form)(**inputs, labels=torch.tensor([0, 1, 0, 1, 1]))
    assert output.loss.dim() == 0 and output.logits.shape == (5,)
    assert torch.equal(output.probabilities, output.logits.sigmoid())
    assert output.attentions.shape == (5, 6)
    torch.testing.assert_close(output.attentions.sum(1), torch.ones(5))
    assert (output.attentions[~inputs["mask"]] == 0).all()


@pytest.mark.parametrize("form", ["dynamics", "weights"])
def test_units_do_not_mix(form):
    """One attention a unit: a known re-implementation sums the scores over the batch."""
    predictor, inputs = make(form), histories()
    together = predictor(**inputs).logits
    for unit in range(5):
        alone = predictor(**{key: value[unit : unit + 1] for key, value in inputs.items()}).logits
        torch.testing.assert_close(alone, together[unit : unit + 1])


def test_dynamics_know_no_order_scale_or_number_of_samples():
    predictor, inputs = make(), histories()
    logits = predictor(**inputs).logits
    order = torch.randperm(11)

    def change(function):
        return inputs | {key: function(inputs[key]) for key in ("snapshots", "start")}

    torch.testing.assert_close(predictor(**change(lambda x: x[..., order])).logits, logits)
    torch.testing.assert_close(predictor(**change(lambda x: x * 1000)).logits, logits)
    torch.testing.assert_close(predictor(**change(lambda x: torch.cat([x, x], -1))).logits, logits)


def test_what_the_mask_hides_does_not_matter():
    for form in ("dynamics", "weights"):
        predictor, inputs = make(form), histories()
        logits = predictor(**inputs).logits
        noisy = inputs["snapshots"].masked_fill(~inputs["mask"].unsqueeze(-1), 1e4)
        torch.testing.assert_close(predictor(**inputs | {"snapshots": noisy}).logits, logits)


def test_weights_that_stand_still_give_a_finite_answer():
    inputs = histories()
    still = inputs["start"].unsqueeze(1).expand(-1, 6, -1)
    for snapshots, start in ((still, inputs["start"]), (still * 0, inputs["start"] * 0)):
        output = make()(**inputs | {"snapshots": snapshots, "start": start})
        assert torch.isfinite(output.logits).all()


def test_save_and_load(tmp_path):
    for form in ("dynamics", "weights"):
        predictor, inputs = make(form), histories()
        predictor.save_pretrained(tmp_path / form)
        loaded = load_predictor(tmp_path / form)
        assert loaded.config.form == form and not loaded.training
        assert torch.equal(loaded(**inputs).logits, predictor(**inputs).logits)
        assert {file.name for file in (tmp_path / form).iterdir()} == {"config.json", "model.safetensors"}


def test_default_comes_with_the_package(monkeypatch):
    said = []
    monkeypatch.setattr(configuration.logger, "warning", said.append)
    load_predictor()
    assert not said
    SmartFRZPredictorConfig(of_the_future=1)
    assert len(said) == 1 and "of_the_future" in said[0]
    predictor = SmartFRZPredictor.from_default()
    assert predictor.num_parameters() < 1_000_000
    assert isinstance(predictor.config, SmartFRZPredictorConfig)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_file_is_named(tmp_path, file):
    make().save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(OSError, match=f"lacks {file}"):
        load_predictor(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(tmp_path, keep):
    make().save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(OSError, match=r"is damaged and cannot be read"):
        load_predictor(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"form": "weights"}))
    with pytest.raises(OSError, match=r"damaged|not whole"):
        load_predictor(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_size": 99}))
    with pytest.raises(OSError, match=r"damaged|not whole"):
        load_predictor(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError):
        load_predictor(tmp_path)


def test_pickled_weights_are_never_read(tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="lacks model.safetensors"):
        load_predictor(tmp_path)


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match=r"'dynamics', 'weights'"):
        SmartFRZPredictorConfig(form="magic")
    with pytest.raises(ValueError, match="whole number"):
        SmartFRZPredictorConfig(window=0)
