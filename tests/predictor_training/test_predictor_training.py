"""All steps of training a predictor, on tiny models and local files."""

import copy
import json
import multiprocessing
import re
import threading
import time
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, build
from datasets import Dataset, Features, Image, Value, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from training import Watcher, train
from typer.testing import CliRunner
from versions import VIT_BLOCKS

from smartfrz_hf import SmartFRZCallback, SmartFRZConfig, SmartFRZPredictor, find_blocks, load_predictor
from smartfrz_hf.cli import app
from smartfrz_hf.policies import SmartFRZPolicy
from smartfrz_hf.predictor import SmartFRZPredictorConfig
from smartfrz_hf.predictor.configuration import CONTEXT_SIZE
from smartfrz_hf.predictor_training.card import make_card
from smartfrz_hf.predictor_training.cross_validation import PREDICTOR, REGRESSION, REGRESSION_WITHOUT_PROBE, HeldOut
from smartfrz_hf.predictor_training.dataset import INPUTS, FreezingStages
from smartfrz_hf.predictor_training.harvest import Progress, harvest, record_run
from smartfrz_hf.predictor_training.labels import LABELS, at_probes, rewind_cost, settled, similar
from smartfrz_hf.predictor_training.metrics import frozen_share, operating_points, path_cost, summarize
from smartfrz_hf.predictor_training.recording import RecordingCallback, linear_cka, pool
from smartfrz_hf.predictor_training.rewind import Rewinder
from smartfrz_hf.predictor_training.specs import RunSpec, read_specs
from smartfrz_hf.predictor_training.table import PROVENANCE, RecordedRun, read_runs, write_run
from smartfrz_hf.signals.probe import shift, spread_tokens


def test_cka_by_its_definition():
    torch.manual_seed(0)
    x, y = torch.randn(40, 7).double(), torch.randn(40, 5).double()
    xc, yc = x - x.mean(0), y - y.mean(0)
    by_features = (yc.T @ xc).norm() ** 2 / ((xc.T @ xc).norm() * (yc.T @ yc).norm())
    assert linear_cka(x, y) == pytest.approx(float(by_features), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_cka_does_not_depend_on_rotation_scale_or_shift(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(20, 6, generator=generator), torch.randn(20, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    assert linear_cka(x, x @ rotation * scale + 3) == pytest.approx(1, abs=1e-4)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), abs=1e-9)
    assert 0 <= linear_cka(x, y) <= 1


def test_cka_of_constants():
    constant, x = torch.ones(5, 3), torch.randn(5, 3)
    assert linear_cka(constant, constant) == 1 and linear_cka(constant, x) == 0


def test_settled_units_remain_so():
    cka = torch.tensor([[1.0, 0.5], [0.9, 0.99], [0.995, 0.999], [1.0, 1.0]])
    assert settled(cka, 0.99, 0).tolist() == [[False, False], [False, True], [True, True], [True, True]]


def test_settled_is_relative_to_the_change_over_the_run():
    cka = torch.tensor([[0.98, 0.2, 0.9999], [0.99, 0.9, 0.9998], [0.998, 0.93, 0.9999], [1.0, 1.0, 1.0]])
    assert settled(cka, 0.9995, 0.1).int().T.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]


