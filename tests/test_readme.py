"""The README and the pages in docs/ are true: figures come from results files, code runs, links lead somewhere."""

import configparser
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TABLE = re.compile(r"<!-- table: .*?<!-- end -->", re.DOTALL)
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# Numbers that somebody has measured have a decimal point, or are a share or a factor.
FIGURE = re.compile(r"\d[\d.]*\.\d+|\d[\d.]*(?= ?%)|\d[\d.]*(?=x\b)")
# Defaults and thresholds of the code, versions, and what is aimed at: numbers in the pages that nobody has measured.
SETTINGS = {
    "README": ["3.11", "0.4", "torch 2.7", "5.3", "1.10", "Apache-2.0"],
    "activation_cache": ["0.25", "1 %"],
    "benchmarks": [
        "95 %",
        "15 % more",
        "0.02",
        "nothing at 0.6",
        "0.2 points asked for",
        "rate1.7",
        "below 0.2 points",
        "below 0.5",
        "to 25 % less",
    ],
    "concepts": ["first 3 %", "less than 1 %", "0.1 % of its weights", "before 65 % of the run"],
    "distributed": ["1.15"],
    "images": ["0.5", "1.0"],
    "estimate": ["3 %"],
    "migrating": ["0.5", "1.0"],
    "policies": ["0.5 %", "65 %", "5 %", "1 %", "3 %", "40 %", "0.4"],
    "predictor": ["0.5 %", "first 3 %"],
    "resume": ["5.23"],
}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Makes `benchmarks` and the example scripts importable."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT)


def python_blocks(name):
    return [code for kind, code in CODE.findall(PAGES[name].read_text()) if kind == "python"]


def results_of(name):
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


def percent(share):
    return f"{share:.0%}".replace("%", " %")


