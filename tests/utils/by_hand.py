"""Training a tiny model with a run, and with the same front frozen by hand."""

import copy

import torch
from transformers import set_seed
from zoo import loss_of, make_batch

from smartfrz_hf import Decision, FreezingRun, Policy, find_blocks

STEPS = 16


class At(Policy):
    """Freezes two depths at two steps."""

    def __init__(self, depths):
        self.depths = depths

    def decide(self, observation):
        return Decision(max(depth for step, depth in self.depths.items() if step <= observation.step), "test")


def batches(model):
    """Two batches, again and again."""
    one = make_batch(model)
    other = {name: v.flip(0) if isinstance(v, torch.Tensor) and len(v) == 2 else v for name, v in one.items()}
    for name in ("input_ids", "decoder_input_ids"):
        if name in other and not set(other) & {"pixel_values", "image_grid_thw"}:
            other[name] = (other[name] + 1).clamp(max=99)
    return [one, other]


def step(model, optimizer, batch, number):
    set_seed(number)
    loss_of(model, copy.deepcopy(batch)).backward()
    optimizer.step()
    optimizer.zero_grad()


def by_run(model, data, depths, cache):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = {"activation_cache": cache, "first_decision": 2, "decide_every": 3}
    with FreezingRun(model, optimizer, STEPS, config, policy=At(depths), steps_per_epoch=2, inputs=data[0]) as run:
        for number in range(STEPS):
            model.train()
            step(model, optimizer, data[number % 2], number)
            run.step()
        return run.ledger


def by_hand(model, data, depths):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    units = find_blocks(model, inputs=data[0]).units
    frozen = []
    for number in range(STEPS):
        for unit in units[: depths.get(number, 0)]:
            frozen += unit.modules.values()
            for parameter in unit.named_parameters().values():
                parameter.requires_grad_(False)
                parameter.grad = None
        model.train()
        for module in frozen:
            module.eval()
        step(model, optimizer, data[number % 2], number)
