"""Modules of one's own under the cache: whatever their blocks do beside their output, losses are those without it."""

import copy
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from by_hand import At
from torch import nn

from smartfrz_hf import FreezingRun

WIDTH, ROWS, LENGTH, STEPS = 8, 8, 7, 24
pytestmark = pytest.mark.usefixtures("patient")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        return hidden + torch.tanh(self.linear(hidden))


class Net(nn.Module):
    """An embedding, four blocks and a head that reads the mean of what is not padding."""

    block: type[nn.Module] = Block
    classes = 2

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(self.block() for _ in range(4))
        self.head = nn.Linear(WIDTH, self.classes)

    def encode(self, input_ids):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def forward(self, input_ids, attention_mask):
        hidden = self.encode(input_ids) * attention_mask.unsqueeze(-1)
        return {"logits": self.head(hidden.sum(1) / attention_mask.sum(1, keepdim=True))}

    def loss(self, output, labels):
        return nn.functional.cross_entropy(output["logits"], labels)

    def before_step(self, number):
        """What the training loop does to the model."""


class Keeps(Block):
    """Leaves its output behind, in a list."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def forward(self, hidden):
        self.kept = [super().forward(hidden)]
        return self.kept[0]


class ReadsWhatABlockKeeps(Net):
    block = Keeps

    def encode(self, input_ids):
        return super().encode(input_ids) + self.blocks[0].kept[0]


class ReadsALossOfTheBlocks(Net):
    block = Keeps

    def forward(self, input_ids, attention_mask):
        output = super().forward(input_ids, attention_mask)
        return output | {"penalty": sum(block.kept[0].pow(2).mean() for block in self.blocks)}

    def loss(self, output, labels):
        return super().loss(output, labels) + output["penalty"]


class LossReadsWhatABlockKeeps(Net):
    """The loss, outside the model, reads what the second block has left behind."""

    block = Keeps

    def loss(self, output, labels):
        return super().loss(output, labels) + self.head(self.blocks[1].kept[0]).pow(2).mean()


class Notes:
    values = None


class KeepsInAnObject(Block):
    def __init__(self):
        super().__init__()
        self.notes = Notes()

    def forward(self, hidden):
        self.notes.values = super().forward(hidden)
        return self.notes.values


class LossReadsAnObject(Net):
    block = KeepsInAnObject

    def loss(self, output, labels):
        return super().loss(output, labels) + self.head(self.blocks[1].notes.values).pow(2).mean()


class EverySecond(Block):
    """Scales every second call."""

    calls = 0

    def forward(self, hidden):
        self.calls += 1
        return super().forward(hidden) * (1 + self.calls % 2)


class Alternates(Net):
    block = EverySecond


@dataclass
class Features:
    first: torch.Tensor
    last: torch.Tensor


class ReturnsAnObject(Net):
    """The loss, outside the model, reads what the first block has returned, and padding."""

    def forward(self, input_ids, attention_mask):
        hidden, features = self.embed(input_ids), []
        for block in self.blocks:
            hidden = block(hidden)
            features.append(hidden)
        return Features(features[0], hidden)

    def loss(self, output, labels):
        return nn.functional.cross_entropy(self.head((output.first + output.last).mean(1)), labels)


class Ranked(Block):
    """As an expert of little capacity: takes the first row that asks for it."""

    def forward(self, hidden):
        wanted = (hidden.detach().mean((1, 2)) > 0).float()
        taken = wanted * (wanted.cumsum(0) <= 1)
        return hidden + taken[:, None, None] * self.linear(hidden)


class RanksRows(Net):
    block = Ranked


class Centered(Block):
    """Subtracts the mean of the rows."""

    def forward(self, hidden):
        return hidden + torch.tanh(self.linear(hidden - hidden.mean(0)))


class CentersRows(Net):
    block = Centered


class SomeRowsOnly(Net):
    """The second block runs for some of the rows."""

    def encode(self, input_ids):
        hidden = self.embed(input_ids)
        for number, block in enumerate(self.blocks):
            chosen = input_ids[:, 0] % 2 == 0 if number == 1 else torch.ones(len(input_ids), dtype=torch.bool)
            hidden = hidden.masked_scatter(chosen[:, None, None], block(hidden[chosen]))
        return hidden


class AsManyClassesAsTokens(Net):
    classes = LENGTH


class Writes(Block):
    """Writes to what enters it."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(WIDTH))

    def forward(self, hidden):
        hidden += self.shift
        return super().forward(hidden)