def figures():
    """By page, the figures in its text, made from the results files."""
    models, ablation = results_of("speed/results/step_time")["models"], results_of("predictor/results/ablation")
    predictor = results_of("predictor/results/predictor")
    again, fixed = (
        results_of("predictor/results/predictor_39_runs_again"),
        results_of("speed/results/cached_run_fixed"),
    )
    cached = results_of("speed/results/cached_run")
    families, data_sets = predictor["leave_one_family_out"], predictor["leave_one_task_out"]

    def lead(part):
        return f"{part['ap'] - max(rule['ap'] for rule in part['rules'].values()):.3f}"

    def variant(name):
        return percent(next(entry["frozen"] for entry in ablation["variants"] if entry["variant"] == name))

    schedules = import_module("benchmarks.predictor.start.schedules")
    timetables = results_of("predictor/start/schedules/results")
    fixed_rates = schedules.means(timetables, schedules.groups(timetables)["held out"])
    half = fixed_rates["half-r15"]
    entries = [entry for model in models.values() for entry in model["depths"]]
    errors = {d: max(e.get(f"error_cache_{d}", 0) for e in entries) for d in ("float16", "bfloat16", "int8")}
    store = results_of("speed/results/cache_store")["bytes_per_second"]["64x384"]

    def speeds(tier):
        return f"{store[tier]['write'] / 1e9:.1f} and {store[tier]['read'] / 1e9:.1f} GB/s"

    known = results_of("quality/compare/summary")
    headline = import_module("benchmarks.quality.compare.headline")
    peers = headline.beside_ours(known)
    gained = known["tasks"]["smollm2-12.cr"]["arms"]
    six = {name: task["arms"] for name, task in known["tasks"].items() if name.endswith(".6")}
    mini, deep_mrpc = (six[name]["smartfrz-aggressive"] for name in ("minilm.mrpc.6", "smollm2.mrpc.6"))

    def six_time(arm):
        return f"{mean(arms[arm]['seconds'] for name, arms in six.items() if name.startswith('smollm2')):.2f}"

    alone = results_of("quality/compare/gpu_alone/summary")["tasks"]["smollm2-30.emotion"]["arms"][headline.ARM]

    opinions = mean(
        part["arms"]["smartfrz-balanced"]["points_lost"]["mean"]
        for name, part in known["tasks"].items()
        if name.endswith(".opinions") and part["kind"] == "fine-tuning"
    )

    def time(arm, who="its"):
        return f"{peers[arm][who]['seconds']:.2f}"

    shorter = peers["full-65-rate1.7"]
    text_only = {name: task for name, task in known["tasks"].items() if name != "vit.mnist"}
    lora = headline.beside_ours({"tasks": text_only})["lora-8"]
    lora_less = lora["ours"]["lost"] - lora["its"]["lost"]
    longer = percent(shorter["its"]["seconds"] / shorter["ours"]["seconds"] - 1)
    deep = peers["smartfrz-aggressive"]
    steps = {
        arm: (f"{run['lost']:.1f}", f"{run['seconds']:.2f}") for arm, run in headline.at_same_compute(known).items()
    }

    def lost(task, arm):
        return known["tasks"][task]["arms"][arm]["points_lost"]["mean"]

    reviews = known["tasks"]["smollm2.reviews"]["arms"]
    started = results_of("predictor/start/schedules/language")  # by an earlier version
    new = headline.new_data(known)
    gained_most = min(new, key=lambda task: new[task]["points_lost"]["mean"])
    # What froze late at the threshold of `balanced`.
    late = [run for run in results_of("predictor/start/schedules/late") if run["arm"] == headline.ARM]

    at_balanced = [
        1 - mean(run["compute"] for run in late if run["task"] == task)
        for task in {run["task"] for run in late}
        if known["tasks"][task]["kind"] == "tags"
    ]

    def spread_of(shares):
        return f"{round(100 * min(shares))} to {percent(max(shares))}"

    def saved(*tasks):
        return spread_of([1 - known["tasks"][task]["arms"][headline.ARM]["compute"] for task in tasks])

    def late_on(*tasks):
        return f"{mean(run['points_lost'] for run in late if run['task'] in tasks):.1f}"

    tags = [run for run in results_of("predictor/start/schedules/tags") if run["arm"] == headline.ARM]  # as well
    expected = [float(re.search(r"to lose ([\d.]+) points", run["stages"][0][2])[1]) for run in tags]
    perplexity = f"{mean(run['points_lost'] for run in started):.0f} %"
    scratch = {arm: 1 - run["compute"] for arm, run in known["tasks"]["vgg.cifar10"]["arms"].items()}
    deit = {arm: 1 - run["compute"] for arm, run in known["tasks"]["deit.cifar10"]["arms"].items()}
    gpu = results_of("speed/results/gpu")["models"]["llama"]
    filling = max(gpu[f"{d} cached"]["first_epoch_ms"] / gpu[d]["first_epoch_ms"] for d in ("0.34", "0.5", "0.84"))
    on_gpu = results_of("quality/compare/smollm2_gpu/summary")["tasks"]
    doubled = [
        mean(run["evaluations"][-1]["points"] for run in at_twice)
        - mean(run["evaluations"][-1]["points"] for run in at_once)
        for at_twice, at_once in (
            [
                [results_of(f"quality/compare/{folder}/smollm2-12.{task}/full.{seed}") for seed in (1, 2, 3)]
                for folder in ("higher_rate/results", "results")
            ]
            for task in ("emotion", "trec")
        )
    ]
    mobilenet = results_of("quality/compare/mobilenet_gpu/summary")["tasks"]["mobilenet.cifar10"]["arms"]
    least = min(run["points_lost"]["mean"] for arm, run in mobilenet.items() if arm not in ("full", headline.ARM))
    checks = [run["check_share"] for run in results_of("speed/results/cache_hits_minilm_grow")["runs"]]
    return {
        "language_models": [
            f"frozen in the first steps, raised the perplexity by {perplexity}",
            f"and saves {percent(1 - reviews['smartfrz-balanced']['compute'])} of the compute",
        ],
        "README": [
            f"with six epochs on MRPC, `aggressive` lost {mini['points_lost']['mean']:.1f} points with MiniLM, and gained "
            f"{-deep_mrpc['points_lost']['mean']:.1f} with SmolLM2",
            f"Saves {percent(1 - alone['seconds'])} of the time, {percent(1 - alone['compute'])} of the compute (SmolLM2, H100)",
            f"65 % lost {shorter['its']['lost']:.1f} points on ten tasks, ours {shorter['ours']['lost']:.1f} in "
            f"{percent(1 - shorter['ours']['seconds'] / shorter['its']['seconds'])} less time",
            f"50 % lost {steps['full-50-rate1.7'][0]} points, `aggressive`, as fast, {steps['smartfrz-aggressive'][0]}",
            f"it took {time('lora-8')} of the time of full training, ours {time('lora-8', 'ours')}",
            f"AutoFreeze lost {peers['autofreeze']['its']['lost']:.1f} points; Egeria lost {peers['egeria']['its']['lost']:.2f} in "
            f"{time('egeria')} of the time of full training, ours {peers['egeria']['ours']['lost']:.2f} in {time('egeria', 'ours')}",
        ],
        "activation_cache": [
            f"{errors['float16']:.2%} (`float16`), {errors['bfloat16']:.1%} (`bfloat16`) and {errors['int8']:.0%} (`int8`)",
            f"{checks[0]:.2%} and {checks[1]:.2%} of the time".replace("%", " %"),
        ],
        "precision": [f"at most {max(e['error_frozen_bfloat16'] for e in entries):.1%}"],
        "predictor": [f"{predictor['parameters']:,} parameters"],
        "benchmarks": [
            f"On its four tasks {opinions:.1f} points are lost on average",
            f"with one {lost('bert.opinions', 'smartfrz-balanced'):.1f} points are lost, with the other "
            f"{-lost('bert-2.opinions', 'smartfrz-balanced'):.1f} gained",
            f"loses {fixed_rates['stairs-b-r15']['points']:.1f} points at {fixed_rates['stairs-b-r15']['compute']:.2f} of the compute",
            f"at 1.7 times its rate, it gained {-gained['full-rate1.7']['points_lost']['mean']:.1f} where ours gained "
            f"{-gained['smartfrz-balanced']['points_lost']['mean']:.1f}",
            f"In ten tasks on a GPU, full training at 1.5 times its rate gained {-fixed_rates['full-r15']['points']:.1f} points",
            f"from the start saves {percent(1 - half['compute'])} at 1.5 times the rate, but loses {half['points']:.1f} points on "
            f"average and {half['worst']:.1f} at worst",
            f"it loses {deep['its']['lost']:.1f} points on average at {time('smartfrz-aggressive')} of the time, and `balanced` "
            f"{deep['ours']['lost']:.1f} at {time('smartfrz-aggressive', 'ours')}",
            f"On the new tasks it loses {mean(lost(task, 'smartfrz-aggressive') for task in new):.1f}, or "
            f"{mean(lost(task, 'smartfrz-aggressive') for task in new if task != gained_most):.1f} without `{gained_most}`",
            f"With all 30 blocks of SmolLM2, {lost('smollm2-30.cr', 'smartfrz-balanced'):.1f} points are lost",
            f"65 % of the steps at 1.7 times the rate (`full-65-rate1.7`) take {longer} more time",
            f"lose {shorter['its']['lost']:.1f} points where ours lose {shorter['ours']['lost']:.1f}",
            "`aggressive` loses {} points at {} of the time".format(*steps["smartfrz-aggressive"]),
            "half of the steps at the higher rate {} at {}".format(*steps["full-50-rate1.7"]),
            "`balanced` with 65 % of the steps loses {} points at {} of the time".format(
                *steps["smartfrz-balanced-65"]
            ),
            "42 % of the steps without freezing {} at {}".format(*steps["full-42-rate1.7"]),
            "three fifths of the compute or a little more, both lose {}".format(*steps["smartfrz-balanced"]),
            f"lose {lost('bert-2.opinions', 'full-65-rate1.7') - lost('bert-2.opinions', 'smartfrz-balanced'):.1f} points more on "
            "`bert-2.opinions`",
            f"they save {saved('minilm.sick', 'minilm.stsb', 'smollm2.stsb')} of the compute",
            f"the points are kept, and {saved(*(task for task in known['tasks'] if known['tasks'][task]['kind'] == 'tags'))} of the",
            f"saves {spread_of(at_balanced)}",
            f"with a third of its units frozen a step takes {gpu['0.34 cached']['time']:.2f} of the time, with half of them "
            f"{gpu['0.5 cached']['time']:.2f}",
            f"takes up to {percent(filling - 1)} longer",
            "gains {:.0f} and {:.0f} points from that".format(*doubled),
            f"In MobileNet, `balanced` saves {percent(1 - mobilenet[headline.ARM]['compute'])} of the compute. On CIFAR-10, all others "
            f"lose at least {least:.2f} points",
            f"with {mean(task['arms']['lora-8']['compute'] for task in on_gpu.values()):.2f} of the compute",
            f"AutoFreeze loses {mean(task['arms']['autofreeze']['points_lost']['mean'] for task in on_gpu.values()):.0f} points",
            f"MiniLM had lost {late_on('minilm.stsb')} points on STS-B, for which this was chosen, and {late_on('minilm.sick')} on SICK",
            f"at random times, the same number of frozen units costs "
            f"{peers['random']['its']['lost'] - peers['random']['ours']['lost']:.1f} points more",
            f"it saves {percent(scratch['smartfrz-balanced'])} of the compute and loses nothing",
            f"`balanced` saves {percent(deit['smartfrz-balanced'])} of the compute and no time. `linear` saves "
            f"{percent(deit['linear'])}",
            f"`balanced` lost {mean(run['points_lost'] for run in tags):.1f} points on average at "
            f"{mean(run['compute'] for run in tags):.2f} of the compute",
            f"where {min(expected)} to {max(expected)} were expected",
            f"{late_on('minilm.names', 'minilm.emerging')} points of F1 were lost on names",
            f"It had lost {late_on('minilm.emerging')} points, and loses {lost('minilm.emerging', 'smartfrz-balanced'):.1f} now",
            f"On average they gain {-mean(run['points_lost']['mean'] for run in new.values()):.1f} points at "
            f"{mean(run['seconds'] for run in new.values()):.2f} of the time",
            f"`{gained_most}` gains {-new[gained_most]['points_lost']['mean']:.1f}, and without it "
            f"{mean(run['points_lost']['mean'] for task, run in new.items() if task != gained_most):.2f} are lost",
            f"it saved {percent(1 - mean(run['compute'] for run in started))} of the compute of the reviews, and the perplexity rose by "
            f"{perplexity}",
            f"at 1.7 times the rate, take less time, and the perplexity falls by {-lost('smollm2.reviews', 'full-65-rate1.7'):.0f} %",
            f"in the VGG we are ahead by {percent(1 - (1 - scratch['smartfrz-balanced']) / (1 - scratch['egeria']))}",
            f"On `minilm.mrpc.6`, `aggressive` takes {mini['seconds']:.2f} of the time, but loses {mini['points_lost']['mean']:.1f} points",
            f"`aggressive` takes {six_time('smartfrz-aggressive')} of the time on average, and `balanced` {six_time(headline.ARM)}",
            "to be 2.5 times as fast",
            f"loses {peers['static-50-rate1.7']['ours']['lost'] - peers['static-50-rate1.7']['its']['lost']:.1f} less than ours on the",
            f"loses {peers['static-50']['its']['lost'] - peers['static-50']['ours']['lost']:.1f} points more",
            f"and gains {-peers['lora-8']['its']['lost']:.1f} points; without the ViT, it loses {lora_less:.1f} less than ours",
            "(22.7 M parameters)",  # of MiniLM, see `test_minilm_has_as_many_parameters`
            f"cost {models['minilm']['idle_overhead']:.1%} of a step (ViT: {models['vit']['idle_overhead']:.1%}), and "
            f"hashing the rows {models['minilm']['hash_overhead']:.2%} ({models['vit']['hash_overhead']:.2%})",
            f"{fixed['full_over_cached_epochs_2_3']:.2f}x faster than full fine-tuning, and "
            f"{fixed['frozen_over_cached_epochs_2_3']:.2f}x faster than with the front frozen",
            f"with dynamic padding {cached['full_over_cached_epochs_2_3']:.2f}x and "
            f"{cached['frozen_over_cached_epochs_2_3']:.2f}x",
            f"{speeds('memory')} in memory, and {speeds('lmdb')} on disk",
            f"free rows had {speeds('arena')}",
            f"by {lead(families)} on families, and by {lead(data_sets)} on data sets",
            f"knowing the end of the runs, is {percent(families['frozen_at_most'])}",
            f"Without it, {variant('without the front probe')} is frozen on families at that cost; with it and without any "
            f"weights, {variant('without weights')}",
            f"ROC AUC {again['leave_one_family_out']['auc']:.3f} on families and "
            f"{again['leave_one_task_out']['auc']:.3f} on data sets, and {percent(again['leave_one_family_out']['frozen'])} "
            f"and {percent(again['leave_one_task_out']['frozen'])} frozen",
            f"logistic regression freezes "
            f"{percent(again['leave_one_task_out']['rules']['logistic regression']['frozen'])}, too",
        ],
    }


