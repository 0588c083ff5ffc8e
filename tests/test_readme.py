"""What the README prints is what a committed script measured."""

import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def script(path):
    sys.path.insert(0, str((ROOT / path).parent))  # as it is when the script is run
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # which dataclasses ask for
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str((ROOT / path).parent))
    return module


def results_of(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_demo_output_is_that_of_the_results_file():
    demo, results = script("examples/demo.py"), results_of("demo")
    readme = (ROOT / "README.md").read_text()
    assert demo.table(results["runs"][0]) in readme
    for key in ("spearman_plain", "spearman_smartfrz"):
        value = results[key]
        assert f"{100 * value['mean']:.2f} ± {100 * value['std']:.2f}" in readme
    for key in ("train_seconds_ratio", "backward_flops_ratio"):
        assert f"{results[key]['mean']:.2f} ± {results[key]['std']:.2f}" in readme


def test_step_times_are_those_of_the_results_file():
    step_time, models = script("benchmarks/step_time.py"), results_of("step_time")["models"]
    readme = (ROOT / "README.md").read_text()
    assert step_time.table(models["minilm"]) in readme
    assert step_time.table(models["vit"], 3) in readme
    words = " ".join(readme.split())
    for name in ("cached_run", "cached_run_fixed"):
        run = results_of(name)
        assert run["equal"]
        for key in ("full_over_cached_epochs_2_3", "frozen_over_cached_epochs_2_3"):
            assert f"{run[key]:.2f}x" in words
    for name in models:
        assert f"{models[name]['idle_overhead']:.1%}" in words and f"{models[name]['hash_overhead']:.2%}" in words
    entries = [entry for found in models.values() for entry in found["depths"]]
    kept = [max(e.get(f"error_cache_{dtype}", 0) for e in entries) for dtype in ("float16", "bfloat16", "int8")]
    assert f"{kept[0]:.2%}, {kept[1]:.1%} and {kept[2]:.0%} of their standard deviation" in words
    assert f"(logits: {max(e['error_frozen_bfloat16'] for e in entries):.1%})" in words
    bandwidth = results_of("cache_store")["bytes_per_second"]["64x384"]
    for tier in ("memory", "lmdb", "arena"):
        assert f"{bandwidth[tier]['write'] / 1e9:.1f} and {bandwidth[tier]['read'] / 1e9:.1f} GB/s" in words


def test_model_card_is_that_of_the_results_file():
    from smartfrz_hf.predictor_training.card import make_card

    card = (ROOT / "predictor_weights" / "smartfrz-base" / "README.md").read_text()
    assert make_card("smartfrz-base", results_of("predictor")) == card, "make it again with `smartfrz card`"


def test_tables_are_those_of_the_results_files():
    tables = script("benchmarks/tables.py")
    for page in tables.PAGES:
        text = page.read_text()
        assert text.count("<!-- table:") == text.count("<!-- end -->") > 0
        assert tables.fill(text) == text, f"{page.name}: run benchmarks/tables.py"


def test_ddp_sends_what_is_active():
    for stage in results_of("ddp_bytes")["stages"]:
        assert stage["active_parameter_bytes"] == stage["all_reduced_bytes"]
