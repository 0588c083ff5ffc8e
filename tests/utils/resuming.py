"""Runs with a checkpoint at each step: what tests of resuming share."""

import pytest
import torch
from architectures import build
from training import Rows, train

from smartfrz_hf import (
    Policy,
    SmartFRZCallback,
    SmartFRZConfig,
    SmartFRZPredictor,
    SmartFRZPredictorConfig,
    SmartFRZTrainer,
)

STAGES = {"first_decision": 5, "decide_every": 2}


def undecided_predictor():
    """One whose answers depend on the whole history, and which freezes a tiny BERT unit by unit."""
    torch.manual_seed(28)
    return SmartFRZPredictor(SmartFRZPredictorConfig(window=4, weights_per_unit=32, front_sum=False))


def run(
    folder,
    alone=False,
    resume=None,
    policy="smartfrz",
    model=None,
    predictor=None,
    config=None,
    dataset=None,
    **changes,
):
    """Train, with a checkpoint at each step, and give the trainer and its callback back."""
    settings = {"policy": policy, "linear_depth": 1.0, "record_every": 1, "freeze_threshold": 0.5} | STAGES
    settings["activation_cache"] = (
        False  # with it, a resumed run is the same up to rounding: it starts with an empty cache
    )
    own_policy = settings.pop("policy") if isinstance(policy, Policy) else None
    made = SmartFRZConfig(**settings | (config or {}))
    predictor = predictor or undecided_predictor()
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 20, "logging_steps": 1} | changes
    arguments = {"model": model or build("bert"), "dataset": dataset or Rows(40), "folder": folder, "resume": resume}
    if alone:
        callback = SmartFRZCallback(made, None if own_policy else predictor, own_policy)
        return train(callbacks=[callback], **arguments, **changes), callback
    kwargs = {"smartfrz": made} | ({"policy": own_policy} if own_policy else {"predictor": predictor})
    trainer = train(trainer_class=SmartFRZTrainer, trainer_kwargs=kwargs, **arguments, **changes)
    return trainer, trainer.smartfrz


def losses(trainer):
    return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}


def assert_same_end(first, second):
    (trainer, callback), (other, other_callback) = first, second
    assert losses(trainer) == losses(other)
    for (key, p), (_, q) in zip(trainer.model.state_dict().items(), other.model.state_dict().items(), strict=True):
        assert torch.equal(p, q), key
    for p, q in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert trainer.optimizer.state[p].keys() == other.optimizer.state[q].keys()
        for key, value in trainer.optimizer.state[p].items():
            assert torch.equal(value, other.optimizer.state[q][key]), key
    ledger, other_ledger = callback.ledger, other_callback.ledger
    assert ledger.stages == other_ledger.stages and ledger.decisions == other_ledger.decisions
    assert ledger.spent.backward == pytest.approx(other_ledger.spent.backward, rel=1e-9)
    assert ledger.full.total == pytest.approx(other_ledger.full.total, rel=1e-9)
    assert trainer.state.total_flos == pytest.approx(other.state.total_flos, rel=1e-9)