# `tests/model/test_models_page.py` proves those of the page on models.
@pytest.mark.parametrize("name", [name for name in PAGES if name != "models"])
def test_figures_are_those_of_the_results_files(name):
    text = PAGES[name].read_text()
    text = " ".join(LINK.sub("", CODE.sub("", TABLE.sub("", text))).split())
    for figure in [*figures().get(name, []), *SETTINGS.get(name, [])]:
        assert figure in text, f"{name} does not say {figure!r}"
        text = text.replace(figure, "")
    left = FIGURE.search(text)
    assert left is None, f"no results file gives {text[max(0, left.start() - 60) : left.end() + 20]!r} in {name}"


def test_the_table_at_equal_accuracy():
    headline = import_module("benchmarks.quality.compare.headline")

    def arm(lost, high, compute, seconds, seeds=3):
        return {
            "seeds": seeds,
            "points_lost": {"mean": lost, "low": lost - 1, "high": high},
            "compute": compute,
            "seconds": seconds,
        }

    def task(**arms):
        return {"kind": "fine-tuning", "seen": False, "model": "minilm", "epochs": 3, "arms": arms}

    ours = {"smartfrz-balanced": arm(0.1, 0.4, 0.6, 0.65), "full": arm(0, 0, 1, 1)}
    others = {
        "lora-8": arm(0, 0.2, 0.7, 0.8),
        "egeria": arm(0, 0.2, 0.75, 0.9),
        "linear": arm(0, 0.6, 0.5, 0.5),
        "grades": arm(0, 0.2, 0.4, 0.4, seeds=1),
    }
    lost = {
        "smartfrz-balanced": arm(0.3, 0.4, 0.6, 0.65),
        "smartfrz-aggressive": arm(0.1, 0.4, 0.5, 0.55),
        "egeria": arm(0.1, 0.6, 0.9, 0.9),
        "linear": arm(1, 2, 0.9, 0.9),
    }
    table = headline.equal_accuracy({"tasks": {"a": task(**ours, **others), "b": task(**lost), "alone": task(**ours)}})
    assert table.splitlines()[2:] == [
        "| `a` | 0.60 / 0.65 | not run | `lora-8`, 0.70 / 0.80 | `egeria`, 0.75 / 0.90 |",
        "| `b` | not equal (+0.30 [-0.70, +0.40] points lost) | 0.50 / 0.55 | none | none |",
    ]


