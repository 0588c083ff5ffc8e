"""What tests of the activation cache share."""

import contextlib

import torch
from architectures import ARCHITECTURES, build
from training import Rows, train

from smartfrz_hf import Freezer, SmartFRZConfig, SmartFRZTrainer, find_blocks
from smartfrz_hf.activation_cache import ActivationCache, ActivationStore


def run(folder, cache, model="bert", dataset=None, policy="linear", callbacks=(), smartfrz=None, **changes):
    """A run of five epochs with or without the cache; `model` is the name of an architecture, or a model."""
    config = SmartFRZConfig(policy=policy, activation_cache=cache, **smartfrz or {})
    arguments = {"num_train_epochs": 5, "max_steps": -1, "eval_strategy": "epoch", "logging_steps": 1} | changes
    model = build(model) if isinstance(model, str) else model
    return train(
        folder,
        callbacks,
        model,
        SmartFRZTrainer,
        dataset or Rows(32, images=getattr(model, "main_input_name", "") == "pixel_values"),
        {"smartfrz": config},
        **arguments,
    )


def losses(trainer):
    """All losses in the log, of training and evaluation."""
    return [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]


def assert_same_losses(off, on, tolerance=1e-4):
    """Whether two runs differ by rounding alone."""
    torch.testing.assert_close(
        torch.tensor(losses(on)), torch.tensor(losses(off)), rtol=tolerance, atol=tolerance, equal_nan=False
    )


@contextlib.contextmanager
def cached(name="bert", depth=3, model=None, rounds=3, **changes):
    """A model in evaluation mode whose front is frozen and cached, its cache, and a batch that is in it."""
    model = (build(name) if model is None else model).eval()
    stack = find_blocks(model)
    Freezer(stack).freeze_to(depth)
    cache = ActivationCache(stack, ActivationStore(2**24), **changes)
    cache.freeze_to(depth)
    batch = ARCHITECTURES[name].batch(stack.model)
    try:
        with torch.no_grad():
            for _ in range(rounds):
                model(**batch)
        yield model, cache, batch
    finally:
        cache.close()
