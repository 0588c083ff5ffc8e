"""Trainers of other libraries on two real processes (gloo): both freeze alike, and keep the same weights."""

import json

import pytest
import torch
from launching import launch
from safetensors.torch import load_file

NAMES = ["sft", "reward", "sentence_transformer", "seq2seq"]


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    done = launch(tmp_path, ",".join(NAMES), script="trainers_of_ranks.py")
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"end-{rank}.json").read_text()) for rank in range(2)]
    weights = [load_file(tmp_path / f"end-{rank}.safetensors") for rank in range(2)]
    for part in found:
        assert part == {"world_size": 2, **{name: [[5, 3]] for name in NAMES}}
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), f"ranks drifted apart in {key}"