@pytest.mark.parametrize("seeds", [1, 3])
def test_readme_figures_with_any_number_of_tasks_and_seeds(seeds):
    headline = import_module("benchmarks.quality.compare.headline")

    def task(compute, lost, kind="fine-tuning"):
        arm = {"seeds": seeds, "points_lost": {"mean": lost, "low": lost - 1, "high": lost + 1}, "loss_added": 0.01}
        arm |= {"compute": compute, "seconds": compute + 0.1}
        return {"kind": kind, "model": "bert-12", "epochs": 3, "seen": False, "arms": {headline.ARM: arm}}

    known = {"tasks": {"one": task(0.6, 0.5), "two": task(0.8, -0.3), "scratch": task(1.0, 9.0, "scratch")}}
    text = headline.figures(known)
    assert "**30 % less compute** | floating-point operations of training; 20 % to 40 %" in text
    assert "**20 % less time**" in text and "**-0.10 points** | accuracy; -0.5 (`one`) to +0.3 (`two`)" in text
    assert f"Two small fine-tuning tasks, {'one seed' if seeds == 1 else 'three seeds'} each" in text
    assert "pretrained models (a BERT of our own with 12 blocks), one CPU thread, three epochs." in text and (
        "noise" in text
    ) == (seeds == 1)
    known["tasks"]["two"]["seen"] = True
    assert "One small fine-tuning task, " in headline.figures(known)
    for seen, name in ((False, "one"), (True, "two")):
        text = headline.table(known, seen)
        assert text.count("\n") == 3 and f"| `{name}` |" in text


