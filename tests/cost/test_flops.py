"""FLOPs by unit: they add up to what torch counts, follow from the shapes, and stay out of the run's way."""

import json

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from architectures import ARCHITECTURES, build
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training import smartfrz, train
from versions import checkpoint_activations

from smartfrz_hf import Freezer, Ledger, SmartFRZCallback, SmartFRZConfig, find_blocks
from smartfrz_hf.cost.flops import CPU_ATTENTION, ComputeMeter
from smartfrz_hf.cost.ledger import CacheSavings, Flops

ROWS, LENGTH, HIDDEN, INSIDE = 4, 16, 32, 37
# Four projections, attention scores and weighted values, and the two layers behind them; 2 FLOPs a multiply-add.
BERT_LAYER = 2 * ROWS * LENGTH * (4 * HIDDEN**2 + 2 * LENGTH * HIDDEN + 2 * HIDDEN * INSIDE)
BERT_HEAD = 2 * ROWS * (HIDDEN**2 + 2 * HIDDEN)


class Bench:
    """A tiny model with its meter, and one batch to train it on."""

    def __init__(self, name="bert", optimizer=None, checkpointing=None, model=None):
        self.model = build(name) if model is None else model
        if checkpointing is not None:
            checkpoint_activations(self.model, checkpointing == "reentrant")
        self.batch = ARCHITECTURES[name].batch(self.model)
        self.stack = find_blocks(self.model)
        self.optimizer = optimizer(self.model.parameters()) if optimizer else None
        self.freezer = Freezer(self.stack, self.optimizer)
        self.meter = ComputeMeter(self.model, self.stack, self.optimizer)

    def freeze_to(self, depth):
        self.freezer.freeze_to(depth)
        self.meter.recount(depth)

    def step(self, skip=None):
        """One step on one micro-batch; gives its forward and backward FLOPs."""
        self.meter.start_of_step()
        loss = self.model(**self.batch)["loss"]
        if skip is not None:
            self.meter.skip(skip)
        loss.backward()
        cost = self.meter.end_of_backward()
        if self.optimizer:
            self.optimizer.step()
            self.meter.end_of_step()
        self.model.zero_grad()
        return cost


def counted(run):
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_units_add_up_to_what_torch_counts(name, checkpointing, depth):
    bench = Bench(name, checkpointing=checkpointing)
    bench.freeze_to(depth)
    forward = counted(lambda: bench.model(**bench.batch))
    total = counted(bench.step)
    table = bench.meter.unit_flops
    assert list(table) == [*bench.stack.names, "head"]
    assert sum(cost.forward for cost in table.values()) == pytest.approx(forward, rel=1e-12)
    assert sum(cost.backward for cost in table.values()) == pytest.approx(total - forward, rel=1e-12)
    assert bench.meter.spent.total == pytest.approx(total, rel=1e-12)
    blocks = [table[name] for name in bench.stack.names[1:]]
    assert all(block.backward == 0 for block in blocks[: max(depth - 1, 0)])
    assert len({(block.forward, block.backward) for block in blocks[depth:]}) == 1, "equal blocks cost the same"


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_bert_costs_what_its_matrices_say(checkpointing):
    bench = Bench(checkpointing=checkpointing)
    bench.step()
    *layers, head = list(bench.meter.unit_flops.values())[1:]
    again = 0 if checkpointing is None else BERT_LAYER
    for layer in layers:
        assert layer.forward == pytest.approx(BERT_LAYER)
        assert layer.backward == pytest.approx(2 * BERT_LAYER + again)
    assert (head.forward, head.backward) == (pytest.approx(BERT_HEAD), pytest.approx(2 * BERT_HEAD))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # said by peft
def test_adapters_are_counted_where_they_sit():
    config = peft.LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    bench = Bench(model=peft.get_peft_model(build("bert"), config), optimizer=torch.optim.AdamW)
    total = counted(bench.step)
    table = bench.meter.unit_flops
    passes = sum(cost.forward + cost.backward for cost in table.values())
    assert passes == pytest.approx(total, rel=1e-12)
    adapters = 2 * 2 * 8 * HIDDEN
    for layer in bench.stack.names[1:]:
        assert table[layer].forward == pytest.approx(BERT_LAYER + 2 * ROWS * LENGTH * adapters)
        assert table[layer].optimizer == 12 * adapters
    assert table["stem"] == Flops()