def test_spread_tokens_are_those_of_the_row_wherever_its_padding_is():
    hidden = torch.arange(12.0).reshape(2, 6, 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    assert spread_tokens(hidden, mask).squeeze(-1).tolist() == [3, 5, 6, 7]
    assert spread_tokens(torch.ones(2, 3, 4, 4)).shape == (4, 3)


def test_pool_ignores_padding():
    hidden = torch.arange(12.0).reshape(1, 4, 3)
    assert pool(hidden, torch.tensor([[1, 1, 0, 0]])).tolist() == [[1.5, 2.5, 3.5]]
    assert pool(torch.ones(2, 3, 4, 4)).shape == (2, 3)


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "swin"])
def test_recording_does_not_change_the_run(tmp_path, name):
    data = None
    if name == "gpt2":
        from training import Rows

        data = Rows()
        for row in data.rows:
            row["labels"] = row["input_ids"]
    batch = ARCHITECTURES[name].batch(build(name))
    recorder = RecordingCallback([batch], weights_per_unit=64, probes=10, rewinds=5)
    plain, recorded = Watcher(), Watcher()
    train(tmp_path, [plain], build(name), dataset=data)
    train(tmp_path, [recorder, recorded], build(name), dataset=data)
    for a, b in zip(plain.weights, recorded.weights, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    result = recorder.result()
    units = ARCHITECTURES[name].count + 1
    assert result["weights"].shape == (21, units, 64) and result["steps"].tolist() == list(range(21))
    assert result["probe_steps"].tolist() == list(range(0, 21, 2)) and result["cka"].shape == (11, units)
    torch.testing.assert_close(result["cka"][-1], torch.ones(units))
    assert result["cka"][0].min() < result["cka"][-2].min() <= 1
    assert result["learning_rates"].max() == result["learning_rates"][2]
    assert result["rewind_steps"].tolist() == [0, 4, 8, 12, 16] and result["rewind_losses"].shape == (5, units)
    start, end = result["rewind_range"].tolist()
    assert start == pytest.approx(result["probe_losses"][0]) and end == pytest.approx(result["probe_losses"][-1])
    assert (result["rewind_losses"] - end).abs().max() > 0
    assert result["token_cka"].shape == result["self_cka"].shape == result["gradient_norms"].shape == (11, units)
    torch.testing.assert_close(result["token_cka"][-1], torch.ones(units))
    assert result["self_cka"][0].min() > 0.999 and result["self_cka"][5].min() < 0.999
    assert result["gradient_norms"][0].max() == 0 and result["gradient_norms"][1:].min() > 0


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_rewinding_resets_the_front_and_then_restores_the_model(name):
    model = build(name).eval()
    batch, stack = ARCHITECTURES[name].batch(model), find_blocks(model)
    first_rows = {key: value[:1] for key, value in batch.items()}
    loss = lambda: sum(model(**rows).loss.item() for rows in (batch, first_rows))  # noqa: E731
    first = copy.deepcopy(model.state_dict())
    rewinder = Rewinder(stack)
    rewinder.keep()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        rewinder.keep()
        last, end = copy.deepcopy(model.state_dict()), loss()
        losses = torch.tensor(rewinder.evaluate(loss), dtype=torch.float64)
        assert losses.shape == (2, len(stack))
        assert losses[1].tolist() == [end] * len(stack), "reset to what it is"
        assert all(torch.equal(value, last[key]) for key, value in model.state_dict().items())
        for depth in range(1, len(stack) + 1):
            inside = {id(p) for unit in stack.units[:depth] for p in unit.named_parameters().values()}
            front = {
                key for key, p in model.named_parameters(remove_duplicate=False) if id(p) in inside
            }  # and tied ones
            model.load_state_dict({key: first[key] if key in front else value for key, value in last.items()})
            assert loss() == pytest.approx(losses[0, depth - 1].item(), rel=1e-6)


def test_labels_of_similarity_and_cost():
    cka = torch.tensor([[0.5, 0.99], [0.99, 0.9], [0.97, 0.99], [1.0, 1.0]])
    assert similar(cka, 0.98).int().T.tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert rewind_cost(torch.tensor([[2.0, 1.5], [1.0, 1.25]]), 3.0, 1.0).tolist() == [[0.5, 0.25], [0.0, 0.125]]


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    """Two tiny families, trained from scratch on images in a local parquet file through the command line."""
    folder = tmp_path_factory.mktemp("harvest")
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 255, (96, 32, 32, 3), dtype=np.uint8)
    rows = Dataset.from_dict({"img": list(pictures), "label": [int(p.mean() > 127) for p in pictures]})
    rows = Dataset.from_dict(
        {"img": [{"bytes": _png(p), "path": None} for p in pictures], "label": rows["label"]},
        features=Features({"img": Image(), "label": Value("int64")}),
    )
    (folder / "data" / "cifar10").mkdir(parents=True)
    rows.to_parquet(folder / "data" / "cifar10" / "train.parquet")
    rows.to_parquet(folder / "data" / "cifar10" / "test.parquet")
    vit = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    common = {"data": "cifar10", "from_scratch": True, "train_rows": 64, "epochs": 10, "batch_size": 16}
    specs = [
        {"name": "vit-0", "model": "vit", "config": vit | {"image_size": 32, "patch_size": 8}, **common},
        {"name": "resnet-0", "model": "resnet", "config": resnet, **common},
        {"name": "broken", "model": "resnet", "config": {"layer_type": "nonsense"}, **common},
    ]
    (folder / "runs.json").write_text(json.dumps([s | {"learning_rate": 3e-3} for s in specs]))
    words = ["harvest", "runs.json", "--out", "out", "--data-dir", "data", "--processes", "2"]
    words = [
        word if word.startswith("--") or "." not in word and word not in ("out", "data") else str(folder / word)
        for word in words
    ]
    return folder, words, CliRunner().invoke(app, words)


