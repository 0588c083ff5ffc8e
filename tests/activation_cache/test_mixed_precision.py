"""Under autocast, and with weights of half the size, everything holds that holds in float32."""

import pytest
import torch
from architectures import build
from resuming import assert_same_end, run
from training import Rows, Watcher, arguments, assert_same_run, predictor_that_says

from smartfrz_hf import SmartFRZConfig, SmartFRZTrainer, find_blocks
from smartfrz_hf.activation_cache.monitor import CacheMonitor

BF16 = {"bf16": True, "use_cpu": True}


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback alone"])
@pytest.mark.slow
def test_resuming_under_autocast_equals_never_having_stopped(tmp_path, alone):
    """One checkpoint lies at a freezing stage, and one behind the next. The cache, which starts empty, would round otherwise."""
    settings = {"config": {"activation_cache": False}} | BF16
    whole = run(tmp_path, alone, **settings)
    stages = [stage.step for stage in whole[1].ledger.stages]
    assert len(stages) >= 2 and 0 < whole[1].ledger.stages[0].depth < 5, "the test needs several stages"
    for step in (stages[0], stages[1] + 1):
        again = run(tmp_path, alone, resume=str(tmp_path / f"checkpoint-{step}"), save_strategy="no", **settings)
        assert_same_end(whole, again)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("half", [False, True], ids=["autocast", "weights in bfloat16"])
def test_frozen_under_autocast_with_and_without_the_cache(tmp_path, half, monkeypatch):
    # Tiny models compute faster than anything can be looked up; keep their cache on nevertheless.
    monkeypatch.setattr(CacheMonitor, "loss", lambda self: None)
    settings = {} if half else BF16
    runs = []
    for cache in (True, False):
        config = {"activation_cache": cache, "first_decision": 6, "decide_every": 6, "max_depth": 3}
        watcher = Watcher()
        trainer = SmartFRZTrainer(
            model=build("bert").to(torch.bfloat16) if half else build("bert"),
            args=arguments(tmp_path, max_steps=24, logging_steps=1, **settings),
            train_dataset=Rows(16),
            callbacks=[watcher],
            smartfrz=SmartFRZConfig(record_every=1, **config),
            predictor=predictor_that_says(0.9),
        )
        trainer.train()
        runs.append(trainer)
        assert not torch.is_autocast_enabled("cpu"), "the front was tried inside the model's own forward pass"
        # The history is as fine as the weights are: of float32 under autocast.
        assert trainer.smartfrz.run.observer.history.snapshots().dtype == torch.float32
        assert set(trainer.ledger.freeze_steps.values()) == {6} and trainer.ledger.depth == 3
        for unit in find_blocks(trainer.model).units[:3]:
            for key in unit.named_parameters():
                assert torch.equal(watcher.weights[5][key], watcher.weights[-1][key]), key
    assert runs[0].ledger.cache.hits > 16 and runs[0].ledger.cache.off is None
    assert_same_run(*runs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and CUDA_VISIBLE_DEVICES=0")
def test_the_scaler_of_float16_sees_active_gradients_only(tmp_path):
    """An overflow skips a step; what is frozen stays, and the run goes on and resumes."""
    settings = {"fp16": True, "use_cpu": False, "save_steps": 7, "max_steps": 14}
    whole = run(tmp_path, **settings)
    assert whole[1].ledger.depth > 0 and whole[0].accelerator.scaler.get_scale() > 0
    again = run(tmp_path, resume=str(tmp_path / "checkpoint-7"), **settings | {"save_strategy": "no"})
    assert whole[1].ledger.stages == again[1].ledger.stages
    for (key, p), q in zip(whole[0].model.named_parameters(), again[0].model.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=key)
