"""Two real processes (gloo) that train twice."""

import os
import subprocess
import sys

import torch
from safetensors.torch import load_file
from test_ddp import CONFIG, TESTS


def test_the_second_run_sends_what_had_frozen_in_the_first(tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    command = [sys.executable, *launch, str(TESTS / "distributed" / "twice.py"), str(tmp_path)]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / f"end-{rank}.safetensors") for rank in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), f"ranks drifted apart in {key}"