def _png(pixels):
    import io

    from PIL import Image as Pillow

    buffer = io.BytesIO()
    Pillow.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_failed_run_does_not_stop_the_others(harvested):
    folder, _, result = harvested
    assert result.exit_code == 1
    assert "failed: broken: " in result.output and "nonsense" in result.output
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["resnet-0.parquet", "vit-0.parquet"]


def test_it_is_shown_how_far_each_run_is_and_how_long_it_took(harvested):
    output = harvested[2].output
    for name in ("vit-0", "resnet-0"):
        assert re.search(rf"{name}: .*[1-9]\d*/40 \[[^]]*step", output), output
        assert re.search(rf"{name}: recorded in \d+ s\n", output), output
    assert re.search(r"broken: failed after \d+ s\n", output), output


def test_the_pretraining_of_a_run_is_told_too(harvested):
    spec = RunSpec(**json.loads((harvested[0] / "runs.json").read_text())[1] | {"epochs": 1})
    told = []
    record_run(replace(spec, pretraining={"train_rows": 32}), harvested[0] / "data", told.append)
    assert told == [
        *(Progress("resnet-0, pretraining", step, 2) for step in range(3)),
        *(Progress("resnet-0", step, 4) for step in range(5)),
    ]


@pytest.mark.slow
def test_a_killed_run_does_not_stop_the_others(harvested, tmp_path):
    folder = harvested[0]
    specs = [RunSpec(**spec) for spec in json.loads((folder / "runs.json").read_text())[:2]]
    killed = threading.Event()

    def kill_the_first_process():
        while not (processes := multiprocessing.active_children()):
            time.sleep(0.01)
        processes[0].kill()
        killed.set()

    threading.Thread(target=kill_the_first_process, daemon=True).start()
    (failure,) = harvest(specs, tmp_path, folder / "data")
    assert killed.is_set()
    assert failure.startswith("vit-0: its process was killed")
    assert [path.name for path in tmp_path.iterdir()] == ["resnet-0.parquet"]


def test_each_row_of_the_table_has_its_provenance(harvested):
    table = load_dataset("parquet", data_dir=str(harvested[0] / "out"), split="train")
    assert table["run"] == ["resnet-0"] * 3 + ["vit-0"] * 3
    row = table[4]
    assert (row["family"], row["data"], row["regime"], row["unit"]) == (
        "vit",
        "cifar10",
        "from scratch",
        f"vit.{VIT_BLOCKS}.0",
    )
    assert json.loads(row["spec"])["learning_rate"] == 3e-3
    assert json.loads(row["versions"])["torch"] == version("torch")
    assert np.shape(row["weights"]) == (len(row["steps"]), 1024) and len(row["cka"]) == len(row["probe_steps"])


