"""A model with a meter of its FLOPs: what tests of them share."""

import peft
import pytest
import torch
from architectures import ARCHITECTURES, build
from counting import counted
from versions import checkpoint_activations

from smartfrz_hf import Freezer, find_blocks
from smartfrz_hf.cost.flops import ComputeMeter

ROWS, LENGTH, HIDDEN, INSIDE = 4, 16, 32, 37
# Four projections, attention scores and weighted values, and the two layers behind them; 2 FLOPs a multiply-add.
BERT_LAYER = 2 * ROWS * LENGTH * (4 * HIDDEN**2 + 2 * LENGTH * HIDDEN + 2 * HIDDEN * INSIDE)


class Bench:
    """A model with its meter, and one batch to train it on."""

    def __init__(self, model, batch, optimizer=None):
        self.model, self.batch = model.train(), batch
        self.stack = find_blocks(model)
        self.optimizer = optimizer(model.parameters()) if optimizer else None
        self.freezer = Freezer(self.stack, self.optimizer)
        self.meter = ComputeMeter(model, self.stack, self.optimizer)

    @classmethod
    def of(cls, name, optimizer=None, checkpointing=None):
        model = build(name)
        if checkpointing is not None:
            checkpoint_activations(model, checkpointing == "reentrant")
        return cls(model, ARCHITECTURES[name].batch(model), optimizer)

    def freeze_to(self, depth, apart=()):
        self.freezer.unfreeze_to(0 if apart or self.freezer.apart else min(depth, self.freezer.depth))
        self.freezer.freeze([*range(depth), *apart])
        self.meter.freeze_to(self.freezer.depth, self.freezer.apart)

    def loss(self):
        return self.model(**self.batch)["loss"]

    def step(self, skip=None):
        """One step on one micro-batch; returns its forward and backward FLOPs."""
        loss = self.loss()
        if skip is not None:
            self.meter.skip(skip)
        if loss.requires_grad:
            loss.backward()
        self.meter.count()
        if self.optimizer:
            self.optimizer.step()
            self.meter.end_of_step()
        self.model.zero_grad()
        return self.meter.take()


def assert_as_torch_counts(bench, depth, tolerance=1e-6, apart=()):
    bench.freeze_to(depth, apart)
    backward = counted(bench.loss().backward) if bench.loss().requires_grad else 0
    assert backward > 0 or depth == len(bench.stack)
    forward = counted(bench.loss)
    # The passes above have gone into the meter as well.
    bench.meter.count()
    bench.meter.take()
    cost = bench.step()
    assert cost.forward == pytest.approx(forward, rel=1e-6)
    assert cost.total == pytest.approx(forward + backward, rel=tolerance)


def with_adapters(name, **options):
    config = peft.LoraConfig(r=8, **options)
    return Bench(peft.get_peft_model(build(name), config), ARCHITECTURES[name].batch(build(name)), torch.optim.AdamW)
