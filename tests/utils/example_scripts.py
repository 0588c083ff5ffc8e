"""Tiny data for the example scripts, and the command lines that tests of them share."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAIN = ["--do_train", "--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--use_cpu"]
FREEZE_TWO = ["--smartfrz_policy", "static", "--smartfrz_static_depth", "2"]


def pairs(count: int = 24) -> pd.DataFrame:
    """Pairs of sentences with the columns of MRPC."""
    words = ["red", "green", "blue"]
    return pd.DataFrame(
        {
            "idx": range(count),
            "sentence1": [f"the {words[i % 3]} house" for i in range(count)],
            "sentence2": [f"a house in {words[i % 2]}" for i in range(count)],
            "label": [int(i % 3 == i % 2) for i in range(count)],
        }
    )


def picture(label: int) -> Image.Image:
    return Image.fromarray(np.full((16, 20, 3), (60 * label, 200 - 60 * label, 90), dtype=np.uint8))


def write_pictures(path: Path, count: int = 24) -> str:
    """A parquet file like the Hub's `uoft-cs/cifar10`: structs of bytes, and labels that are plain numbers."""
    rows = []
    for index in range(count):
        buffer = io.BytesIO()
        picture(index % 3).save(buffer, format="PNG")
        rows.append({"img": {"bytes": buffer.getvalue(), "path": None}, "label": index % 3})
    pd.DataFrame(rows).to_parquet(path)
    return str(path)


def run_script(name: str, args: list[str], cache: Path, launcher: tuple[str, ...] = ()) -> str:
    """Run a script in a process of its own, and return what it printed."""
    result = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name), *args],
        env=os.environ | {"HF_DATASETS_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def read_json(*path: str | Path):
    return json.loads(Path(*path).read_text())
