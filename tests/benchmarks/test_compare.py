"""The comparison of methods: the statistics with worked numbers, tiny runs that are killed and resumed, and the report."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from architectures import build
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from training import Rows, arguments
from transformers import Trainer, TrainerCallback

from smartfrz_hf import SmartFRZCallback

ROOT = Path(__file__).parents[2]
MODEL = {"model_type": "small_vgg", "image_size": 8, "widths": [4, 8], "depths": [1, 2]}
TASK = {
    "model": "tiny",
    "task": "dots",
    "rows": 48,
    "epochs": 3,
    "batch_size": 16,
    "learning_rate": 1e-2,
    "seeds": [1, 2],
}
TASK |= {"kind": "scratch", "minutes": 0.1}
ARMS = [
    {"name": "full", "method": "full"},
    {"name": "full-50", "method": "full", "share": 0.5},
    {"name": "smartfrz-balanced", "method": "freezing"},
    {"name": "static-50", "method": "freezing", "config": {"policy": "static"}, "hindsight": True},
    {"name": "autofreeze-tuned", "method": "freezing", "policy": "autofreeze", "tune": {"percentile": [50, 90]}},
    {"name": "random", "method": "freezing", "policy": "random", "ratio_of": "static-50"},
]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Makes `benchmarks` importable."""
    monkeypatch.syspath_prepend(ROOT)


def module(name):
    return importlib.import_module(f"benchmarks.quality.compare.{name}")


@pytest.fixture
def folder(tmp_path):
    """A plan of one task and one to tune on, and their pictures: bright ones and dark ones."""
    tasks = [TASK | {"name": "dots"}, TASK | {"name": "tune.dots", "role": "tune", "seeds": [1]}]
    plan = tmp_path / "plan"
    plan.mkdir()
    (plan / "tasks.json").write_text(json.dumps({"models": {"tiny": {"from_scratch": MODEL}}, "tasks": tasks}))
    (plan / "arms.json").write_text(json.dumps(ARMS))
    generator = np.random.default_rng(0)
    (tmp_path / "data" / "dots").mkdir(parents=True)
    for split, count in (("train", 100), ("validation", 40)):
        rows = []
        for number in range(count):
            buffer = io.BytesIO()
            pixels = generator.integers(0, 128, (8, 8, 3)) + 100 * (number % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": number % 2})
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "dots" / f"{split}.parquet")
    return tmp_path


def result(points, seconds=10.0, flops=100.0, share=None, peak=200, evaluation=1.0):
    cost = {"training": seconds, "overhead": 0.0, "evaluation": evaluation, "loading": 0.0}
    return {
        "evaluations": [{"step": 1, "points": 0.0}, {"step": 2, "points": points, "loss": 1 - points / 100}],
        "seconds": {"wall": cost, "processor": cost},
        "flops": {"forward": flops / 4, "backward": flops / 2, "optimizer": flops / 4},
        "memory": {"before": 100, "peak": peak},
        "freezing": None if share is None else {"share": share},
    }


def write(folder, results):
    for name, values in results.items():
        file = folder / "out" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        task, run = name.split("/")
        arm, seed = run.rsplit(".", 1)
        known = {"task": {"name": task}, "arm": {"name": arm}, "seed": int(seed)}
        file.write_text(json.dumps(known | values))


def test_intervals():
    intervals = module("intervals")
    same = intervals.bootstrap([0.1, 0.1, 0.1])
    assert (same.mean, same.low, same.high) == pytest.approx((0.1, 0.1, 0.1)) and same.equal
    two = intervals.bootstrap([0.0, 1.0])  # means of two drawn values: 0, 1/2 or 1, a quarter each at the ends
    assert (two.mean, two.low, two.high) == (0.5, 0.0, 1.0)
    values = [0.3, -0.1, 0.2, 0.0, 0.1, -0.2]
    known = intervals.bootstrap(values)
    error = float(np.std(values)) / len(values) ** 0.5
    assert known.high - known.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    for mean, high, equal in ((0.19, 0.49, True), (0.2, 0.4, False), (0.1, 0.5, False), (-1.0, 0.4, True)):
        assert intervals.Interval(mean, -2.0, high).equal is equal
    curve = [(1.0, 0.0), (0.5, 2.0), (0.25, 8.0)]
    assert [intervals.interpolate(curve, at) for at in (0.75, 0.25, 0.2, 1.5)] == [1.0, 8.0, None, 0.0]