def test_a_run_is_read_as_it_was_written(tmp_path):
    batch = ARCHITECTURES["bert"].batch(build("bert"))
    recorder = RecordingCallback([batch], weights_per_unit=64, probes=10, rewinds=5)
    train(tmp_path, [recorder])
    provenance = dict.fromkeys(PROVENANCE, "x") | {"train_loss": 0.5, "eval_loss": 0.25, "seconds": 1.5}
    write_run(RecordedRun(provenance, recorder.names, recorder.result()), tmp_path)
    (run,) = read_runs(tmp_path)
    assert run.provenance == provenance and run.units == recorder.names
    for key, value in recorder.result().items():
        torch.testing.assert_close(run.tensors[key], value, rtol=0, atol=0, check_dtype=False, msg=key)


def test_harvest_resumes(harvested):
    folder, words, _ = harvested
    finished = folder / "out" / "vit-0.parquet"
    before = finished.stat().st_mtime_ns
    specs = json.loads((folder / "runs.json").read_text())
    (folder / "runs.json").write_text(json.dumps(specs[:2]))
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert finished.stat().st_mtime_ns == before


@pytest.mark.parametrize("front_probe", [False, True])
@pytest.mark.usefixtures("affordable")
def test_rows_equal_the_inputs_in_use(harvested, tmp_path, front_probe):
    """The row of a recorded run equals the inputs that the callback builds in the same run."""
    runs = read_runs(harvested[0] / "out")
    stages = FreezingStages(runs, SmartFRZPredictorConfig(), "cka-0.99", spacings=(1, 2))
    assert all(len(column) == len(stages) for column in stages.columns.values())
    resnet, vit = ([run.name for run in runs].index(name) for name in ("resnet-0", "vit-0"))
    assert len(runs[resnet].units) == len(runs[vit].units) == 3
    steps = stages.columns["step"][stages.columns["run"] == 0].unique()
    assert steps.min() >= 2 and steps.max() < 40
    batch = ARCHITECTURES["bert"].batch(build("bert"))
    recorder = RecordingCallback([batch], weights_per_unit=1024)
    predictor = SmartFRZPredictor(SmartFRZPredictorConfig(front_probe=front_probe))
    callback = SmartFRZCallback(SmartFRZConfig(sampling_seed=42, decide_every=0.05), predictor)
    inputs = []
    score = SmartFRZPolicy.score

    def spy(self, observation, history, snapshots):
        handle = self.predictor.register_forward_pre_hook(lambda module, args: inputs.append((observation.step, args)))
        try:
            score(self, observation, history, snapshots)
        finally:
            handle.remove()
        return [0.0] * observation.units, torch.ones(observation.units, 1)

    callback.policy.score = spy.__get__(callback.policy)
    train(tmp_path, [recorder, callback], max_steps=40)
    run = RecordedRun({"run": "x", "data": "y", "family": "z"}, recorder.names, recorder.result())
    columns = FreezingStages([run], callback.policy.predictor.config, "cka-0.99").columns
    compared = 0
    for step, args in inputs:
        at = columns["step"] == step
        if at.any():
            for key, value in zip(INPUTS, args, strict=False):
                torch.testing.assert_close(value, columns[key][at][0], msg=f"{key} at step {step}")
            compared += 1
    assert compared > 12
    assert all(a[0] < b[0] for a, b in pairwise(inputs))


def test_augmentation_freezes_units_in_front(harvested):
    stages = FreezingStages(read_runs(harvested[0] / "out"), SmartFRZPredictorConfig(), "cka-0.99")
    torch.manual_seed(0)
    active = torch.stack([stages[0]["active"] for _ in range(20)])
    assert active.all(), "no augmentation by default"
    dropping = stages.select(torch.ones(len(stages), dtype=torch.bool), augment=True)
    active = torch.stack([dropping[0]["active"] for _ in range(200)])
    assert active[:, -1].all() and 0.5 < active[:, 0].float().mean() < 0.8
    assert (active.int().diff(dim=1) >= 0).all(), "only units in front"
    assert len(stages.select(stages.columns["run"] == 0)) == int((stages.columns["run"] == 0).sum())


