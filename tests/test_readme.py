"""What the README prints is what a committed script measured."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_demo_output_is_that_of_the_results_file():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    results = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert demo.table(results["runs"][0]) in readme
    for key in ("spearman_plain", "spearman_smartfrz"):
        value = results[key]
        assert f"{100 * value['mean']:.2f} ± {100 * value['std']:.2f}" in readme
    for key in ("train_seconds_ratio", "backward_flops_ratio"):
        assert f"{results[key]['mean']:.2f} ± {results[key]['std']:.2f}" in readme


def test_model_card_is_that_of_the_results_file():
    from smartfrz_hf.harvest.card import write_card

    summary = json.loads((ROOT / "benchmarks" / "results" / "first_predictor.json").read_text())
    card = (ROOT / "predictor_weights" / "smartfrz-base" / "README.md").read_text()
    assert write_card("smartfrz-base", summary) == card
    held_out = summary["held_out"]
    rule, best = max(held_out["rules"].items(), key=lambda item: item[1]["ap"])
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"an average precision of {held_out['ap']:.3f}, the best simple rule (*{rule}*) {best['ap']:.3f}" in readme
