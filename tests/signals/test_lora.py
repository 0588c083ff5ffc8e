"""The history of a LoRA layer samples the change of its weight matrix, B·A."""

import peft
import pytest
import torch
from architectures import build
from torch import nn
from training import predictor_that_says, train
from transformers.pytorch_utils import Conv1D

from smartfrz_hf import SmartFRZCallback, SmartFRZConfig, find_blocks
from smartfrz_hf.model.units import Unit
from smartfrz_hf.signals.lora import lora_changes
from smartfrz_hf.signals.weights import WeightSampler

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # by peft


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.turned = nn.Linear(6, 5), Conv1D(7, 6)
        self.embedding = nn.Embedding(9, 6)
        self.conv, self.grouped = nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 2, groups=2)


def adapted(names, module=None, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False, **options)
    return peft.get_peft_model(module or Layers(), config)


def changes_of(model):
    return list(lora_changes([model], {p for p in model.parameters() if p.requires_grad}))


def unit_of(module):
    return Unit("unit", {"module": module})


def every_element(change):
    return change.at(torch.unravel_index(torch.arange(change.numel()), change.shape)).reshape(change.shape)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["linear", "turned", "embedding", "conv"])
def test_elements_are_those_that_peft_merges(name, rslora):
    model = adapted([name], use_rslora=rslora, lora_alpha=3, fan_in_fan_out=name == "turned")
    (change,) = changes_of(model)
    whole = model.base_model.model.get_submodule(name).get_delta_weight("default").flatten(1)
    torch.testing.assert_close(every_element(change), whole.T if name in ("turned", "embedding") else whole)


def test_active_adapters_add_up():
    model = adapted(["linear"])
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["linear"], init_lora_weights=False))
    (change,) = changes_of(model)
    layer = model.base_model.model.linear
    torch.testing.assert_close(every_element(change), layer.get_delta_weight("default"))
    layer.set_adapter(["default", "other"])
    both = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    torch.testing.assert_close(every_element(change), both)


@pytest.mark.parametrize(
    ("names", "options"),
    [(["linear"], {"use_dora": True}), (["grouped"], {})],
    ids=["DoRA", "grouped convolution"],
)
def test_what_is_no_product_is_read_as_it_is(names, options):
    model = adapted(names, **options)
    assert not changes_of(model)
    units = [unit_of(model)]
    products, factors = WeightSampler(units, 40, lora_products=True), WeightSampler(units, 40)
    assert torch.equal(products.read([0])[0], factors.read([0])[0]) and products.read([0])[0].any()


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["linear"], feedforward_modules=[]),
        peft.LoHaConfig(r=2, target_modules=["linear"], init_weights=False),
        peft.OFTConfig(oft_block_size=3, target_modules=["linear"]),
        peft.AdaLoraConfig(init_r=2, target_modules=["linear"], total_step=10),
        peft.VeraConfig(r=2, target_modules=["linear"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_adapters_are_read_as_they_are(config):
    module = Layers()
    module.config = {"model_type": "custom"}
    model = peft.get_peft_model(module, config)
    units = [unit_of(model)]
    assert torch.equal(
        WeightSampler(units, 40, lora_products=True).read([0])[0], WeightSampler(units, 40).read([0])[0]
    )


def test_other_trainable_matrices_stay_in_the_sample():
    model = adapted(["linear"], modules_to_save=["conv"])
    sampler = WeightSampler([unit_of(model)], 5 * 6 + 4 * 3 * 2 * 2, lora_products=True)
    before = sampler.read([0])[0]
    with torch.no_grad():
        model.base_model.model.conv.modules_to_save["default"].weight += 1
    moved = sampler.read([0])[0] - before
    assert int((moved != 0).sum()) == 4 * 3 * 2 * 2
    with torch.no_grad():
        model.base_model.model.linear.lora_B["default"].weight.zero_()
    assert int((sampler.read([0])[0] == 0).sum()) == 5 * 6, "the base matrix is left out"


def test_runs_sample_products():
    from smartfrz_hf import FreezingRun

    model = peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query", "value"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    config = SmartFRZConfig(start_stage=False)
    with FreezingRun(model, optimizer, 20, config, predictor=predictor_that_says(0.1)) as run:
        assert run.observer.sampler.lora_products
        assert not run.observer.history.start[1:].any(), "B is zero at first"


def test_pilot_reads_the_gradients_of_the_factors(tmp_path):
    model = peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query", "value"]))
    callback = SmartFRZCallback(SmartFRZConfig(target_saving=0.3), predictor_that_says(0.1))
    train(tmp_path, [callback], model, max_steps=40)
    assert callback.ledger.start is not None and callback.ledger.start.depth > 0


def test_units_of_a_plain_model_have_no_product():
    stack = find_blocks(build("bert"))
    assert not changes_of(stack.model)
