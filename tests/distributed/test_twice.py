"""Two real processes (gloo) that train twice."""

import torch
from launching import launch
from safetensors.torch import load_file


def test_the_second_run_sends_what_had_frozen_in_the_first(tmp_path):
    done = launch(tmp_path, script="twice.py")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / f"end-{rank}.safetensors") for rank in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), f"ranks drifted apart in {key}"
