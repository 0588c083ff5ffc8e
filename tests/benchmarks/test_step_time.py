"""The script that times steps works with the package as it is now."""

import importlib
from pathlib import Path

import torch
from architectures import build
from tqdm.auto import tqdm


def test_all_methods_are_timed_at_a_depth(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    step_time = importlib.import_module("benchmarks.speed.step_time")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 99, (step_time.ROWS, 12), generator=generator)
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    found = step_time.measure_depth(build("bert"), data, depth=3, steps=4, progress=tqdm(disable=True))
    assert all(found[name] > 0 for name in ("full", "hand_frozen", "ours", "ours_bfloat16", "ours_cached", "limit"))
    assert found["cache_bytes"] > 0
