"""A run gives the weights that freezing by hand gives at the same steps, with and without the activation cache."""

import copy

import pytest
import torch
from transformers import set_seed
from zoo import build_tiny, loss_of, make_batch

from smartfrz_hf import Decision, FreezingRun, Policy, find_blocks

STEPS = 16
# One of each kind: encoders, decoders, mixtures of experts, state spaces, encoder-decoders, speech, images, towers, shared layers.
KINDS = [
    *("bert", "deberta-v2", "albert", "xlm", "funnel", "gpt2", "llama", "mixtral", "mamba", "rwkv"),
    *("t5", "bart", "whisper", "vision-encoder-decoder", "wav2vec2", "resnet", "pvt", "siglip2", "llava", "qwen2_vl"),
]


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


@pytest.mark.parametrize("kind", KINDS)
def test_final_weights(kind):
    model = build_tiny(kind)
    data = batches(model)
    stack = find_blocks(model, inputs=data[0])
    deepest = stack.deepest_safe_depth()
    depths = {0: 0, 2: min(2, deepest - 1), 5: min(len(stack) - 1, deepest)}
    hand, off, on = (copy.deepcopy(model) for _ in range(3))
    by_hand(hand, data, depths)
    by_run(off, data, depths, cache=False)
    ledger = by_run(on, data, depths, cache=True)
    assert ledger.cache.hits or ledger.cache.off or len(stack) == 2, "a stem alone is not cached"
    for (name, a), b, c in zip(
        hand.state_dict().items(), off.state_dict().values(), on.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
        torch.testing.assert_close(c, a, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert any(
        not torch.equal(a, b) for a, b in zip(model.state_dict().values(), hand.state_dict().values(), strict=True)
    )
