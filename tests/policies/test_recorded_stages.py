"""The shipped predictor freezes at the steps, and for the reasons, that `freezing_stages.json` has recorded."""

import json
from pathlib import Path

import pytest
import torch
from architectures import build
from training import train

from smartfrz_hf import SmartFRZCallback, SmartFRZConfig

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "freezing_stages.json").read_text())


@pytest.fixture(autouse=True)
def one_thread():
    """Sums over threads would round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("run", RECORDED)
def test_freezing_stages_are_the_recorded_ones(tmp_path, affordable, run):
    model, operating_point = run.split("/")
    callback = SmartFRZCallback(SmartFRZConfig(operating_point=operating_point, start_stage=False))
    train(tmp_path, [callback], build(model), max_steps=160, lr_scheduler_type="cosine")
    assert [[stage.step, stage.depth, stage.reason] for stage in callback.ledger.stages] == RECORDED[run]
