"""Two real processes (gloo) with a loop of their own."""

import pytest
import torch
from launching import results


@pytest.mark.slow
@pytest.mark.parametrize("save_at", [2, 5, 9])
@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_a_sharded_loop_resumes(tmp_path, kind, save_at):
    """From a checkpoint before, between and after the freezes. Accelerate alone finds no state for what was frozen."""
    options = {"script": "own_loop.py", "recipe": "fsdp2_cpu"}
    words = (f"--state_dict_type={kind}",)
    whole, weights = results(tmp_path / "whole", *words, f"--save_at={save_at}", **options)
    assert whole[0]["stages"] == [[4, 2], [7, 3]]
    resumed, again = results(tmp_path / "resumed", *words, f"--resume={tmp_path / 'whole' / 'saved'}", **options)
    assert resumed == whole
    for key, value in weights.items():
        assert torch.equal(value, again[key]), key


def test_uneven_inputs_are_refused_at_once(tmp_path):
    """Else the ranks would wait for one another until the timeout."""
    results(tmp_path / "joined", "--join", script="own_loop.py")