def test_augmentation_hides_the_front_probe(harvested):
    config = SmartFRZPredictorConfig(front_probe=True)
    stages = FreezingStages(read_runs(harvested[0] / "out"), config, "cka-0.99")
    in_use = stages.select(torch.ones(len(stages), dtype=torch.bool), augment=True)
    torch.manual_seed(0)
    drawn = torch.stack([in_use[0]["context"] for _ in range(300)])
    known = drawn[..., CONTEXT_SIZE:].any(dim=(1, 2))
    assert 0.85 < known.float().mean() < 0.95
    assert drawn[..., :CONTEXT_SIZE].eq(stages[0]["context"][..., :CONTEXT_SIZE]).all()
    assert drawn[known].eq(stages[0]["context"]).all()


def test_targets_are_the_label_or_what_freezing_keeps():
    run = a_run()
    kept, label = (
        FreezingStages([run], SmartFRZPredictorConfig(weights_per_unit=8), "rewind-shift-0.03", target=target)
        for target in ("kept", "label")
    )
    steps = kept.columns["step"]
    torch.testing.assert_close(kept.columns["targets"], 1 - run.tensors["rewind_shifts"][steps])
    assert label.columns["targets"].equal(kept.columns["labels"]), "both have the same labels"


def a_run(name="x", units=3, probes=41):
    """A synthetic run in which unit u converges at 20 % * (u + 1): from there on, rewinding changes nothing."""
    steps = torch.arange(probes)
    remaining = (1 - steps.unsqueeze(1) / (probes - 1) / (0.2 * torch.arange(1, units + 1))).clamp(min=0)
    generator = torch.Generator().manual_seed(len(name))
    weights = (1 - remaining).unsqueeze(-1) * torch.randn(units, 8, generator=generator) + 1
    tensors = {
        "steps": steps,
        "learning_rates": torch.ones(probes),
        "weights": weights,
        "probe_steps": steps,
        "cka": 1 - 0.5 * remaining,
        "token_cka": 1 - 0.5 * remaining,
        "self_cka": 1 - remaining,
        "gradient_norms": remaining + 0.1,
        "rewind_steps": steps[:-1],
        "rewind_losses": 1 + remaining[:-1],
        "rewind_range": torch.tensor([2.0, 1.0]),
        "rewind_shifts": remaining[:-1],
    }
    return RecordedRun({"run": name, "family": name, "data": name}, [f"{name}.{u}" for u in range(units)], tensors)


def held_out_with(score):
    """Two synthetic runs, with scores computed from the labels."""
    runs = [a_run("x"), a_run("yy", units=2)]
    stages = FreezingStages(runs, SmartFRZPredictorConfig(weights_per_unit=8), "rewind-shift-0.03")
    folds = np.array(["x", "yy"])[stages.columns["run"].numpy()]
    return HeldOut(
        stages, folds, {PREDICTOR: score(stages.columns["labels"].numpy()), "zero": np.zeros((len(stages), 3))}
    )


def test_evaluation_of_a_perfect_predictor():
    held_out = held_out_with(lambda labels: 20 * (labels - 0.5))
    summary = summarize(held_out)
    assert (summary["auc"], summary["ap"], summary["moment_error"]) == (1, 1, 0) and summary["brier"] < 1e-4
    assert summary["rules"]["zero"]["auc"] == 0.5 and summary["rules"]["zero"]["ap"] == summary["positive"]
    assert summary["rows"] == int(held_out.active.sum()) < held_out.active.size
    moments = held_out.moments(held_out.labels)
    held_out.stages.columns["context"].zero_()  # as some variants of the ablation
    np.testing.assert_array_equal(held_out.moments(held_out.labels), moments)
    # The shift is below 3 % shortly before the unit stops moving.
    assert moments[0].tolist() == pytest.approx([0.2, 0.4, 0.6]) and np.isnan(moments[1, 2])
    assert path_cost(held_out, moments).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert (
        frozen_share(held_out, held_out.scores["zero"])
        == 0
        < frozen_share(held_out, held_out.scores["zero"], max_cost=1)
    )
    points = operating_points(held_out)
    assert summary["frozen"] == points["aggressive"]["frozen"]
    assert points["aggressive"]["frozen"] == pytest.approx(np.mean([0.8, 0.6, 0.4, 0.8, 0.6]), abs=1e-3)