def test_methods_are_compared_with_ours_on_the_tasks_that_they_ran_on():
    headline = import_module("benchmarks.quality.compare.headline")
    ours = headline.ARM

    def task(arms, kind="fine-tuning"):
        runs = {
            arm: {
                "seeds": seeds,
                "points_lost": {"mean": lost, "low": lost, "high": lost},
                "compute": 0.5,
                "seconds": 0.4,
                "runs": {
                    str(seed): {"lost": lost + seed, "loss": 0.1, "compute": 0.5, "seconds": 0.4}
                    for seed in range(seeds)
                },
            }
            for arm, (lost, seeds) in arms.items()
        }
        return {"kind": kind, "model": "bert-12", "epochs": 3, "seen": False, "arms": runs}

    tasks = {
        "alone": task({ours: (9.0, 3)}),
        "one": task({ours: (0.5, 3), "egeria": (1.0, 3)}),
        "two": task({ours: (1.5, 3), "egeria": (2.0, 1), "lora": (0.0, 2), "random": (7.0, 3)}),
        "three": task({ours: (2.5, 3), "lora": (1.0, 2)}),
        "scratch": task({ours: (4.0, 1), "egeria": (5.0, 2)}, "scratch"),
    }
    text = headline.methods({"tasks": tasks})
    # Seed 0 counts lost, seed 1 one more, seed 2 two more; of ours only the seeds that the other has count.
    assert "| `egeria` | 2 | one to three | +2.00, +0.100 at 0.50 / 0.40 | +1.50, +0.100 at 0.50 / 0.40 |" in text
    assert (
        "| `lora` | 2 | two | +1.00, +0.100 at 0.50 / 0.40 | +2.50, +0.100 at 0.50 / 0.40 |" in text
        and "+9.00" not in text
    )
    assert "random" not in text, "it ran on one task"
    assert "No other method" in headline.methods({"tasks": {"alone": tasks["alone"]}})
    text = headline.by_method({"tasks": tasks}, "scratch")
    assert "| `scratch` | `egeria` | 2 | +5.00 [+5.00, +5.00] | 0.50 | 0.40 |" in text and text.count("\n") == 3


