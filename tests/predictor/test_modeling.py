"""The predictor equals its reference in plain loops, and does not depend on scale or order."""

import json
import subprocess
import sys

import pytest
import torch
from predictor_reference import predict_reference

from smartfrz_hf import SmartFRZPredictor, SmartFRZPredictorConfig, load_predictor
from smartfrz_hf.predictor import build_inputs, configuration
from smartfrz_hf.predictor.hub import DEFAULT

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


def history(units=5, window=6, weights_per_unit=11, filled=6):
    """What was recorded of a run: the last `filled` snapshots, the one at the start, and the learning rates spent."""
    torch.manual_seed(2)
    start = torch.randn(units, weights_per_unit)
    snapshots = start.unsqueeze(1) + torch.randn(units, window, weights_per_unit).mul(0.1).cumsum(1)
    spent = torch.linspace(0.1, 0.4, window) ** 1.5
    return {"snapshots": snapshots[:, window - filled :], "start": start, "spent": spent[window - filled :]}


CONTEXT = torch.rand(5, 4, generator=torch.Generator().manual_seed(3))


def inputs_of(predictor, recorded):
    inputs = build_inputs(predictor.config, **recorded, relative_rate=torch.tensor(0.5), progress=0.3)
    return inputs._replace(context=CONTEXT.to(recorded["spent"]))


def score(predictor, recorded, **more):
    return predictor(*inputs_of(predictor, recorded), **more)


def padded(values, dim, window=6):
    shape = list(values.shape)
    shape[dim] = window - shape[dim]
    return torch.cat([values.new_zeros(shape), values], dim).tolist()


@pytest.mark.parametrize("filled", [6, 3])
@FORMS
def test_equals_the_reference(sizes, filled):
    predictor, recorded = make(**sizes), history(filled=filled)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-9)):  # the precision of the type
        predictor, recorded = predictor.to(dtype), {key: value.to(dtype) for key, value in recorded.items()}
        output = score(predictor, recorded)
        logits, attentions = predict_reference(
            predictor,
            padded(recorded["snapshots"], 1),
            recorded["start"].tolist(),
            [position >= 6 - filled for position in range(6)],
            padded(recorded["spent"], 0),
            CONTEXT.to(dtype).tolist(),
        )
        assert min(map(abs, logits)) > 0.001
        assert output.logits.tolist() == pytest.approx(logits, abs=tolerance)
        for unit in range(5):
            assert output.attentions[unit].tolist() == pytest.approx(attentions[unit], abs=tolerance)


@FORMS
def test_output(sizes):
    output = score(make(**sizes), history(filled=4), labels=torch.tensor([0, 1, 0, 1, 1]))
    assert output.loss.dim() == 0
    assert output.logits.shape == (5,)
    assert torch.equal(output.probabilities, output.logits.sigmoid())
    assert output.attentions.shape == (5, 6)
    torch.testing.assert_close(output.attentions.sum(1), torch.ones(5))
    assert (output.attentions[:, :2] == 0).all()


@FORMS
def test_a_batch_of_stages_gives_what_each_stage_gives(sizes):
    """A known re-implementation sums the scores over the batch."""
    predictor = make(**sizes)
    stages = [history(filled=filled) for filled in (3, 6)]
    batch = [torch.stack(parts) for parts in zip(*(inputs_of(predictor, stage) for stage in stages), strict=True)]
    for stage, logits in zip(stages, predictor(*batch).logits, strict=True):
        torch.testing.assert_close(score(predictor, stage).logits, logits)


@FORMS
def test_inactive_units_do_not_matter(sizes):
    predictor = make(**sizes)
    inputs = inputs_of(predictor, history())
    behind = [part[2:] for part in inputs]
    output = predictor(*inputs, active=torch.arange(5) >= 2, labels=torch.ones(5))
    torch.testing.assert_close(output.logits[2:], predictor(*behind).logits)
    torch.testing.assert_close(output.loss, predictor(*behind, labels=torch.ones(3)).loss)


@pytest.mark.parametrize("form", ["dynamics", "weights"])
def test_inputs_of_active_units_are_those_in_the_whole_model(form):
    config = SmartFRZPredictorConfig(form=form, window=6, weights_per_unit=11, front_probe=form == "dynamics")
    recorded, now = history(), {"relative_rate": torch.tensor(0.5), "progress": 0.3}
    now["probe_changes"] = torch.rand(5, 4, 2)
    whole = build_inputs(config, **recorded, **now)
    active = {"snapshots": recorded["snapshots"][2:], "start": recorded["start"][2:], "spent": recorded["spent"]}
    for part, of_whole in zip(build_inputs(config, **active, **now, depth=2), whole, strict=True):
        torch.testing.assert_close(part, of_whole[2:])
    assert whole.features.shape == (5, 6, config.input_size)
    if form == "dynamics":
        assert whole.context.shape == (5, config.context_size)
        unknown = build_inputs(config, **recorded, **now | {"probe_changes": None}).context
        assert unknown[:, :4].equal(whole.context[:, :4])
        assert (unknown[:, 4:] == 0).all()