def test_evaluation_of_a_predictor_that_is_too_early_or_unsure():
    unsure = held_out_with(lambda labels: 2 * (labels - 0.5) + np.random.default_rng(0).normal(0, 2, labels.shape))
    summary = summarize(unsure)
    assert 0.5 < summary["auc"] < 0.95 and summary["moment_error"] > 0
    fitted = unsure.calibration(np.ones(len(unsure.folds), dtype=bool))
    assert fitted["temperature"] > 1, "with the noise it is too sure"
    shifted = held_out_with(lambda labels: 3 * unsure.scores[PREDICTOR] + 5)
    again = shifted.calibration(np.ones(len(shifted.folds), dtype=bool))
    assert again["temperature"] == pytest.approx(3 * fitted["temperature"], rel=1e-3)
    assert again["offset"] == pytest.approx(3 * fitted["offset"] + 5, rel=1e-3)
    np.testing.assert_allclose(shifted.probabilities(), unsure.probabilities(), atol=1e-4)
    always = unsure.moments(np.ones_like(unsure.labels))
    assert path_cost(unsure, always).max() > 0.5 and np.nanmax(always) < 0.1
    never = unsure.moments(np.zeros_like(unsure.labels))
    assert np.nanmin(never) == 1 and path_cost(unsure, never).max() == 0


def test_values_between_moments_are_interpolated():
    values = at_probes(torch.tensor([[1.0, 0.4], [0.5, 0.0]]), torch.tensor([0, 4]), torch.tensor([0, 1, 4, 6, 8]))
    torch.testing.assert_close(values.T, torch.tensor([[1, 0.875, 0.5, 0.25, 0], [0.4, 0.3, 0, 0, 0]]))


def test_shift_of_logits_ignores_a_shift_of_all_classes():
    logits = torch.randn(5, 3)
    assert shift(logits, logits + torch.randn(5, 1)) == pytest.approx(0, abs=1e-10)
    assert shift(torch.zeros(5, 1), torch.full((5, 1), 2.0)) == 4, "a single number is compared as it is"


def test_every_label_covers_every_probe(harvested):
    for run in read_runs(harvested[0] / "out"):
        for name, label in LABELS.items():
            wanted = label(run.tensors)
            assert wanted.shape == run.tensors["cka"].shape and wanted.dtype == torch.bool, name
            assert wanted[-1].all(), "at the end, all units have converged"


@pytest.mark.slow
def test_evaluate_and_fit_write_a_predictor_and_its_card(harvested, tmp_path):
    folder, runs, out, results = harvested[0], tmp_path / "runs", tmp_path / "mine", tmp_path / "results.json"
    runs.mkdir()
    for source, task in (("vit-0", "cifar10"), ("resnet-0", "other")):
        (run,) = [run for run in read_runs(folder / "out") if run.name == source]
        run.provenance["data"] = task
        write_run(run, runs)
    words = ["evaluate", str(runs), "--out", str(results), "--epochs", "2", "--label", "cka-0.98"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    summary = json.loads(results.read_text())
    for name, groups in (("leave_one_family_out", {"vit", "resnet"}), ("leave_one_task_out", {"cifar10", "other"})):
        part = summary[name]
        assert part["rows"] > 50
        assert 0 <= part["auc"] <= 1
        assert 0 <= part["brier"] <= 1
        assert set(part["folds"]) == groups
        assert len(part["rules"]) == 11
        assert part["rules"][REGRESSION]["auc"] != part["rules"][REGRESSION_WITHOUT_PROBE]["auc"]
    assert summary["parameters"] < 1_000_000 and summary["decision_ms_32_blocks"] > 0
    assert (tmp_path / "results_reliability.png").is_file() and (tmp_path / "results_rules.png").is_file()

    result = CliRunner().invoke(app, ["fit", str(runs), "--evaluation", str(results), "--out", str(out)])
    assert result.exit_code == 0, result.output
    predictor = load_predictor(out)
    assert predictor.config.window == 20 and predictor.config.weights_per_unit == 1024
    assert predictor.feature_std.min() > 0 and predictor.feature_mean.abs().max() > 0
    assert predictor.temperature == pytest.approx(summary["calibration"]["temperature"])
    assert predictor.offset == pytest.approx(summary["calibration"]["offset"])
    assert predictor.config.front_probe
    points = {name: point["threshold"] for name, point in summary["operating_points"].items()}
    assert predictor.config.operating_points == points
    card = (out / "README.md").read_text()
    assert f"| vit | {summary['leave_one_family_out']['folds']['vit']['rows']} |" in card
    assert "![Predicted" in card and (out / "reliability.png").is_file()
    (out / "README.md").unlink()
    result = CliRunner().invoke(app, ["card", str(out), "--evaluation", str(results)])
    assert result.exit_code == 0, result.output
    assert (out / "README.md").read_text() == card
    for label in LABELS:
        assert f"The label is `{label}`: " in make_card("mine", summary | {"label": label, "target": "label"})
    callback = SmartFRZCallback(SmartFRZConfig(predictor=str(out), operating_point="conservative"))
    assert callback.policy.threshold == points["conservative"]
    train(tmp_path, [callback], max_steps=10)
    assert callback.ledger.decisions > 5
    (runs / "vit-0.parquet").unlink()
    words = ["fit", str(runs), "--evaluation", str(results), "--out", str(out)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "300", "TERM": "dumb"})
    assert result.exit_code == 2
    assert "differ in vit-0: run `smartfrz evaluate` again" in " ".join(result.output.split())


