"""The figures in the README and in the other pages are those of the committed results files."""

import json
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Makes `benchmarks` and the example scripts importable."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT)


def results_of(name):
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


def test_demo_output_is_that_of_the_results_file():
    demo, results = import_module("demo"), results_of("quality/results/demo")
    readme = (ROOT / "README.md").read_text()
    assert demo.table(results["runs"][0]) in readme
    for key in ("spearman_plain", "spearman_smartfrz"):
        value = results[key]
        assert f"{100 * value['mean']:.2f} ± {100 * value['std']:.2f}" in readme
    for key in ("train_seconds_ratio", "backward_flops_ratio"):
        assert f"{results[key]['mean']:.2f} ± {results[key]['std']:.2f}" in readme


def test_step_times_are_those_of_the_results_file():
    step_time, models = import_module("benchmarks.speed.step_time"), results_of("speed/results/step_time")["models"]
    readme = (ROOT / "README.md").read_text()
    assert step_time.table(models["minilm"]) in readme
    assert step_time.table(models["vit"], 3) in readme
    words = " ".join(readme.split())
    for name in ("cached_run", "cached_run_fixed"):
        run = results_of(f"speed/results/{name}")
        assert run["equal"]
        for key in ("full_over_cached_epochs_2_3", "frozen_over_cached_epochs_2_3"):
            assert f"{run[key]:.2f}x" in words
    for name in models:
        assert f"{models[name]['idle_overhead']:.1%}" in words and f"{models[name]['hash_overhead']:.2%}" in words
    entries = [entry for model in models.values() for entry in model["depths"]]
    errors = [max(e.get(f"error_cache_{dtype}", 0) for e in entries) for dtype in ("float16", "bfloat16", "int8")]
    assert f"{errors[0]:.2%}, {errors[1]:.1%} and {errors[2]:.0%} of their standard deviation" in words
    assert f"(logits: {max(e['error_frozen_bfloat16'] for e in entries):.1%})" in words
    bandwidth = results_of("speed/results/cache_store")["bytes_per_second"]["64x384"]
    for tier in ("memory", "lmdb", "arena"):
        assert f"{bandwidth[tier]['write'] / 1e9:.1f} and {bandwidth[tier]['read'] / 1e9:.1f} GB/s" in words


def test_model_card_is_that_of_the_results_file():
    from smartfrz_hf.predictor_training.card import make_card

    card = (ROOT / "predictor_weights" / "smartfrz-base" / "README.md").read_text()
    assert make_card("smartfrz-base", results_of("predictor/results/predictor")) == card, (
        "make it again with `smartfrz card`"
    )


def test_tables_are_those_of_the_results_files():
    tables = import_module("benchmarks.tables")
    for page in tables.PAGES:
        text = page.read_text()
        assert text.count("<!-- table:") == text.count("<!-- end -->") > 0
        assert tables.fill(text) == text, f"{page.name}: run `python -m benchmarks.tables`"


def test_ddp_sends_only_active_gradients():
    for stage in results_of("speed/results/ddp_bytes")["stages"]:
        assert stage["active_parameter_bytes"] == stage["all_reduced_bytes"]
