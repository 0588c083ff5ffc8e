"""The predictor equals its reference in plain loops, knows no scale or order, and is refused when damaged."""

import json

import pytest
import torch
from predictor_reference import predict_reference

from smartfrz_hf import SmartFRZPredictor, SmartFRZPredictorConfig, load_predictor
from smartfrz_hf.predictor import configuration

FORMS = pytest.mark.parametrize("sizes", [{}, {"unit_attention": False}, {"form": "weights"}], ids=str)


def make(**sizes):
    torch.manual_seed(1)
    predictor = SmartFRZPredictor(SmartFRZPredictorConfig(**{"window": 6, "weights_per_unit": 11} | sizes))
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        predictor.offset.fill_(0.5)
        predictor.temperature.fill_(1.5)
        if predictor.config.form == "dynamics":
            predictor.feature_mean.normal_()
            predictor.feature_std.uniform_(0.5, 2)
    return predictor.eval()


def histories(units=5, window=6, weights_per_unit=11, filled=6):
    torch.manual_seed(2)
    start = torch.randn(units, weights_per_unit)
    return {
        "snapshots": start.unsqueeze(1) + torch.randn(units, window, weights_per_unit).mul(0.1).cumsum(1),
        "start": start,
        "mask": torch.arange(window) >= window - filled,
        "spent": torch.linspace(0.1, 0.4, window) ** 1.5,
    }


CONTEXT = torch.rand(5, 4, generator=torch.Generator().manual_seed(3))


def score(predictor, inputs, context=CONTEXT, **more):
    return predictor(*predictor.read(**inputs), context.to(inputs["spent"].dtype), **more)


@pytest.mark.parametrize("filled", [6, 3])
@FORMS
def test_equals_the_reference(sizes, filled):
    predictor, inputs = make(**sizes), histories(filled=filled)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-9)):  # what float32 can hold
        predictor, inputs = (
            predictor.to(dtype),
            inputs | {k: inputs[k].to(dtype) for k in ("snapshots", "start", "spent")},
        )
        output = score(predictor, inputs)
        values = [value.tolist() for value in inputs.values()]
        logits, attentions = predict_reference(predictor, *values, CONTEXT.to(dtype).tolist())
        assert min(map(abs, logits)) > 0.001
        assert output.logits.tolist() == pytest.approx(logits, abs=tolerance)
        for unit in range(5):
            assert output.attentions[unit].tolist() == pytest.approx(attentions[unit], abs=tolerance)


@FORMS
def test_output(sizes):
    inputs = histories(filled=4)
    output = score(make(**sizes), inputs, labels=torch.tensor([0, 1, 0, 1, 1]))
    assert output.loss.dim() == 0 and output.logits.shape == (5,)
    assert torch.equal(output.probabilities, output.logits.sigmoid())
    assert output.attentions.shape == (5, 6)
    torch.testing.assert_close(output.attentions.sum(1), torch.ones(5))
    assert (output.attentions[:, ~inputs["mask"]] == 0).all()


@FORMS
def test_many_stages_at_once_give_what_each_gives(sizes):
    """One attention a unit and stage: a known re-implementation sums the scores over the batch."""
    predictor = make(**sizes)
    stages = [histories(filled=filled) for filled in (3, 6)]
    read = [predictor.read(**stage) for stage in stages]
    features, usable = (torch.stack(parts) for parts in zip(*read, strict=True))
    together = predictor(features, usable, CONTEXT.expand(2, 5, 4)).logits
    for stage, logits in zip(stages, together, strict=True):
        torch.testing.assert_close(score(predictor, stage).logits, logits)


@FORMS
def test_units_that_are_not_active_do_not_matter(sizes):
    predictor, inputs = make(**sizes), histories()
    features, usable = predictor.read(**inputs)
    alone = predictor(features[2:], usable[2:], CONTEXT[2:]).logits
    active = torch.arange(5) >= 2
    together = predictor(features, usable, CONTEXT, active, labels=torch.ones(5))
    torch.testing.assert_close(together.logits[2:], alone)
    torch.testing.assert_close(
        together.loss, predictor(features[2:], usable[2:], CONTEXT[2:], labels=torch.ones(3)).loss
    )


def test_units_attend_to_each_other_only_where_they_are_to():
    inputs = histories()
    for unit_attention in (True, False):
        predictor = make(unit_attention=unit_attention)
        features, usable = predictor.read(**inputs)
        before = predictor(features, usable, CONTEXT).logits
        features[4] = 0
        after = predictor(features, usable, CONTEXT).logits
        assert torch.allclose(before[:4], after[:4]) is not unit_attention


def test_dynamics_know_no_order_scale_or_number_of_samples():
    predictor, inputs = make(), histories()
    logits = score(predictor, inputs).logits
    order = torch.randperm(11)

    def change(function):
        return inputs | {key: function(inputs[key]) for key in ("snapshots", "start")}

    torch.testing.assert_close(score(predictor, change(lambda x: x[..., order])).logits, logits)
    torch.testing.assert_close(score(predictor, change(lambda x: x * 1000)).logits, logits)
    torch.testing.assert_close(score(predictor, change(lambda x: torch.cat([x, x], -1))).logits, logits)


def test_what_the_mask_hides_does_not_matter():
    for form in ("dynamics", "weights"):
        predictor, inputs = make(form=form), histories(filled=4)
        logits = score(predictor, inputs).logits
        noisy = inputs["snapshots"].masked_fill(~inputs["mask"].view(1, -1, 1), 1e4)
        torch.testing.assert_close(score(predictor, inputs | {"snapshots": noisy}).logits, logits)


def test_weights_that_stand_still_give_a_finite_answer():
    inputs = histories()
    still = inputs["start"].unsqueeze(1).expand(-1, 6, -1)
    for snapshots, start in ((still, inputs["start"]), (still * 0, inputs["start"] * 0)):
        for spent in (inputs["spent"], inputs["spent"] * 0):
            output = score(make(), inputs | {"snapshots": snapshots, "start": start, "spent": spent})
            assert torch.isfinite(output.logits).all()


def test_save_and_load(tmp_path):
    for form in ("dynamics", "weights"):
        predictor, inputs = make(form=form), histories()
        predictor.save_pretrained(tmp_path / form)
        loaded = load_predictor(tmp_path / form)
        assert loaded.config.form == form and not loaded.training
        assert torch.equal(score(loaded, inputs).logits, score(predictor, inputs).logits)
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
    with pytest.raises(ValueError, match="a probability for each of conservative, balanced, aggressive"):
        SmartFRZPredictorConfig(operating_points={"balanced": 0.5})
