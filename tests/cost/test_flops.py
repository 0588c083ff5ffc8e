"""FLOPs by unit: they add up to what torch counts at every depth, follow from the shapes, and leave the run alone."""

import json

import peft
import pytest
import torch
import transformers as t
from architectures import ARCHITECTURES, TEXT, build
from counting import counted
from metered import BERT_LAYER, HIDDEN, LENGTH, ROWS, Bench, assert_as_torch_counts, with_adapters
from torch import nn
from training import assert_same_run, smartfrz, train
from versions import checkpoint_activations

from smartfrz_hf import SmartFRZCallback, SmartFRZConfig, find_blocks
from smartfrz_hf._compat import has_input_grads
from smartfrz_hf.cost.flops import ComputeMeter
from smartfrz_hf.cost.ledger import Flops

BERT_HEAD = 2 * ROWS * (HIDDEN**2 + 2 * HIDDEN)


def total(by_unit):
    return sum(flops.total for flops in by_unit.values())


@pytest.mark.parametrize("depth", ["none", "one", "half", "all"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_totals_are_what_torch_counts(name, depth):
    bench = Bench.of(name)
    assert_as_torch_counts(bench, {"none": 0, "one": 1, "half": len(bench.stack) // 2, "all": len(bench.stack)}[depth])


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_totals_under_activation_checkpointing(name, checkpointing, depth):
    assert_as_torch_counts(Bench.of(name, checkpointing=checkpointing), depth)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # from peft
@pytest.mark.parametrize("depth", [0, 2])
def test_totals_of_adapters_that_compute_with_complex_numbers(depth):
    """FourierFT makes the change of a weight from some of its frequencies."""
    config = peft.FourierFTConfig(n_frequency=20, target_modules=["query", "value"], task_type="SEQ_CLS")
    bench = Bench(peft.get_peft_model(build("bert"), config), ARCHITECTURES["bert"].batch(build("bert")))
    # The kernel of BERT's attention, which has dropout, leaves out the gradient of keys that need none.
    assert_as_torch_counts(bench, depth, tolerance=0.02)


def test_depths_may_come_in_any_order():
    """One counted pass serves all of them, in whatever state it was made."""
    bench = Bench.of("bert")
    for depth in (3, 1, 0, 4, 2):
        assert_as_torch_counts(bench, depth)


@pytest.mark.parametrize("transposed", [False, True])
def test_torch_charges_the_gradient_of_a_grouped_convolution_for_each_group(transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    channels, x = 8, torch.randn(2, 8, 10, 10, requires_grad=True)
    grouped, alone = kind(channels, channels, 3, groups=channels), kind(1, 1, 3)
    forward = counted(lambda: grouped(x))
    # The same work, channel by channel, where there is nothing to be wrong about.
    assert forward == channels * counted(lambda: alone(x[:, :1]))
    separate = channels * counted(alone(x[:, :1]).sum().backward, {})
    assert separate == 2 * forward == counted(grouped(x).sum().backward)
    assert counted(grouped(x).sum().backward, {}) == (1 + channels) * forward


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_bert_costs_what_its_matrices_say(checkpointing):
    bench = Bench.of("bert", checkpointing=checkpointing)
    bench.step()
    stem, *layers, head = bench.meter.unit_flops.values()
    again = 0 if checkpointing is None else BERT_LAYER
    for layer in layers:
        assert layer.forward == pytest.approx(BERT_LAYER)
        assert layer.backward == pytest.approx(2 * BERT_LAYER + again)
    assert (head.forward, head.backward) == (pytest.approx(BERT_HEAD), pytest.approx(2 * BERT_HEAD))
    assert stem == Flops()
    assert list(bench.meter.unit_flops) == [*bench.stack.names, "head"] == list(bench.meter.unit_parameters)
    assert sum(bench.meter.unit_parameters.values()) == bench.model.num_parameters()


ADAPTERS = {
    "bert": {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    "llama": {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"},
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # from peft
def test_adapters_are_counted_where_they_are():
    bench = with_adapters("bert", **ADAPTERS["bert"])
    bench.step()
    adapters = 2 * 2 * 8 * HIDDEN
    for layer in bench.stack.names[1:]:
        assert bench.meter.unit_flops[layer].forward == pytest.approx(BERT_LAYER + 2 * ROWS * LENGTH * adapters)
        assert bench.meter.unit_flops[layer].optimizer == 12 * adapters
    assert bench.meter.unit_flops["stem"] == Flops()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("layers", [None, [2, 3]], ids=["all layers", "last two"])
@pytest.mark.parametrize("depth", [0, 1, 3, 4])
@pytest.mark.parametrize("name", ADAPTERS)
def test_nothing_is_charged_for_a_frozen_base_in_front_of_the_first_adapter(name, depth, layers):
    # The kernel of BERT's attention, which has dropout, leaves out the gradient of keys that need none.
    tolerance = 0.02 if name == "bert" else 1e-6
    assert_as_torch_counts(with_adapters(name, layers_to_transform=layers, **ADAPTERS[name]), depth, tolerance)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_adapters_under_activation_checkpointing(depth, reentrant):
    bench = with_adapters("llama", layers_to_transform=[2, 3], **ADAPTERS["llama"])
    model = bench.model.base_model.model
    checkpoint_activations(model, reentrant)
    if not has_input_grads(model):  # a second time, they could not be turned off
        model.enable_input_require_grads()
    assert_as_torch_counts(Bench(bench.model, bench.batch), depth, tolerance=0.01)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_weight_that_freezing_leaves_alone_needs_the_whole_way_back(depth):
    bench = with_adapters("llama", modules_to_save=["embed_tokens"], **ADAPTERS["llama"])
    assert_as_torch_counts(bench, depth)
    table = bench.model.get_input_embeddings().weight
    assert bench.meter.unit_parameters["stem"] == 0 and bench.meter.unit_parameters["head"] >= table.numel()


def test_a_layer_that_runs_four_times_costs_four_layers():
    bench = Bench.of("albert")
    bench.step()
    layer = bench.meter.unit_flops["albert.encoder.albert_layer_groups.0"]
    assert layer.forward == pytest.approx(4 * BERT_LAYER)
    assert layer.backward == pytest.approx(2 * layer.forward)


def test_hidden_states_may_be_passed_by_keyword():
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
    model(torch.ones(2, 8)).sum().backward()
    meter.count()
    # The first block's input needs no gradient.
    assert [cost.backward for cost in meter.unit_flops.values()] == pytest.approx([0, 256, 512, 512, 0])


class Wrapped(nn.Module):
    """Takes a dictionary of features, and writes into it."""

    def __init__(self):
        super().__init__()
        self.inner = build("bert").bert

    def forward(self, features):
        features["embedding"] = self.inner(features["input_ids"], features["attention_mask"])[0][:, 0]
        return features


def test_a_wrapper_may_take_a_dictionary_and_run_several_times_a_step():
    model, batch = Wrapped(), ARCHITECTURES["bert"].batch(build("bert"))
    meter = ComputeMeter(model, find_blocks(model))
    for _ in range(2):
        two = [model(dict(batch))["embedding"] for _ in range(2)]
        (two[0] * two[1]).sum().backward()
        meter.count()
    assert meter.spent == meter.full
    layers = list(meter.unit_flops.values())[1:-1]
    assert [layer.forward for layer in layers] == pytest.approx([BERT_LAYER] * 4)
    assert meter.spent.total == pytest.approx(4 * total(meter.unit_flops))


def test_a_frozen_unit_costs_its_forward_pass_alone():
    bench = Bench.of("bert", torch.optim.AdamW)
    bench.step()
    before = bench.meter.unit_flops
    bench.freeze_to(3)
    bench.step()
    both = bench.meter.unit_flops  # the average of the two steps
    for unit in bench.stack.names[:3]:
        assert both[unit].backward == before[unit].backward / 2 and both[unit].optimizer == before[unit].optimizer / 2
        assert both[unit].forward == pytest.approx(before[unit].forward)
    assert both["head"].total == pytest.approx(before["head"].total)
    assert bench.meter.full_unit_flops == before
    assert bench.meter.full.total == pytest.approx(2 * total(before))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_what_was_never_active_costs_what_it_would(optimizer):
    plain, frozen = Bench.of("bert", optimizer), Bench.of("bert", optimizer)
    frozen.freeze_to(3)
    plain.step()
    frozen.step()
    for kind in ("forward", "backward", "optimizer"):
        assert getattr(frozen.meter.full, kind) == pytest.approx(getattr(plain.meter.full, kind))
    assert frozen.meter.spent.backward < plain.meter.full.backward / 2


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        (lambda parameters: torch.optim.SGD(parameters, 0.1), 2),
        (lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9), 7),
        (torch.optim.AdamW, 12),
    ],
)
def test_optimizer_step(optimizer, rate):
    model = build("bert")
    model.bert.encoder.layer[1].requires_grad_(False)
    bench = Bench(model, ARCHITECTURES["bert"].batch(model), optimizer)
    for _ in range(3):
        bench.step()
    table = bench.meter.unit_flops
    for unit in bench.stack.units:
        size = sum(p.numel() for p in unit.named_parameters().values() if p.requires_grad)
        assert table[unit.name].optimizer == rate * size == rate * bench.meter.unit_parameters[unit.name]
    trainable = sum(p.numel() for p in bench.model.parameters() if p.requires_grad)
    assert bench.meter.spent.optimizer == 3 * rate * trainable
    assert sum(cost.optimizer for cost in table.values()) == pytest.approx(rate * trainable)


def test_skipping_subtracts_forward_work_of_one_pass():
    bench = Bench.of("bert")
    whole = bench.step()
    served = bench.step(skip=[0, 1, 0.25])
    assert served.forward == pytest.approx(whole.forward - 1.25 * BERT_LAYER)
    assert served.backward == pytest.approx(whole.backward)
    padded = bench.step(skip=[0, -0.5, 0, 0, 0])
    assert padded.forward == pytest.approx(whole.forward + 0.5 * BERT_LAYER)
    assert bench.step().total == pytest.approx(whole.total)
    assert bench.meter.full.total == pytest.approx(4 * whole.total)
    assert bench.meter.spent.forward == pytest.approx(4 * whole.forward - 0.75 * BERT_LAYER)


def test_evaluation_is_not_counted():
    bench = Bench.of("bert")
    whole = bench.step()
    bench.model.eval()
    bench.loss()
    bench.meter.skip([1, 1, 1, 1, 1])
    assert bench.meter.take() == Flops()
    assert bench.meter.spent == whole


def test_a_training_pass_without_gradients_has_no_backward_pass():
    """Gradient caching runs each batch so, before it runs it again."""
    bench = Bench.of("bert")
    whole = bench.step()
    with torch.no_grad():
        bench.loss()
    assert bench.meter.take() == Flops(forward=pytest.approx(whole.forward))
    assert bench.meter.spent == bench.meter.full


def test_longer_batches_and_other_passes_cost_more():
    bench = Bench.of("vit")
    one = bench.step()
    bench.batch = {key: torch.cat([value, value]) for key, value in bench.batch.items()}
    assert bench.step().total == pytest.approx(2 * one.total)
    before = bench.meter.full
    bench.meter.add_forward(bench.batch["pixel_values"].numel())
    assert bench.meter.take() == Flops(forward=pytest.approx(2 * one.forward))
    assert bench.meter.full == before, "what only a freezing run does is no part of training"


def test_nothing_is_said_before_the_counted_pass_and_nothing_lost():
    counted_early, counted_late = Bench.of("bert"), Bench.of("bert")
    counted_late.meter.count()
    assert counted_late.meter.take() == counted_late.meter.spent == Flops()
    for bench in (counted_early, counted_late):
        for depth in (0, 2):
            bench.freeze_to(depth)
            bench.loss()
            if bench is counted_early:
                bench.meter.count()
    assert counted_late.meter.spent == Flops()
    counted_late.meter.count()
    assert counted_late.meter.take() == counted_late.meter.spent == counted_early.meter.spent
    assert counted_late.meter.spent.total > 0


def test_the_counted_pass_changes_nothing():
    def run(count):
        torch.manual_seed(1)
        model = build("mobilenet-v2")
        bench = Bench(model, ARCHITECTURES["mobilenet-v2"].batch(model), torch.optim.AdamW)
        for _ in range(3):
            bench.loss().backward()
            if count:
                bench.meter.count()
                bench.meter.load_state_dict(bench.meter.state_dict() | {"costs": None})
            bench.optimizer.step()
            bench.model.zero_grad()
        return bench.model.state_dict(), torch.get_rng_state()

    (counted_weights, counted_state), (weights, state) = run(True), run(False)
    assert torch.equal(counted_state, state)
    assert all(torch.equal(counted_weights[key], value) for key, value in weights.items())


def test_a_run_with_nothing_frozen_is_the_plain_run_also_with_silu(tmp_path):
    """torch's counter splits the backward pass of SiLU, so it must not see a pass of the training."""

    def run(callbacks):
        torch.manual_seed(0)
        config = t.LlamaConfig(**TEXT, num_key_value_heads=2, pad_token_id=0)
        return train(tmp_path, callbacks, t.LlamaForSequenceClassification(config), max_steps=4)

    never = SmartFRZCallback(policy="never", activation_cache=False)
    assert_same_run(run([]), run([never]))
    assert never.ledger.compute_saved == 0 < never.ledger.full.backward


def test_nothing_is_left_on_the_model():
    bench = Bench.of("bert")
    bench.step()
    bench.meter.close()
    for module in bench.model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
    assert all(vars(p).keys() == {}.keys() for p in bench.model.parameters())
    spent = bench.meter.spent
    bench.loss()
    assert bench.meter.spent == spent


def test_a_model_that_cannot_be_counted_is_estimated(monkeypatch):
    warnings = []
    monkeypatch.setattr("smartfrz_hf.cost.flops.logger.warning", warnings.append)
    bench = Bench.of("bert")
    bench.loss().backward()
    forward = bench.model.forward
    bench.model.forward = lambda *args, **kwargs: 1 / 0
    bench.meter.count()
    bench.model.forward = forward
    bench.step()
    assert len(warnings) == 1 and "ZeroDivisionError" in warnings[0]
    parameters = sum(p.numel() for p in bench.model.parameters())
    assert bench.meter.spent.forward == pytest.approx(2 * ROWS * LENGTH * 2 * parameters)
    assert bench.meter.spent.backward == pytest.approx(2 * bench.meter.spent.forward)
    bench.freeze_to(2)
    assert bench.step().backward < bench.meter.full.backward / 2


def test_state_goes_through_json():
    bench, other = Bench.of("bert", torch.optim.AdamW), Bench.of("bert", torch.optim.AdamW)
    bench.step()
    bench.freeze_to(2)
    bench.step(skip=[0, 0.5])
    bench.meter.add_forward(7)
    bench.meter.take()
    state = json.loads(json.dumps(bench.meter.state_dict()))
    other.freeze_to(2)
    other.meter.load_state_dict(state)
    assert other.meter.take() == Flops()
    for name in ("spent", "full", "unit_flops", "full_unit_flops"):
        assert getattr(other.meter, name) == getattr(bench.meter, name)
    assert bench.step() == other.step()
    assert not any(name.startswith("_") for name in state)


def test_what_was_not_yet_taken_is_taken_after_resuming():
    bench, other, earlier = Bench.of("bert"), Bench.of("bert"), Bench.of("bert")
    bench.step()
    bench.meter.add_forward(7)  # the front probe runs after the Trainer has counted the step
    state = bench.meter.state_dict()
    other.meter.load_state_dict(state)
    assert other.meter.take() == bench.meter.take() != Flops()
    earlier.meter.load_state_dict({name: value for name, value in state.items() if name != "taken"})
    assert earlier.meter.take() == Flops()


PVT = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4], "image_size": 32}
OTHERS = {
    "mobilenet-v2": lambda: build("mobilenet-v2"),
    "resnet": lambda: build("resnet"),
    "squeezebert": lambda: t.SqueezeBertForSequenceClassification(
        t.SqueezeBertConfig(**TEXT | {"intermediate_size": 64}, embedding_size=32)
    ),
    "pvt": lambda: t.PvtForImageClassification(t.PvtConfig(**PVT)),
    "lora on the last two layers": lambda: with_adapters("bert", layers_to_transform=[2, 3], **ADAPTERS["bert"]).model,
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_saved_is_what_a_run_without_freezing_costs_more(name, share):
    def run(share):
        """One step with nothing frozen and three with some: what torch counts, and what the meter says."""
        model = OTHERS[name]()
        batch = ARCHITECTURES["vit" if model.main_input_name == "pixel_values" else "bert"].batch(model)
        bench = Bench(model, batch, torch.optim.AdamW)
        fresh = bench.meter.state_dict()
        bench.loss()
        bench.meter.count()  # not in what torch counts
        bench.meter.load_state_dict(fresh | {"costs": bench.meter.state_dict()["costs"]})
        total = counted(bench.step)
        bench.freeze_to(round(share * len(bench.stack)))
        return total + sum(counted(bench.step) for _ in range(3)), bench.meter

    (spent, meter), (never, plain) = run(share), run(0)
    for said, counted_flops in ((meter.spent, spent), (meter.full, never), (plain.spent, never)):
        assert said.forward + said.backward == pytest.approx(counted_flops, rel=0.02)
    saved = 1 - (meter.spent.forward + meter.spent.backward) / (meter.full.forward + meter.full.backward)
    assert saved == pytest.approx(1 - spent / never, abs=0.02)
    if "lora" not in name:
        assert spent < never


def test_ledger_of_a_run(tmp_path):
    callback = smartfrz(0.9, first_decision=5, max_depth=2)
    train(tmp_path, [callback], gradient_accumulation_steps=2, max_steps=10)
    ledger, micro_batches = callback.ledger, 20
    assert micro_batches * total(ledger.full_unit_flops) == pytest.approx(ledger.full.total)
    updates = sum(flops.optimizer for flops in ledger.full_unit_flops.values())
    assert micro_batches * updates == pytest.approx(ledger.full.optimizer)
    assert ledger.full.optimizer == 10 * 12 * ledger.trainable_parameters
    assert ledger.spent.optimizer == ledger.full.optimizer - 5 * 12 * ledger.frozen_parameters
    for name in ledger.units[:2]:
        for kind in ("backward", "optimizer"):
            spent, full = (getattr(table[name], kind) for table in (ledger.unit_flops, ledger.full_unit_flops))
            assert spent == pytest.approx(full / 2)
    plain = json.loads(json.dumps(ledger.to_dict()))
    assert plain["full_unit_flops"]["head"].keys() == {"forward", "backward", "optimizer"}
    assert plain["freeze/compute_saved"] == ledger.compute_saved > 0


@pytest.mark.slow
def test_compiled_runs_are_counted_like_others(tmp_path):
    def spent(**settings):
        callback = SmartFRZCallback(SmartFRZConfig(policy="static", static_depth=2))
        train(tmp_path, [callback], max_steps=4, **settings)
        return callback.ledger.spent

    assert spent(torch_compile=True, torch_compile_backend="aot_eager") == spent()
