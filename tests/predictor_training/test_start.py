"""The start predictor: what it learns from, and how it is judged."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from smartfrz_hf import load_predictor
from smartfrz_hf.cli import app
from smartfrz_hf.predictor import default_predictor_path
from smartfrz_hf.predictor_training.start import (
    choose_limits,
    evaluate_start,
    fit_start,
    fixed,
    judge,
)
from smartfrz_hf.predictor_training.start_pairs import read_pairs

UNITS = 7


def result(model, task, frozen, points, loss, share):
    """As the harvest writes it: each block contributes so much more than the one in front of it."""
    changes = [0.0, *(-(share ** (UNITS - 1 - unit)) for unit in range(1, UNITS))]
    moment = {
        "step": 5,
        "sampled_gradient_square_norm": [1.0] * UNITS,
        "sampled_mean_gradient_square_norm": [0.5] * UNITS,
        "sampled_loss_change": changes,
        "sampled_displacement": [1e-3] * UNITS,
        "head_loss_change": -0.1,
    }
    signals = {
        "classes": 2,
        "unit_names": ["stem", *(f"block.{unit}" for unit in range(1, UNITS))],
        "unit_parameters": [1000] * UNITS,
        "head_parameters": 100,
        "moments": {"0.05": moment},
    }
    return {
        "pair": {"name": f"{model}.{task}", "model": model, "task": task, "warmup": 0.1},
        "frozen_blocks": frozen,
        "steps": 100,
        "evaluations": [{"points": points, "loss": loss}],
        "signals": signals if frozen is None else None,
    }


@pytest.fixture
def results(tmp_path):
    """In some models blocks are alike, and freezing costs; in the others the last ones do it all, and it is free."""
    folder = tmp_path / "results"
    folder.mkdir()
    for model, share, cost in [
        ("even-1", 0.9, 2.0),
        ("even-2", 0.85, 2.0),
        ("late-1", 0.2, 0.0),
        ("wide-1", 0.25, 0.0),
    ]:
        for task in ("a", "b"):
            for frozen in (None, 1, 3, 5):
                lost = cost * (frozen or 0)
                content = result(model, task, frozen, 90 - lost, 0.5 + lost / 40, share)
                (folder / f"{model}.{task}.{frozen}.json").write_text(json.dumps(content))
    return folder


def test_what_is_read(results):
    pairs = read_pairs(results)
    assert len(pairs) == 8 and {pair.family for pair in pairs} == {"even", "late", "wide"}
    pair = next(pair for pair in pairs if pair.name == "even-1.a")
    assert pair.depths.tolist() == [2, 4, 6] and pair.pilot.agreement > 0
    torch.testing.assert_close(pair.points_lost, torch.tensor([2.0, 6.0, 10.0]))
    torch.testing.assert_close(pair.saved, torch.tensor([0.0, *(2 / 3 * block / 6 for block in range(7))]))
    with pytest.raises(FileNotFoundError, match="holds no pair"):
        read_pairs(results.parent)


def test_it_learns_where_freezing_costs(results):
    pairs = read_pairs(results)
    model = fit_start(pairs)
    lost = {pair.name: model.predict(pair.pilot)[pair.depths - 1].tolist() for pair in pairs}
    assert max(lost["late-1.a"][0], lost["wide-1.a"][0]) < 0.5 * min(lost["even-1.a"][0], lost["even-2.a"][0])
    assert all(values == sorted(values) for values in lost.values())


def test_judging(results):
    pairs = read_pairs(results)
    found = judge(fixed(0.5), pairs, 0.0)
    assert found["saved"] == pytest.approx(2 / 3 * 3 / 6)
    assert found["points_lost"] == pytest.approx(3.0) and found["worst"] == pytest.approx(6.0)
    assert judge(fixed(0.5), pairs, 0.0, share=0.0)["saved"] == 0.0
    said = {pair.name: torch.full((UNITS,), 1.0 if pair.name.startswith("even") else 0.2) for pair in pairs}
    assert judge(fixed(0.5), pairs, 0.0, blocks=0.34)["saved"] == pytest.approx(2 / 3 / 6), (
        "depths 1, 3 and 5 were run"
    )
    limits = choose_limits([lambda pair: said[pair.name]], pairs)
    assert limits["conservative"]["points"] == 0.95 and limits["balanced"]["blocks"] == 0.34


@pytest.mark.slow
def test_held_out_tasks_are_predicted(results):
    evaluation = evaluate_start(read_pairs(results))
    assert evaluation["pairs"] == 8 and evaluation["runs"] == 24
    found = evaluation["task"]["operating points"]["balanced"]
    assert found["points_lost"] <= 0.1 and evaluation["limits"]["balanced"]["points"] >= 0
    assert evaluation["family"]["fixed 0.50"]["-"]["points_lost"] == pytest.approx(3.0)


@pytest.mark.slow
def test_the_command_adds_it_to_a_predictor(results, tmp_path):
    folder = shutil.copytree(default_predictor_path(), tmp_path / "predictor")
    before = load_predictor(folder)
    out = tmp_path / "evaluation" / "start.json"
    done = CliRunner().invoke(app, ["fit-start", str(results), str(folder), "--out", str(out)])
    assert done.exit_code == 0, done.output
    after = load_predictor(folder)
    assert after.start is not None and after.config.start_limits == json.loads(out.read_text())["limits"]
    for name, value in before.state_dict().items():
        assert name.startswith("start.") or torch.equal(value, after.state_dict()[name])
    failed = CliRunner().invoke(app, ["fit-start", str(tmp_path), str(folder), "--out", str(out)])
    assert failed.exit_code != 0 and "holds no pair" in failed.output