class WritesInPlace(Net):
    block = Writes


class ScaledByANumber(Net):
    scale = np.float32(1)

    def encode(self, input_ids):
        hidden = self.embed(input_ids) * float(self.scale)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def before_step(self, number):
        self.scale = np.float32(1 if number < 16 else 2)


class ScaledByATensorInADict(ScaledByANumber):
    def before_step(self, number):
        self.options = {"scale": torch.tensor(1.0 if number < 16 else 2.0)}

    @property
    def scale(self):
        return self.options["scale"]


class Tabled(Block):
    """Makes a table when it first runs."""

    table = None

    def forward(self, hidden):
        if self.table is None:
            self.table = torch.linspace(0, 1, LENGTH)[:, None]
        return super().forward(hidden + self.table[: hidden.shape[1]])


class MakesATable(Net):
    block = Tabled


def losses(model, padded, cache, size, shuffle, freezes=3):
    """Of a short training whose front freezes at step 3; and what the cache has done."""
    draw, order = torch.Generator().manual_seed(1), random.Random(0)
    ids, mask = torch.randint(1, 50, (ROWS, LENGTH), generator=draw), torch.ones(ROWS, LENGTH, dtype=torch.long)
    if padded:
        for row in range(ROWS):
            mask[row, LENGTH - row % 4 :] = 0
    optimizer, found, waiting = torch.optim.SGD(model.parameters(), lr=0.05), [], []
    config = {"activation_cache": cache, "first_decision": 2, "decide_every": 1}
    model.before_step(0)
    batch, epoch = {"input_ids": ids[:size], "attention_mask": mask[:size]}, ROWS // size
    with FreezingRun(
        model, optimizer, STEPS, config, policy=At({0: 0, freezes: 3}), steps_per_epoch=epoch, inputs=batch
    ) as run:
        for number in range(STEPS):
            waiting = waiting or (order.sample(range(ROWS), ROWS) if shuffle else [*range(ROWS)])
            rows, waiting = waiting[:size], waiting[size:]
            model.before_step(number)
            loss = model.loss(model(input_ids=ids[rows], attention_mask=mask[rows]), torch.tensor(rows) % 2)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
            found.append(loss.item())
    return found, run.ledger.cache


# Why the cache stands aside, where it has to.
MODELS = {
    Net: None,
    ReadsWhatABlockKeeps: "keep something of each batch",
    ReadsALossOfTheBlocks: "keep something of each batch",
    ReturnsAnObject: "it returns a Features, in which no tensors can be seen",
    LossReadsWhatABlockKeeps: "keep something of each batch",
    LossReadsAnObject: "keep something of each batch",
    Alternates: "keep something of each batch",
    RanksRows: "depends on the other rows of the batch",
    CentersRows: "depends on the other rows of the batch",
    SomeRowsOnly: "does not have one entry per row",
    AsManyClassesAsTokens: None,
    MakesATable: None,
    WritesInPlace: None,
    ScaledByANumber: None,
    ScaledByATensorInADict: None,
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("shuffle", [True, False], ids=["", "in order"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("kind", MODELS)
def test_losses_are_those_without(kind, padded, shuffle, size):
    torch.manual_seed(0)
    model = kind().train()
    expected, _ = losses(copy.deepcopy(model), padded, False, size, shuffle)
    found, savings = losses(copy.deepcopy(model), padded, True, size, shuffle)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    if not shuffle:  # what one row does to another is not to be seen
        return
    if MODELS[kind] is not None:
        assert MODELS[kind] in savings.off
    else:
        assert savings.hits and savings.off is None


def test_a_table_made_behind_the_freeze_is_none_of_a_batch():
    torch.manual_seed(0)
    model = MakesATable().train()
    expected, _ = losses(copy.deepcopy(model), False, False, 1, False, freezes=0)
    found, savings = losses(copy.deepcopy(model), False, True, 1, False, freezes=0)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert savings.hits and savings.off is None