def test_operating_points_are_compared_on_the_same_tasks_and_seeds():
    headline = import_module("benchmarks.quality.compare.headline")

    def arm(*lost):
        runs = {str(seed): {"lost": each, "compute": 0.5, "seconds": 0.4} for seed, each in enumerate(lost)}
        return {"seeds": len(runs), "runs": runs}

    def task(**arms):
        arms = {f"smartfrz-{name}": run for name, run in arms.items()}
        return {"kind": "fine-tuning", "seen": False, "model": "minilm", "epochs": 3, "arms": arms}

    tasks = {
        "one": task(balanced=arm(1.0, 3.0), aggressive=arm(2.0)),
        "two": task(balanced=arm(0.0), aggressive=arm(4.0, 9.0)),
        "alone": task(balanced=arm(9.0), conservative=arm(0.5)),
    }
    rows = headline.operating_points({"tasks": tasks}).splitlines()[2:]
    assert rows == [
        "| `conservative` | 1 | +0.50 | +0.5 | 0.50 | 0.40 |",
        "| `balanced` | 2 | +0.50 | +1.0 | 0.50 | 0.40 |",
        "| `aggressive` | 2 | +3.00 | +4.0 | 0.50 | 0.40 |",
    ]


def test_fewer_steps_are_compared_on_tasks_that_all_arms_ran_on():
    headline = import_module("benchmarks.quality.compare.headline")

    def arm(lost, compute, seeds):
        runs = {str(seed): {"lost": lost + seed, "loss": 0.1, "compute": compute, "seconds": 0.4} for seed in seeds}
        return {"seeds": len(runs), "runs": runs}

    def task(arms, seeds=(1, 2)):
        arms = {name: arm(number, 1 - number / 10, seeds) for number, name in enumerate(arms)}
        return {"kind": "fine-tuning", "seen": False, "model": "minilm", "epochs": 3, "arms": arms}

    tasks = {"one": task(headline.FEWER_STEPS), "two": task(headline.FEWER_STEPS[:-1])}
    tasks["one"]["arms"][headline.ARM] = arm(5, 0.2, [2])
    text = headline.fewer_steps({"tasks": tasks})
    assert "`two`" not in text and text.count("\n") == 1 + len(headline.FEWER_STEPS)
    # Only the second seed is in all arms.
    assert f"| `{headline.ARM}` | 0.20 | 0.40 | +7.00 | +0.100 | +7.0 |" in text.splitlines()[-1]
    assert "| `smartfrz-aggressive` | 0.90 | 0.40 | +3.00 | +0.100 | +3.0 |" in text.splitlines()[2]


