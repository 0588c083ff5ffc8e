"""Units are found, named and ordered right on every architecture, and refused where there is no order."""

import peft
import pytest
import torch
from architectures import ARCHITECTURES, TEXT, build
from torch import nn
from transformers import BertModel, T5Config, T5ForConditionalGeneration, VisionTextDualEncoderModel

from smartfrz_hf import find_blocks
from smartfrz_hf.model.units import unwrap_model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_and_stem(name):
    architecture = ARCHITECTURES[name]
    stack = find_blocks(build(name))
    assert stack.names == ["stem"] + [f"{architecture.blocks}.{i}" for i in range(architecture.count)]
    assert tuple(stack.stem.modules) == architecture.stem


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_order_is_the_order_in_which_hooks_fire(name):
    model = build(name)
    stack = find_blocks(model)
    fired = []
    for unit in stack.units:
        for module in unit.modules.values():
            module.register_forward_hook(lambda *_, unit=unit: fired.append(unit.name))
    model(**ARCHITECTURES[name].batch(model))
    assert list(dict.fromkeys(fired)) == stack.names


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_is_in_one_unit_or_the_head(name):
    model = build(name)
    stack = find_blocks(model)
    inside = [parameter for unit in stack.units for parameter in unit.named_parameters()]
    assert len(inside) == len(set(inside))
    names = {parameter for parameter, _ in model.named_parameters()}
    assert set(inside) <= names
    head = names - set(inside)
    assert head or name in ("gpt2",), "only a model whose head is tied to its stem has none of its own"
    assert not any(parameter.startswith(ARCHITECTURES[name].blocks) for parameter in head)


@pytest.mark.parametrize("name", ["bert", "resnet", "deberta-v2"])
def test_finding_changes_nothing(name):
    model = build(name)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    find_blocks(model)
    assert all(module.training for module in model.modules())
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_registration_order_stands_in_where_the_model_cannot_run(monkeypatch):
    for name in ("bert", "deberta-v2", "mpnet", "vit", "llama", "resnet"):
        traced = find_blocks(build(name))
        model = build(name)
        monkeypatch.setattr(type(model.base_model), "main_input_name", "nothing_it_knows")
        monkeypatch.setattr(type(model.base_model), "dummy_inputs", {})
        found = find_blocks(model)
        assert found.names == traced.names
        assert not any(unit.runs_once for unit in found.units)
        # DeBERTa's norm of the shared positions is the one thing with weights that only running the model can place.
        unplaced = {"deberta.encoder.LayerNorm", "model.rotary_emb"}
        assert set(traced.stem.modules) - set(found.stem.modules) <= unplaced


def test_albert_block_is_known_to_repeat():
    assert not find_blocks(build("albert")).units[1].runs_once
    assert all(unit.runs_once for unit in find_blocks(build("bert")).units[1:])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft 0.21 still asks for it
def test_wrapped_models_are_unwrapped():
    model = build("bert")
    names = find_blocks(model).names
    assert find_blocks(torch.compile(model)).names == names
    assert find_blocks(nn.DataParallel(model)).names == names
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert find_blocks(nn.parallel.DistributedDataParallel(model)).names == names
    finally:
        torch.distributed.destroy_process_group()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], modules_to_save=None))
    stack = find_blocks(adapted)
    assert stack.names == names
    assert unwrap_model(adapted) is model
    assert any("lora_A" in name for name in stack.units[1].named_parameters())
    assert not stack.stem.trainable and stack.units[1].trainable


def test_blocks_by_hand():
    model = nn.Sequential()
    for name in ("entry", "left", "right", "exit"):
        model.add_module(name, nn.Linear(3, 3))
    stack = find_blocks(model, blocks=["left", "ri*"])
    assert stack.names == ["stem", "left", "right"]
    assert list(stack.stem.modules) == ["entry"]
    with pytest.raises(ValueError, match=r"no such module.*'entry', 'left', 'right', 'exit'"):
        find_blocks(model, blocks=["centre"])
    bert = build("bert")
    assert find_blocks(bert, blocks=["*.layer.?"]).names == find_blocks(bert).names
    with pytest.raises(ValueError, match="must not overlap"):
        find_blocks(bert, blocks=["bert.encoder.layer.0", "bert.encoder"])


def test_models_without_an_order_are_refused():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4))
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration is an encoder-decoder.*blocks="):
        find_blocks(t5)
    towers = VisionTextDualEncoderModel(
        vision_model=build("vit").base_model, text_model=BertModel(build("bert").config)
    )
    with pytest.raises(ValueError, match=r"VisionTextDualEncoderModel has 2 separate stacks.*blocks="):
        find_blocks(towers)
    with pytest.raises(ValueError, match=r"Linear has no repeated blocks.*blocks="):
        find_blocks(nn.Linear(2, 2))


def test_stack_is_of_the_model_it_was_given():
    model = BertModel(build("bert").config)
    stack = find_blocks(model)
    assert stack.model is model and stack.backbone is model
    assert len(stack) == TEXT["num_hidden_layers"] + 1
    assert stack.blocks == list(model.encoder.layer)