def test_runs_are_interleaved_and_wait_for_those_they_depend_on(folder):
    plan = module("plan").Plan.read(folder / "plan")
    names = [experiment.name for experiment in plan.experiments]
    tried = [f"tune.dots/autofreeze@percentile={value}.1" for value in (50, 90)]
    assert names[:3] == [*tried, "tune.dots/full.1"]
    assert names[3:] == [f"dots/{arm['name']}.{seed}" for seed in (1, 2) for arm in ARMS]
    by_name = {experiment.name: experiment for experiment in plan.experiments}
    assert [e.name for e in plan.needs(by_name["dots/random.2"])] == ["dots/static-50.2"]
    tuned = by_name["dots/autofreeze-tuned.1"]
    assert [e.name for e in plan.needs(tuned)] == names[:3]
    assert plan.waits_for(tuned, folder / "out") and not plan.waits_for(by_name["dots/full.1"], folder / "out")
    write(folder, {name: result(90.0) for name in names[:3]})
    assert plan.waits_for(tuned, folder / "out") is None


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [((0.1, 0.15), 90), ((0.1, 0.3), 50), ((2.0, 1.0), 90), ((1.0, 2.0), 50)],
)
def test_the_tuned_value_is_the_cheapest_that_loses_nothing(folder, losses, chosen):
    plan = module("plan").Plan.read(folder / "plan")
    names = [f"tune.dots/autofreeze@percentile={value}.1" for value in (50, 90)]
    results = {name: result(90 - lost, flops=f) for name, lost, f in zip(names, losses, (80, 60), strict=True)}
    write(folder, results | {"tune.dots/full.1": result(90.0)})
    experiment = next(e for e in plan.experiments if e.name == "dots/autofreeze-tuned.1")
    arm = module("choice").choose(plan, experiment, folder / "out")
    assert arm.options == {"percentile": chosen} and arm.tune is None