def test_timetables_are_held_against_full_training_with_the_same_seed():
    schedules = import_module("benchmarks.predictor.start.schedules")

    def entry(task, arm, seed, points, flops, resting=0.0):
        return {
            "task": task,
            "arm": arm,
            "seed": seed,
            "points": points,
            "loss": 1.0,
            "flops": flops,
            "resting": resting,
        }

    runs = [entry("a", "full", 1, 80.0, 10.0), entry("a", "third", 1, 79.0, 7.0), entry("a", "third", 2, 0.0, 7.0)]
    runs += [entry("x.b", "full", 1, 60.0, 10.0), entry("x.b", "third", 1, 63.0, 8.0, resting=0.1)]
    found = schedules.means(runs, {"a", "x.b"})["third"]
    assert (found["tasks"], found["runs"], found["points"], found["worst"]) == (2, 2, -1.0, 1.0)
    assert found["compute"] == pytest.approx(0.7)
    assert schedules.groups(runs) == {
        "harvest": {"x.b"},
        "harvest, four times the learning rate": set(),
        "held out": {"a"},
    }


def test_minilm_has_as_many_parameters(minilm_dir):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(minilm_dir, num_labels=1)
    assert f"({model.num_parameters() / 1e6:.1f} M parameters)" in PAGES["benchmarks"].read_text()


def test_tables_are_those_of_the_results_files():
    tables = import_module("benchmarks.tables")
    for page in tables.PAGES:
        text = page.read_text()
        assert text.count("<!-- table:") == text.count("<!-- end -->") > 0
        assert tables.fill(text) == text, f"{page.name}: run `python -m benchmarks.tables`"
    assert {path for path in PAGES.values() if "<!-- table:" in path.read_text()} <= set(tables.PAGES)


def test_model_card_is_that_of_the_results_file():
    from smartfrz_hf.predictor_training.card import make_card

    card = (ROOT / "predictor_weights" / "smartfrz-base" / "README.md").read_text()
    assert make_card("smartfrz-base", results_of("predictor/results/predictor")) == card, (
        "make it again with `smartfrz card`"
    )


def test_ddp_sends_only_active_gradients():
    for stage in results_of("speed/results/ddp_bytes")["stages"]:
        assert stage["active_parameter_bytes"] == stage["all_reduced_bytes"]


def test_readme_fits_on_a_screen_and_a_half():
    assert PAGES["README"].stat().st_size <= 8192