def test_units_attend_to_each_other_if_asked_to():
    for unit_attention in (True, False):
        predictor = make(unit_attention=unit_attention)
        inputs = inputs_of(predictor, history())
        before = predictor(*inputs).logits
        inputs.features[4] = 0
        after = predictor(*inputs).logits
        assert torch.allclose(before[:4], after[:4]) is not unit_attention


def test_dynamics_do_not_depend_on_order_scale_or_number_of_weights():
    predictor, recorded = make(), history()
    logits = score(predictor, recorded).logits
    order = torch.randperm(11)

    def change(function):
        return recorded | {key: function(recorded[key]) for key in ("snapshots", "start")}

    torch.testing.assert_close(score(predictor, change(lambda x: x[..., order])).logits, logits)
    torch.testing.assert_close(score(predictor, change(lambda x: x * 1000)).logits, logits)
    torch.testing.assert_close(score(predictor, change(lambda x: torch.cat([x, x], -1))).logits, logits)


def test_weights_that_do_not_move_give_a_finite_answer():
    recorded = history()
    still = recorded["start"].unsqueeze(1).expand(-1, 6, -1)
    for snapshots, start in ((still, recorded["start"]), (still * 0, recorded["start"] * 0)):
        for spent in (recorded["spent"], recorded["spent"] * 0):
            output = score(make(), {"snapshots": snapshots, "start": start, "spent": spent})
            assert torch.isfinite(output.logits).all()


def test_save_and_load(tmp_path):
    for form in ("dynamics", "weights"):
        predictor, recorded = make(form=form), history()
        predictor.save_pretrained(tmp_path / form)
        random_state = torch.get_rng_state()
        loaded = load_predictor(tmp_path / form)
        assert torch.get_rng_state().equal(random_state)
        assert loaded.config.form == form
        assert not loaded.training
        assert torch.equal(score(loaded, recorded).logits, score(predictor, recorded).logits)
        assert {file.name for file in (tmp_path / form).iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.slow
def test_making_a_predictor_prints_nothing():
    code = (
        "from smartfrz_hf import load_predictor, SmartFRZPredictor; load_predictor(); SmartFRZPredictor.from_default()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout + done.stderr == ""


def test_default_predictor_by_its_name(tmp_path, monkeypatch):
    (tmp_path / DEFAULT).mkdir()
    monkeypatch.chdir(tmp_path)
    by_name, default = load_predictor(DEFAULT), load_predictor()
    for value, wanted in zip(by_name.parameters(), default.parameters(), strict=True):
        assert value.equal(wanted)
    with pytest.raises(OSError, match=r"lacks config.json and model.safetensors"):
        load_predictor(f"./{DEFAULT}")


@pytest.mark.parametrize(
    ("name", "remedy"), [("me/mine", "connect to the Hub.*local folder"), ("./out/mine", "give an existing folder")]
)
def test_a_predictor_that_is_not_found_offline(name, remedy):
    with pytest.raises(OSError, match=f"'{name}' is neither a folder nor available from the Hub: .*{remedy}"):
        load_predictor(name)


def test_default_comes_with_the_package(monkeypatch):
    warnings = []
    monkeypatch.setattr(configuration.logger, "warning", warnings.append)
    load_predictor()
    assert not warnings
    SmartFRZPredictorConfig(of_the_future=1)
    assert len(warnings) == 1
    assert "of_the_future" in warnings[0]
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


def test_weights_of_another_configuration_are_refused(tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"form": "weights"}))
    with pytest.raises(OSError, match="damaged"):
        load_predictor(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_size": 99}))
    with pytest.raises(OSError, match="damaged"):
        load_predictor(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match="damaged and cannot be read"):
        load_predictor(tmp_path)


def test_pickled_weights_are_never_read(tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"lacks model\.safetensors"):
        load_predictor(tmp_path)


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match=r"'dynamics', 'weights'"):
        SmartFRZPredictorConfig(form="magic")
    with pytest.raises(ValueError, match="whole number"):
        SmartFRZPredictorConfig(window=0)
    with pytest.raises(ValueError, match="a probability for each of conservative, balanced, aggressive"):
        SmartFRZPredictorConfig(operating_points={"balanced": 0.5})