def test_a_layer_that_runs_four_times_costs_four_layers():
    bench = Bench("albert")
    bench.step()
    layer = bench.meter.unit_flops["albert.encoder.albert_layer_groups.0"]
    assert layer.forward == pytest.approx(4 * BERT_LAYER)
    assert layer.backward >= 2 * layer.forward


def test_hidden_states_may_be_handed_over_by_keyword():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x)

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x=x)
            return x

    model = Chain()
    meter = ComputeMeter(model, find_blocks(model))
    meter.start_of_step()
    model(torch.ones(2, 8)).sum().backward()
    meter.end_of_backward()
    # The first block's input asks for no gradient.
    assert [cost.backward for cost in meter.unit_flops.values()] == pytest.approx([0, 256, 512, 512, 0])


def test_a_frozen_unit_costs_its_forward_pass_alone():
    bench = Bench(optimizer=torch.optim.AdamW)
    bench.step()
    before = bench.meter.unit_flops
    assert not bench.meter.counting
    bench.freeze_to(3)
    assert bench.meter.counting
    bench.step()
    after = bench.meter.unit_flops
    for unit in bench.stack.names[:3]:
        assert after[unit] == Flops(forward=pytest.approx(before[unit].forward))
    for unit in bench.stack.names[4:]:
        assert after[unit].total == pytest.approx(before[unit].total)
    assert bench.meter.full_unit_flops == before
    assert bench.meter.full.total == pytest.approx(2 * sum(before.values(), Flops()).total)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_what_was_never_active_is_estimated(optimizer):
    plain, frozen = Bench(optimizer=optimizer), Bench(optimizer=optimizer)
    frozen.freeze_to(3)
    plain.step()
    frozen.step()
    assert frozen.meter.full.forward == plain.meter.full.forward == frozen.meter.spent.forward
    # The first active block takes no gradient to its input.
    assert frozen.meter.full.backward == pytest.approx(plain.meter.full.backward, rel=0.1)
    assert frozen.meter.spent.backward < plain.meter.full.backward / 2
    assert frozen.meter.full.optimizer == pytest.approx(plain.meter.full.optimizer)


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        (lambda parameters: torch.optim.SGD(parameters, 0.1), 2),
        (lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9), 7),
        (torch.optim.AdamW, 12),
    ],
)
def test_optimizer_step(optimizer, rate):
    bench = Bench(optimizer=optimizer)
    bench.model.bert.encoder.layer[1].requires_grad_(False)
    for _ in range(3):
        bench.step()
    table = bench.meter.unit_flops
    for unit in bench.stack.units:
        size = sum(p.numel() for p in unit.named_parameters().values() if p.requires_grad)
        assert table[unit.name].optimizer == rate * size
    trainable = sum(p.numel() for p in bench.model.parameters() if p.requires_grad)
    assert bench.meter.spent.optimizer == 3 * rate * trainable
    assert sum(cost.optimizer for cost in table.values()) == rate * trainable


def test_a_step_that_overflows_updates_nothing():
    bench = Bench()
    bench.model.bert.pooler.dense.weight.register_hook(lambda grad: grad * float("inf"))
    Accelerator(cpu=True)
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(bench.model.parameters()), scaler=torch.amp.GradScaler("cpu"))
    meter = ComputeMeter(bench.model, bench.stack, optimizer)
    optimizer.scaler.scale(bench.model(**bench.batch)["loss"]).backward()
    optimizer.step()
    meter.end_of_step()
    assert optimizer.step_was_skipped and meter.spent.optimizer == 0


def test_skipping_subtracts_forward_work_of_one_micro_batch():
    bench = Bench()
    whole = bench.step()
    served = bench.step(skip=[0, 1, 0.25])
    assert served.forward == pytest.approx(whole.forward - 1.25 * BERT_LAYER)
    assert served.backward == whole.backward
    padded = bench.step(skip=[0, -0.5, 0, 0, 0])
    assert padded.forward == pytest.approx(whole.forward + 0.5 * BERT_LAYER)
    assert bench.step() == whole
    assert bench.meter.full.total == pytest.approx(4 * whole.total)
    assert bench.meter.spent.forward == pytest.approx(4 * whole.forward - 0.75 * BERT_LAYER)