def test_versions_are_those_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    requires, text = setup["options"]["install_requires"], PAGES["README"].read_text()
    floors = {
        name: re.search(rf"^{name}>=([\d.]+)", requires, re.MULTILINE)[1]
        for name in ("torch", "transformers", "accelerate")
    }
    assert ", ".join(f"{name} {floor}" for name, floor in floors.items()) in text
    assert setup["options"]["python_requires"] == ">=3.11" and "Python 3.11 or newer" in text
    count = int(re.search(r"^(\d+) architectures", PAGES["models"].read_text(), re.MULTILINE)[1])
    assert f"more than {count // 50 * 50} architectures" in text


@pytest.mark.slow
def test_the_ten_lines_run_and_print_what_they_say(tmp_path):
    """What was saved depends on how long the cache pays; which unit freezes when, hardly."""
    (code,) = python_blocks("README")
    lines = [line for line in code.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 12
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = [line.removeprefix("# ").split()[:-1] for line in code.splitlines() if line.startswith("# ")]
    table = done.stdout[done.stdout.index("unit  ") :].splitlines()[: len(said)]
    printed = [line.split()[:-1] for line in table]
    assert [row[:2] for row in said] == [row[:2] for row in printed]
    for (*_, expected), (*_, step) in zip(said[2:], printed[2:], strict=True):
        assert step == expected or abs(int(step) - int(expected)) <= 50


SET_UP = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tests" / "utils")!r})
import torch
from torch.utils.data import DataLoader
from training import Rows, arguments, build
from transformers import Trainer, get_linear_schedule_with_warmup
from smartfrz_hf import SmartFRZConfig, load_predictor

SFTTrainer, folder = Trainer, "checkpoint"
SmartFRZConfig().save_pretrained("user/repo")
load_predictor().save_pretrained("USER/NAME")


def fresh():
    global model, args, train_dataset, loader, total_steps, optimizer, scheduler
    model, args, train_dataset = build("bert"), arguments("output"), Rows()
    loader, total_steps = DataLoader(train_dataset, batch_size=4), 8
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, total_steps)
"""


# What the pages on other models and Trainers have beside that.
MORE_SET_UP = {
    "images": "image_rows = Rows(images=True)",
    "language_models": """
class Tokens(Rows):
    def __getitem__(self, row):
        return self.rows[row] | {"labels": self.rows[row]["input_ids"]}


token_rows = Tokens()
""",
    "without_a_trainer": """
from types import SimpleNamespace

accelerator = SimpleNamespace(load_state=lambda folder: None)
""",
    "trl_and_sentence_transformers": """
from datasets import Dataset
from test_mixin import tokenizer as words_tokenizer, words_of

causal_model, tokenizer, encoder_name = build("gpt2"), words_tokenizer(), MINILM
text_dataset = Dataset.from_dict({"text": [" ".join(words_of(94)[i : i + 10]) for i in range(40)]})
pairs = Dataset.from_dict({"anchor": words_of(40), "positive": words_of(41)[1:]})
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PAGES if name != "README" and python_blocks(name)])
def test_code_of_the_pages_runs(tmp_path, name, minilm_dir):
    """All blocks of a page, one after the other, each with a fresh tiny model."""
    code = f"{SET_UP}\nMINILM = {str(minilm_dir)!r}\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
    code += MORE_SET_UP.get(name, "") + "".join(f"\nfresh()\n{block}" for block in python_blocks(name))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "path",
    [*PAGES.values(), ROOT / "CHANGELOG.md", *ROOT.glob("benchmarks/**/*.md"), ROOT / "examples" / "README.md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_lead_to_files_and_headings(path):
    for link in LINK.findall(CODE.sub("", path.read_text())):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        file, _, heading = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name}: {link}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", CODE.sub("", target.read_text()), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert heading in slugs, f"{path.name}: {link}, of {slugs}"


def test_options_in_the_pages_exist():
    from dataclasses import fields

    from smartfrz_hf import SmartFRZConfig

    for name in ("policies", "activation_cache"):
        rows = re.findall(r"^\| (`[a-z_`, ]+) \| ", PAGES[name].read_text(), re.MULTILINE)
        options = [option for row in rows for option in re.findall(r"`(\w+)`", row) if option != "policy"]
        assert options and set(options) <= {field.name for field in fields(SmartFRZConfig)}
