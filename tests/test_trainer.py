"""The Trainer logs what freezing does to every tracker, and counts FLOPs as they ran."""

import pytest
import torch
from architectures import build
from counting import FORMULAS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from training import Rows, arguments, predictor_that_says, train

from smartfrz_hf import SmartFRZConfig, SmartFRZTrainer, find_blocks
from smartfrz_hf.policies import Decision

KEYS = {"freeze/depth", "freeze/frozen_fraction", "freeze/compute_saved"}


def smartfrz_trainer(folder, model=None, probability=0.9, config=None, **changes):
    return train(
        folder,
        model=model,
        trainer_class=SmartFRZTrainer,
        trainer_kwargs={
            "smartfrz": SmartFRZConfig(**{"first_decision": 5, "decide_every": 5} | (config or {})),
            "predictor": predictor_that_says(probability),
        },
        **changes,
    )


def test_logs_reach_history_and_trackers(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = smartfrz_trainer(tmp_path, config={"max_depth": 2}, report_to=["tensorboard"])
    logs = [log for log in trainer.state.log_history if "loss" in log or "train_loss" in log]
    assert len(logs) == 5 and all(log.keys() >= KEYS for log in logs)
    assert [log["freeze/depth"] for log in logs] == [2, 2, 2, 2, 2]  # step 5 is logged after its freezing stage
    saved = [log["freeze/compute_saved"] for log in logs]
    assert saved[0] == 0 and saved == sorted(saved) and saved[-1] > 0
    inside = sum(
        p.numel() for unit in (0, 1) for p in trainer.smartfrz.run.stack.units[unit].named_parameters().values()
    )
    share = inside / sum(p.numel() for p in trainer.model.parameters())
    assert logs[-1]["freeze/frozen_fraction"] == pytest.approx(share)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert {f"train/{key}" for key in KEYS} <= set(events.Tags()["scalars"])


def test_evaluation_logs_are_left_alone(tmp_path):
    trainer = smartfrz_trainer(tmp_path, eval_strategy="steps", eval_steps=10)
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(logs) == 2 and not any(KEYS & log.keys() for log in logs)


@pytest.mark.parametrize("name", ["bert", "vit"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_total_flos_is_what_a_flop_counter_counts(tmp_path, name, accumulation):
    """Rows of one shape, so that scaling by elements is exact."""
    data = Rows(images=name == "vit")
    for row in data.rows:
        if name == "bert":
            row["attention_mask"] = torch.ones_like(row["attention_mask"])
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        trainer = SmartFRZTrainer(
            model=build(name),
            args=arguments(tmp_path, gradient_accumulation_steps=accumulation),
            train_dataset=data,
            smartfrz=SmartFRZConfig(first_decision=5, decide_every=5, activation_cache=False),
            predictor=predictor_that_says(0.9),
        )
        answers = {5: 2, 10: 2, 15: 4}
        trainer.smartfrz.policy.decide = lambda seen: Decision(answers.get(seen.step, 0), "told")
        trainer.train()
    # The predictor never ran: what the counter saw is the model's own work, but for the passes that found the units, and
    # the counted pass, of one batch.
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as finding:
        find_blocks(build(name))
    counted = counter.get_total_flops() - 2 * finding.get_total_flops()
    counted -= sum(flops.forward for flops in trainer.ledger.full_unit_flops.values())
    assert trainer.ledger.depth == 4
    assert trainer.state.total_flos == pytest.approx(counted, rel=1e-6)
    spent = trainer.ledger.spent
    assert spent.forward + spent.backward == pytest.approx(counted, rel=1e-6)


def test_compute_saved_is_measured_against_the_full_run(tmp_path):
    full = smartfrz_trainer(tmp_path, probability=0.1)
    frozen = smartfrz_trainer(tmp_path, config={"max_depth": 3, "activation_cache": False})
    assert full.ledger.compute_saved == 0
    assert frozen.ledger.full.total == pytest.approx(full.ledger.spent.total, rel=1e-6)
    assert frozen.ledger.spent.forward == pytest.approx(full.ledger.spent.forward, rel=1e-6)
    assert frozen.ledger.spent.backward < full.ledger.spent.backward
    static = smartfrz_trainer(tmp_path, config={"policy": "static", "static_depth": 3})
    assert static.ledger.full.total == pytest.approx(full.ledger.spent.total, rel=0.1)


def test_mixin_and_user_callbacks(tmp_path):
    from training import Watcher

    watcher = Watcher()
    trainer = smartfrz_trainer(tmp_path, callbacks=[watcher], max_steps=6)
    assert len(watcher.weights) == 6
    assert trainer.ledger is trainer.smartfrz.ledger
    assert trainer.ledger.to_dict()["freeze_steps"] == {name: 5 for name in trainer.ledger.units}


def test_evaluation_is_not_counted(tmp_path):
    quiet = smartfrz_trainer(tmp_path, probability=0.1)
    busy = smartfrz_trainer(tmp_path, probability=0.1, eval_strategy="steps", eval_steps=1)
    assert busy.state.total_flos == quiet.state.total_flos


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "albert", "vit", "swin", "resnet"])
def test_save_and_load_after_freezing(tmp_path, name):
    trainer = smartfrz_trainer(tmp_path, build(name), max_steps=6)
    trainer.save_model(tmp_path / "saved")
    again = type(trainer.model).from_pretrained(tmp_path / "saved")
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