def test_the_report_has_the_paired_ratios_and_the_best_fixed_schedule(folder):
    report, plan = module("report"), module("plan").Plan.read(folder / "plan")
    write(
        folder,
        {
            "dots/full.1": result(90.0, 10, 100, peak=300),
            "dots/full.2": result(80.0, 20, 100, peak=300),
            "dots/full-50.1": result(86.0, 5, 50),
            "dots/full-50.2": result(78.0, 10, 50),
            "dots/smartfrz-balanced.1": result(90.1, 6, 75, 0.4),
            "dots/smartfrz-balanced.2": result(79.9, 10, 75, 0.6),
            "dots/static-50.1": result(90.0, 5, 60, 0.5),
            "dots/static-50.2": result(80.0, 10, 60, 0.5),
        },
    )
    report.make(plan, folder / "out", folder / "report")
    arms = json.loads((folder / "report" / "summary.json").read_text())["tasks"]["dots"]["arms"]
    nothing = {"mean": 0.0, "low": 0.0, "high": 0.0}
    runs = {name: arms[name].pop("runs") for name in ("full", "smartfrz-balanced")}
    assert runs["full"] == dict.fromkeys(("1", "2"), {"lost": 0.0, "loss": 0.0, "compute": 1.0, "seconds": 1.0})
    assert sorted(run["lost"] for run in runs["smartfrz-balanced"].values()) == [-0.1, 0.1]
    assert arms["full"] == {"seeds": 2, "points_lost": nothing, "loss_added": 0.0, "compute": 1.0, "seconds": 1.0}
    assert arms["full-50"]["loss_added"] == 0.03
    ours, lost = arms["smartfrz-balanced"], {"mean": 0.0, "low": -0.1, "high": 0.1}
    assert ours == {"seeds": 2, "points_lost": lost, "loss_added": 0.0, "compute": 0.75, "seconds": 0.55}
    assert arms["full-50"]["points_lost"] == {"mean": 3.0, "low": 2.0, "high": 4.0}
    assert arms["hindsight"] == arms["static-50"], "the cheapest fixed schedule of equal accuracy"
    text = (folder / "report" / "report.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("| **smartfrz-balanced** | 85.00"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    # Full training as long as ours, by a straight line from half of the steps (3 lost) to all: 1.5 and 2.7 lost.
    assert cells[3:] == ["+0.000", "yes", "0.75", "0.55", "0.55", "0.50", "0.50", "+1.50", "+2.70", "2"]
    assert "| dots | scratch | no | smartfrz-balanced, 1.82x | static-50, 2.00x | 1.10 |  | 62% |" in text
    assert (folder / "report" / "charts" / "dots.png").stat().st_size > 5000
    assert report.family("smartfrz-lora-8") == "smartfrz-lora" and report.family("linear-0-50") == "linear"
    assert report.family("grades-by-unit-tuned") == "grades-by-unit"


def test_times_of_another_machine_are_marked(folder):
    report, plan = module("report"), module("plan").Plan.read(folder / "plan")
    names = {"full.1": 1.0, "full.2": 1.0, "static-50.1": 1.4, "static-50.2": 1.0, "full-50.1": 0.9, "full-50.2": 0.5}
    write(folder, {f"dots/{name}": result(90.0, evaluation=seconds) for name, seconds in names.items()})
    report.make(plan, folder / "out", folder / "report")
    text = (folder / "report" / "report.md").read_text()
    times = {
        line.split("|")[1].strip(): line.split("|")[7:9]
        for line in text.split("## dots")[1].splitlines()
        if "| 90.00" in line
    }
    assert times["full-50"] == [" ~1.00 "] * 2
    assert times["static-50"] == times["full"] == [" 1.00 "] * 2


def test_runs_of_different_models_are_not_compared(folder):
    """Some models are of our own making, and made again they are others."""
    report, plan = module("report"), module("plan").Plan.read(folder / "plan")
    write(folder, {"dots/full.1": result(90.0) | {"weights": "a"}, "dots/full-50.1": result(80.0)})
    report.make(plan, folder / "out", folder / "report")
    write(folder, {"dots/full-50.1": result(80.0) | {"weights": "b"}})
    with pytest.raises(ValueError, match=r"dots/full-50\.1 and full began with different weights"):
        report.make(plan, folder / "out", folder / "report")


def test_results_of_other_runs_and_damaged_ones_are_refused(folder):
    report, plan = module("report"), module("plan").Plan.read(folder / "plan")
    write(folder, {"dots/full.1": result(90.0), "dots/static-50.1": result(80.0)})
    file = folder / "out" / "dots" / "static-50.1.json"
    for content, said in (
        ((folder / "out" / "dots" / "full.1.json").read_text(), "is the result of dots/full.1"),
        (file.read_text()[:50], "is damaged"),
        ("", "is damaged"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=said):
            report.make(plan, folder / "out", folder / "report")


def test_a_schedule_with_one_seed_is_no_hindsight(folder):
    report, plan = module("report"), module("plan").Plan.read(folder / "plan")
    known = {f"dots/full.{seed}": result(90.0) for seed in (1, 2)} | {"dots/static-50.1": result(95.0, flops=50)}
    write(folder, known)
    assert report.hindsight(plan, report.rows(report.read(plan, folder / "out", plan.tasks[0]))) is None


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--tasks", "dot"], 2, "--tasks: the plan has no dot, but dots, tune.dots"),
        (["--arms", "full", "smartfrz"], 2, "--arms: the plan has no smartfrz, but autofreeze-tuned"),
        (["--arms", "random"], 0, "2 have no result yet of dots, on which random depends"),
        (["--arms", "full", "--tasks", "dots", "--data_dir", "nowhere"], 0, "2 have no data dots in"),
    ],
)
def test_the_runner_says_what_it_cannot_do(folder, words, code, said):
    process = start(folder, *words)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == code and said in " ".join(output.split()), output


def start(folder, *words):
    command = [sys.executable, "-m", "benchmarks.quality.compare.run", f"--plan={folder / 'plan'}"]
    command += [f"--out={folder / 'out'}", f"--model_dir={folder}", f"--data_dir={folder / 'data'}", *words]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **output)


