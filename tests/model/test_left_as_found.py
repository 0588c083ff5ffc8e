"""Passes beside training leave no trace in models whose forward pass changes them."""

import copy
from collections import deque

import torch
from architectures import build
from torch import nn

from smartfrz_hf import Decision, FreezingRun, Policy, find_blocks
from smartfrz_hf.model.left_as_found import attributes_left_as_found

STEPS, WIDTH = 24, 8


class Looks(Policy):
    """Looks at everything and freezes nothing."""

    front_probe, pilot = True, 0.1
    passes = 0

    def decide(self, observation):
        assert observation.probe is not None
        type(self).passes += 1
        return Decision(0, "test")


class Counts(nn.Module):
    """A block that counts its calls in several ways, all of which its output depends on."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls, self.seen, self.names = nn.Linear(WIDTH, WIDTH), 0, deque(maxlen=5), {}
        self.nested = {"calls": []}
        self.register_buffer("sparse", torch.eye(WIDTH).to_sparse())
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.extra = False

    def forward(self, hidden):
        if not self.extra:  # once, as Transformers puts in what records hidden states
            self.extra = True
            self.linear.register_forward_hook(lambda module, args, output: output + 0.01)
        self.calls += 1
        self.seen.append(hidden.detach().mean())
        self.names[self.calls] = len(self.names)
        with torch.no_grad():
            self.mean.lerp_(hidden.mean(0), 0.1)
        self.nested["calls"].append(self.calls)
        hidden = torch.sparse.mm(self.sparse, hidden.T).T
        own = 0.1 * (self.calls + len(self.nested["calls"])) + sum(self.seen) + 0.1 * len(self.names) + self.mean
        return hidden + torch.tanh(self.linear(hidden) + own)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Counts() for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        return {"logits": self.head(hidden)}


def losses(model, observed):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    draw, found = torch.Generator().manual_seed(0), []
    config = {"first_decision": 5, "decide_every": 2, "activation_cache": False}
    run = (
        FreezingRun(model, optimizer, STEPS, config, policy=Looks(), inputs={"x": torch.zeros(2, 4)})
        if observed
        else None
    )
    for _ in range(STEPS):
        loss = model(torch.randn(4, 4, generator=draw))["logits"].logsumexp(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if run is not None:
            run.step()
        found.append(loss.item())
    if run is not None:
        run.close()
    return found


def test_a_run_that_only_looks_is_a_plain_one():
    torch.manual_seed(0)
    model = Net()
    expected = losses(copy.deepcopy(model), False)
    assert losses(copy.deepcopy(model), True) == expected
    assert Looks.passes > 5


def test_buffers_without_data_are_left_alone():
    model = build("bert").to("meta")
    with attributes_left_as_found(model):
        model.marked = True
    assert not hasattr(model, "marked")


def test_outputs_are_recorded_once_after_a_pass_that_found_the_blocks():
    model, batch = build("bert"), {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    before = len(model(**batch, output_hidden_states=True).hidden_states)
    model = build("bert")
    find_blocks(model)
    for _ in range(2):
        assert len(model(**batch, output_hidden_states=True).hidden_states) == before