def test_evaluation_is_not_counted():
    bench = Bench()
    whole = bench.step()
    for due in (False, True):
        if due:
            bench.meter.recount(0)
        bench.model.eval()
        with torch.no_grad():
            bench.model(**bench.batch)
        bench.meter.skip([1, 1, 1, 1, 1])
        bench.model.train()
        assert bench.meter.end_of_backward() == Flops()
    assert bench.meter.spent == whole
    assert bench.step() == whole


def test_longer_batches_and_several_passes_cost_more():
    bench = Bench("vit")
    one = bench.step()
    bench.batch = {key: torch.cat([value, value]) for key, value in bench.batch.items()}
    assert bench.step().total == pytest.approx(2 * one.total)
    bench.meter.start_of_step()
    sum(bench.model(**bench.batch)["loss"] for _ in range(2)).backward()
    assert bench.meter.end_of_backward().total == pytest.approx(4 * one.total)


def test_counting_changes_no_result_and_draws_no_random_number():
    def run(count):
        bench = Bench(optimizer=torch.optim.AdamW)
        torch.manual_seed(1)
        for _ in range(3):
            if count:
                bench.meter.recount(0)
                bench.step()
            else:
                bench.model(**bench.batch)["loss"].backward()
                bench.optimizer.step()
                bench.model.zero_grad()
        return bench.model.state_dict(), torch.get_rng_state()

    (counted_weights, counted_state), (weights, state) = run(True), run(False)
    assert torch.equal(counted_state, state)
    assert all(torch.equal(counted_weights[key], value) for key, value in weights.items())


def test_nothing_is_left_on_the_model():
    bench = Bench()
    bench.meter.start_of_step()
    bench.model(**bench.batch)
    bench.meter.close()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in bench.model.modules())
    assert counted(lambda: bench.model(**bench.batch)) > 0
    assert bench.meter.spent == Flops()


def test_ledger_of_a_run(tmp_path):
    callback = smartfrz(0.9, first_decision=5, max_depth=2)
    train(tmp_path, [callback], gradient_accumulation_steps=2, max_steps=10)
    ledger, micro_batches = callback.ledger, 20
    full = sum(ledger.full_unit_flops.values(), Flops()) * micro_batches
    assert full.total == pytest.approx(ledger.full.total)
    assert full.optimizer == pytest.approx(ledger.full.optimizer)
    assert ledger.full.optimizer == 10 * 12 * ledger.trainable_parameters
    assert ledger.spent.optimizer == ledger.full.optimizer - 5 * 12 * ledger.frozen_parameters
    for name in ledger.units[:2]:
        assert ledger.unit_flops[name].backward == ledger.unit_flops[name].optimizer == 0
    plain = json.loads(json.dumps(ledger.to_dict()))
    assert plain["full_unit_flops"]["head"].keys() == {"forward", "backward", "optimizer"}
    assert plain["freeze/compute_saved"] == ledger.compute_saved > 0


def test_compiled_runs_are_counted_like_others(tmp_path):
    def spent(**settings):
        callback = SmartFRZCallback(SmartFRZConfig(policy="static", static_depth=2))
        train(tmp_path, [callback], max_steps=4, **settings)
        return callback.ledger.spent

    assert spent(torch_compile=True, torch_compile_backend="aot_eager") == spent()


def test_cache_savings_are_logged_where_there_is_a_cache():
    ledger = Ledger()
    assert not any("cache" in key for key in ledger.logs())
    assert ledger.to_dict()["cache"] is None
    ledger.cache = CacheSavings()
    assert ledger.cache.hit_rate == 0
    ledger.cache = CacheSavings(rows=8, hits=6, seconds_saved=1.5, bytes_memory=100, bytes_disk=20, bytes_read=700)
    assert (
        ledger.logs().items()
        >= {
            "freeze/cache_hit_rate": 0.75,
            "freeze/cache_bytes": 120,
            "freeze/cache_seconds_saved": 1.5,
        }.items()
    )
    plain = json.loads(json.dumps(ledger.to_dict()))
    assert plain["cache"]["hits"] == 6 and plain["cache"]["off"] is None
