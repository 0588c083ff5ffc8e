"""Starts scripts on two real processes, and gathers what they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]
RECIPES = TESTS.parent / "examples" / "accelerate_configs"
STAGES = [[5, 2], [9, 3], [13, 5]]


def launch(folder, *words, ranks=2, recipe="ddp_cpu", script="run.py"):
    """Run a script on some ranks, and give the process that started them back."""
    folder.mkdir(exist_ok=True)
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", str(RECIPES / f"{recipe}.yaml")]
    command = [sys.executable, *(accelerate if ranks > 1 else []), str(TESTS / "distributed" / script), str(folder)]
    environment = os.environ | {
        "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS / 'utils'}{os.pathsep}{TESTS.parent}",
        "OMP_NUM_THREADS": "1",
    }
    words = [*words, f"--world_size={ranks}"]
    return subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=300)


def results(folder, *words, ranks=2, recipe="ddp_cpu"):
    done = launch(folder, *words, ranks=ranks, recipe=recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((folder / f"end-{rank}.json").read_text()) for rank in range(ranks)]
    assert [part["world_size"] for part in found] == [ranks] * ranks
    weights = [load_file(folder / f"end-{rank}.safetensors") for rank in range(ranks)]
    for other in weights[1:]:
        assert all(torch.equal(value, other[key]) for key, value in weights[0].items()), "ranks drifted apart"
    return found, weights[0]