@pytest.mark.parametrize(("converged", "often"), [(True, "always"), (False, "never")])
def test_runs_with_one_class_are_too_few_to_evaluate(harvested, tmp_path, converged, often):
    runs = tmp_path / "runs"
    runs.mkdir()
    for run, task in zip(read_runs(harvested[0] / "out"), ("other", "cifar10"), strict=True):
        run.provenance["data"] = task
        if run.name == "vit-0":
            run.tensors["cka"].fill_(float(converged))
        write_run(run, runs)
    words = ["evaluate", str(runs), "--out", str(tmp_path / "x.json"), "--label", "cka-0.98"]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "300", "TERM": "dumb"})
    said = " ".join(result.output.split())
    assert result.exit_code == 2, result.output
    assert (
        f"If resnet is held out, the label 'cka-0.98' has only one class in the other runs (vit): their units have {often} converged"
        in said
    )
    assert "Record more runs" in said


def test_bad_input_of_the_commands(harvested, tmp_path):
    runs = str(harvested[0] / "out")
    for words, message in (
        (["evaluate", str(tmp_path), "--out", "x"], "holds no recorded run"),
        (["evaluate", runs, "--out", "x", "--epochs", "1"], "nothing to hold out"),
        (["evaluate", runs, "--out", "x", "--label", "magic"], "must be one of 'cka-0.98'"),
        (
            ["evaluate", runs, "--out", "x", "--target", "labell"],
            "must be one of 'kept', 'label'; did you mean 'label'?",
        ),
        (["evaluate", runs, "--out", "x", "--form", "magic"], "'dynamics', 'weights'"),
        (["fit", runs, "--out", "x", "--evaluation", "none.json"], "does not exist"),
        (["harvest", str(tmp_path / "none.json"), "--out", "x"], "does not exist"),
    ):
        result = CliRunner().invoke(app, words, env={"COLUMNS": "300", "TERM": "dumb"})
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    file = tmp_path / "runs.json"
    file.write_text(json.dumps([{"name": "a", "model": "vit", "data": "cifar10"}] * 2))
    with pytest.raises(ValueError, match="share a name: a"):
        read_specs(file)
    file.write_text(json.dumps([{"name": "a", "model": "vit", "data": "cifar10", "colour": 1}]))
    with pytest.raises(ValueError, match="colour"):
        read_specs(file)
    for text in ("[{", "{}", "[]", '["a"]'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"runs.json (is not JSON|must hold a list of runs)"):
            read_specs(file)