@pytest.mark.slow
def test_runs_are_killed_resumed_and_reported(folder):
    chosen = ["--arms", "full", "smartfrz-balanced", "--tasks", "dots"]
    full, ours = (folder / "out" / "dots" / f"{name}.1.json" for name in ("full", "smartfrz-balanced"))
    process = start(folder, *chosen)
    deadline = time.monotonic() + 300
    while not full.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # in the second run
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [path.name for path in full.parent.glob("*.json")] == ["full.1.json"]
    before = full.stat().st_mtime_ns

    process = start(folder, *chosen, "--most", "1", "--same_process")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert said.split()[1] == "dots/smartfrz-balanced.1" and "2 runs are missing, 0 have failed" in said
    assert full.stat().st_mtime_ns == before, "made again"
    known = json.loads(ours.read_text())
    assert len(known["weights"]) == 16
    assert known["steps"] == 9 and [entry["step"] for entry in known["evaluations"]] == [3, 6, 9]
    assert set(known["flops"]) == {"forward", "backward", "optimizer"} and known["freezing"]["units"] == 4
    assert known["versions"]["torch"] and known["machine"]["threads"] == 1
    assert known["seconds"]["processor"]["training"] > 0 and known["memory"]["peak"] > known["memory"]["before"]

    module("report").make(module("plan").Plan.read(folder / "plan"), folder / "out", folder / "report")
    arms = json.loads((folder / "report" / "summary.json").read_text())["tasks"]["dots"]["arms"]
    assert set(arms) == {"full", "smartfrz-balanced"}


@pytest.mark.slow
def test_a_run_whose_runner_was_killed_is_not_made_twice(folder):
    chosen = ["--arms", "full", "--tasks", "dots", "--most", "1"]
    process = start(folder, *chosen)
    children, deadline = [], time.monotonic() + 120
    while not children and time.monotonic() < deadline:
        time.sleep(0.05)
        children = psutil.Process(process.pid).children()
    (child,) = children
    child.suspend()
    process.kill()
    process.wait()
    said = start(folder, *chosen, "--tasks", "dots").communicate(timeout=120)[0]
    assert said.count("dots/full") == 1 and "dots/full.2" in said, "the second seed, as the first is being made"
    child.resume()
    while child.is_running() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sorted(path.name for path in (folder / "out" / "dots").glob("*.json")) == ["full.1.json", "full.2.json"]


class Losses(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.values += [logs["loss"]] if "loss" in logs else []


def trained(folder, *callbacks, model=None):
    model, losses = model or build("bert"), Losses()
    model.accepts_loss_kwargs = False
    args = arguments(folder, max_steps=8, logging_steps=1, bf16=True)
    Trainer(model, args, train_dataset=Rows(), callbacks=[*callbacks, losses]).train()
    return losses.values


def test_flops_are_those_of_the_ledger_and_counting_changes_nothing(tmp_path):
    measure = module("measure")
    torch.manual_seed(0)
    plain = trained(tmp_path)
    torch.manual_seed(0)
    model = build("bert")
    meter = measure.FlopMeter(model, measure.Stopwatch())
    assert trained(tmp_path, meter, model=model) == plain
    callback = SmartFRZCallback(policy="never")
    trained(tmp_path, callback)
    full, found = callback.ledger.full, meter.result()
    assert found["forward"] == pytest.approx(full.forward, rel=0.01)
    assert found["backward"] == pytest.approx(full.backward, rel=0.01)
    assert found["optimizer"] == pytest.approx(full.optimizer, rel=1e-6)


@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_the_backward_pass_of_a_grouped_convolution_is_counted_for_its_groups(kind, groups, bias):
    mapping = {torch.ops.aten.convolution_backward: module("measure").convolution_backward}
    layer = kind(8, 16, 3, stride=2, groups=groups, bias=bias)
    inputs = torch.randn(2, 8, 9, 9, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        output = layer(inputs)
    with FlopCounterMode(display=False, custom_mapping=mapping) as backward:
        output.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_lisa_trains_some_blocks_at_a_time(tmp_path):
    measure, arms = module("measure"), module("arms")
    model = build("bert")
    seen = []

    class Watching(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            layers = model.bert.encoder.layer
            seen.append([i for i, layer in enumerate(layers) if all(p.grad is not None for p in layer.parameters())])

    meter = measure.FlopMeter(model, measure.Stopwatch())
    trained(tmp_path, arms.LISACallback(model, layers=1, interval=2), Watching(), meter, model=model)
    assert all(len(active) == 1 for active in seen) and len({active[0] for active in seen}) > 1
    assert all(seen[i] == seen[i + 1] for i in range(0, 8, 2)), "two steps each"
    found = meter.result()
    assert found["forward"] < found["backward"] < 2 * found["forward"], "no weight gradients of resting blocks"


def test_data_counts_as_seen_if_the_predictor_was_trained_on_it():
    predictor = ROOT / "benchmarks" / "predictor"
    runs = json.loads((predictor / "run_lists" / "base.json").read_text())
    pairs = json.loads((predictor / "start" / "pairs.json").read_text())["pairs"]
    names = [run["data"] for run in runs] + [pair["task"] for pair in pairs if pair.get("role") != "judge"]
    seen = {name.split("/")[-1] for name in names}
    tasks = module("plan").Plan.read().tasks
    assert [task.name for task in tasks if task.seen != (task.task.split("/")[-1] in seen)] == []


def test_each_word_is_scored_once(tmp_path, minilm_dir):
    loading, tasks = (importlib.import_module(f"benchmarks.{name}") for name in ("loading", "tasks"))
    sentences = [["Ada", "Lovelace", "visited", "Knightsbridge", "unaccompanied", "."], ["Nobody", "noticed", "."]]
    tags = [["B-PER", "I-PER", "O", "B-LOC", "O", "O"], ["O", "O", "O"]]
    rows = [{"words": words, "tags": of} for words, of in zip(sentences, tags, strict=True)]
    for split in ("train", "validation"):
        parquet.write_table(pa.Table.from_pylist(rows * 20), tmp_path / f"{split}.parquet")
    pair = tasks.Pair("names", "minilm", "names", rows=6, objective="tags")
    task = loading.load_task(pair, {}, minilm_dir, tmp_path)
    assert (len(task.train), len(task.held_out), task.labels) == (6, 40, 4)
    batch = task.collate([max(task.train, key=lambda row: len(row["input_ids"])), *task.held_out])
    scored = batch["labels"] != tasks.NOT_SCORED
    assert sorted(set(scored.sum(1).tolist())) == [3, 6] and scored.shape[1] > 8, "words of several tokens"
    assert batch["labels"][0][scored[0]].tolist() == [1, 2, 3, 0, 3, 3], "B-LOC, B-PER, I-PER, O"
    known = task.evaluate(task.held_out)
    assert known["loss"] == pytest.approx(task.model(**batch).loss.item(), abs=0.2) and 0 <= known["points"] < 50


def test_entities_count_as_in_conll():
    tasks = importlib.import_module("benchmarks.tasks")
    names = dict(enumerate(["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]))
    wanted = [torch.tensor([1, 3, 4, 0]), torch.tensor([4, 0, 2])]  # a person, two places
    given = [torch.tensor([1, 3, 3, 0]), torch.tensor([4, 0, 2])]  # the person is too long
    logits = [torch.nn.functional.one_hot(each, 5).float() for each in given]
    assert tasks.tagging_points(logits, wanted, names) == pytest.approx(100 * 2 * 2 / (3 + 3))
    assert tasks.tagging_points(logits, given, names) == 100
    parts = dict(enumerate(["ADJ", "NOUN", "PUNCT", "VERB", "X"]))
    assert tasks.tagging_points(logits, wanted, parts) == pytest.approx(100 * 6 / 7)
    assert tasks.entities(["I-PER", "O", "I-LOC", "B-LOC", "I-PER"]) == [
        ("PER", 0, 1),
        ("LOC", 2, 3),
        ("LOC", 3, 4),
        ("PER", 4, 5),
    ]
