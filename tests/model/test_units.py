"""Units are found, named and ordered right on every architecture, and refused where there is no order."""

import json
import re
from collections import OrderedDict

import peft
import pytest
import torch
from architectures import ARCHITECTURES, TEXT, build
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_models import ClassifierFirst, OddOrder, bart, clip, dual_encoder, llava, t5, wav2vec2, whisper
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaModel, PreTrainedModel
from versions import VISION_TOWER
from zoo import build_tiny

from smartfrz_hf import find_blocks
from smartfrz_hf.model.discovery import NoOrderError, find_stacks
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


def refuse(*args, **kwargs):
    raise RuntimeError("this model does not run")


def test_names_and_types_stand_in_where_the_model_cannot_run(monkeypatch):
    for name in ("bert", "deberta-v2", "mpnet", "vit", "llama", "resnet"):
        traced = find_blocks(build(name))
        model = build(name)
        monkeypatch.setattr(type(model.base_model), "forward", refuse)
        untraced = find_blocks(model)
        assert untraced.names == traced.names
        assert not any(unit.runs_once for unit in untraced)
        # DeBERTa's norm of the shared positions is the one thing with weights that only running the model can place.
        unplaced = {"deberta.encoder.LayerNorm", "model.rotary_emb"}
        assert set(traced.stem.modules) - set(untraced.stem.modules) <= unplaced


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
    assert list(stack.stem.modules) == ["entry"], "a Sequential runs as it is registered"
    with pytest.raises(ValueError, match=r"no such module.*'entry', 'left', 'right', 'exit'"):
        find_blocks(model, blocks=["centre"])
    bert = build("bert")
    assert find_blocks(bert, blocks=["*.layer.?"]).names == find_blocks(bert).names
    with pytest.raises(ValueError, match="must not overlap"):
        find_blocks(bert, blocks=["bert.encoder.layer.0", "bert.encoder"])


def test_models_without_blocks_are_refused():
    with pytest.raises(ValueError, match=r"Linear has no repeated blocks.*blocks="):
        find_blocks(nn.Linear(2, 2))


def hinted(model):
    with pytest.raises(ValueError, match="has no repeated blocks") as refused:
        find_blocks(model)
    return json.loads(re.search(r"`SmartFRZConfig\(blocks=(\[.*\])\)`", str(refused.value))[1])


names = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=2, max_size=6, unique=True)


@settings(deadline=None, max_examples=25)
@given(names=names, around=st.lists(st.sampled_from(["net", "body"]), max_size=2))
def test_the_hint_for_a_model_without_blocks_can_be_followed(names, around):
    model = nn.Sequential(OrderedDict((name, nn.Linear(3, 3)) for name in names) | {"act": nn.ReLU()})
    for name in around:
        model = nn.Sequential(OrderedDict({name: model}))
    path = "".join(f"{name}." for name in reversed(around))
    blocks = hinted(model)
    assert blocks == [f"{path}{name}" for name in names[:-1]][:4]
    assert find_blocks(model, blocks).names == ["stem", *blocks]


def test_the_hint_leaves_out_the_head():
    class Network(PreTrainedModel):
        config_class, base_model_prefix = BertConfig, "body"

        def __init__(self, config):
            super().__init__(config)
            self.body = nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Linear(3, 3)})
            self.classifier = nn.Linear(3, 2)

    assert hinted(Network(BertConfig())) == ["body.first", "body.second"]
    assert hinted(nn.Linear(2, 2)) == ["..."]


def test_encoder_then_decoder():
    stack = find_blocks(t5())
    blocks = [f"{part}.block.{i}" for part in ("encoder", "decoder") for i in range(2)]
    assert stack.names == ["stem", *blocks]
    # The table that both and the head share is the stem's. The norm behind the encoder trains until the decoder freezes.
    assert list(stack.stem.named_parameters()) == ["encoder.embed_tokens.weight"]
    assert {"encoder.final_layer_norm", "decoder.block.0"} <= set(stack["decoder.block.0"].modules)
    assert set(stack.head_parameters()) == {"decoder.final_layer_norm.weight"}


def test_a_head_that_is_tied_to_the_decoder_trains_as_long_as_it():
    stack = find_blocks(whisper())
    assert "model.decoder.embed_tokens" in stack["model.decoder.layers.0"].modules
    assert [name for name in stack.names if "encoder" in name] == stack.names[1:3]


def test_towers_follow_each_other():
    stack = find_blocks(clip())
    assert stack.names[1:5] == [f"vision_model.encoder.layers.{i}" for i in range(4)] or stack.names[1:5] == [
        f"text_model.encoder.layers.{i}" for i in range(4)
    ]
    assert len(stack) == 9
    other = stack.names[5]
    assert set(stack[other].modules) > {other}, "a tower's embeddings belong to its first block"


def test_the_first_batch_shows_what_a_made_up_one_does_not():
    model, batch = (
        llava(),
        {"input_ids": torch.tensor([[1, *[98] * 16, 5]]), "pixel_values": torch.zeros(1, 3, 32, 32)},
    )
    alone = find_blocks(model)
    assert alone.names[1:] == [f"model.language_model.layers.{i}" for i in range(4)]
    assert f"{VISION_TOWER}.encoder.layers of LlavaForConditionalGeneration did not run" in alone.problem
    stack = find_blocks(model, inputs=lambda: batch)
    assert not stack.problem
    assert stack.names[1:5] == [f"{VISION_TOWER}.encoder.layers.{i}" for i in range(4)]
    first = stack["model.language_model.layers.0"]
    assert {"model.multi_modal_projector", "model.language_model.embed_tokens"} <= set(first.modules)


def test_a_tower_that_is_frozen_already_is_stem():
    model, batch = (
        llava(),
        {"input_ids": torch.tensor([[1, *[98] * 16, 5]]), "pixel_values": torch.zeros(1, 3, 32, 32)},
    )
    model.model.vision_tower.requires_grad_(False)
    stack = find_blocks(model, inputs=batch)
    assert stack.names[1:] == [f"model.language_model.layers.{i}" for i in range(4)]
    assert "model.multi_modal_projector" in stack.stem.modules


def test_several_stacks_that_cannot_be_run_are_listed(monkeypatch):
    model = dual_encoder()
    monkeypatch.setattr(type(model), "forward", refuse)
    with pytest.raises(NoOrderError, match=r"2 stacks.*this model does not run.*blocks=\['vision_model.*\.\*'\]"):
        find_blocks(model)


def test_lists_that_alternate_and_lists_in_lists():
    xlm = find_blocks(build_tiny("xlm"))
    assert xlm.names[1:] == ["transformer.attentions.0", "transformer.attentions.1"]
    assert "transformer.ffns.0" in xlm[1].modules
    assert find_blocks(build_tiny("pvt")).names[2:4] == ["pvt.encoder.block.0.1", "pvt.encoder.block.1.0"]
    nested = nn.Module()
    nested.stages = nn.ModuleList(
        nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2)) for _ in range(2)
    )
    assert find_stacks(nested) == {"stages": ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]}


def test_stack_is_of_the_model_it_was_given():
    model = BertModel(build("bert").config)
    stack = find_blocks(model)
    assert stack.model is model and stack.backbone is model
    assert len(stack) == TEXT["num_hidden_layers"] + 1
    assert stack.blocks == list(model.encoder.layer)


BESIDE = {
    "T5's decoder": (
        t5,
        ["encoder.block.*"],
        {"encoder.embed_tokens", "encoder.dropout"},
    ),
    "BART's decoder": (
        bart,
        ["model.encoder.layers.*"],
        {f"model.encoder.{part}" for part in ("embed_tokens", "embed_positions", "layernorm_embedding")},
    ),
    "Whisper's decoder": (
        whisper,
        ["model.encoder.layers.*"],
        {f"model.encoder.{part}" for part in ("conv1", "conv2", "embed_positions")},
    ),
    "CLIP's text tower": (
        clip,
        ["vision_model.encoder.layers.*"],
        {"vision_model.embeddings", "vision_model.pre_layrnorm"},
    ),
    "CLIP's vision tower": (clip, ["text_model.encoder.layers.*"], {"text_model.embeddings"}),
    "the other encoder": (dual_encoder, ["text_model.encoder.layer.*"], {"text_model.embeddings"}),
    "the final norm": (
        wav2vec2,
        ["wav2vec2.encoder.layers.*"],
        {
            "wav2vec2.feature_extractor",
            "wav2vec2.feature_projection",
            "wav2vec2.encoder.pos_conv_embed",
            "wav2vec2.encoder.dropout",
        },
    ),
    "the vision tower and its projector": (
        llava,
        ["model.language_model.layers.*"],
        {"model.language_model.embed_tokens", "model.language_model.rotary_emb"},
    ),
    "the language model": (
        llava,
        [f"{VISION_TOWER}.encoder.layers.*"],
        {f"{VISION_TOWER}.embeddings", f"{VISION_TOWER}.pre_layrnorm"},
    ),
    "a classifier that is declared first": (ClassifierFirst, None, {"encoder.embeddings"}),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_the_stem_holds_only_what_the_first_block_reads(beside):
    make, blocks, stem = BESIDE[beside]
    stack = find_blocks(make(), blocks)
    assert set(stack.stem.modules) == stem
    assert set(stack.stem.own) <= {"wav2vec2.masked_spec_embed"}


def test_what_runs_early_and_is_read_late_is_head():
    stack = find_blocks(OddOrder(BertConfig(**TEXT)))
    assert set(stack.stem.modules) == {"embed", "extras.norm"} and set(stack.stem.own) == {"positions"}
    assert [list(unit.modules) for unit in stack.units[1:]] == [
        ["blocks.0", "between.0"],
        ["blocks.1", "between.1"],
        ["blocks.2"],
    ]
    head = {name.rsplit(".", 1)[0] for name in stack.head_parameters()}
    exits = {f"early_exits.{i}" for i in range(3)}
    assert head == {"classifier", "temperature", "skip", "extras.exit", "between.2"} | exits


def test_a_stem_that_cannot_be_found_is_named_by_hand():
    model = OddOrder(BertConfig(**TEXT), runs=False)
    with pytest.raises(ValueError, match=r"'classifier' \(Linear\) is registered in front.*stem="):
        find_blocks(model)
    stack = find_blocks(model, stem=["embed", "positions", "extras.norm"])
    assert list(stack.stem.modules) == ["embed", "extras.norm"] and list(stack.stem.own) == ["positions"]
    assert len(stack) == 4 and "classifier.weight" in stack.head_parameters()
    with pytest.raises(ValueError, match=r"`stem` names 'embeds'.*no such module"):
        find_blocks(model, stem=["embeds"])
    for named, block in (("blocks.1", "blocks.1"), ("blocks", "blocks.0")):
        with pytest.raises(ValueError, match=f"`stem` names '{named}', in which the block '{block}' lies"):
            find_blocks(model, stem=["embed", named])
    model.runs = True
    wider = find_blocks(model, stem=["embed", "extras.*", "between.0"])
    assert list(wider.stem.modules) == ["embed", "extras.norm", "extras.exit", "between.0"]
    assert list(wider.units[1].modules) == ["blocks.0"], "nothing is in two units"


def test_flags_survive_the_search():
    model = build("bert")
    frozen = next(iter(model.bert.embeddings.parameters())).requires_grad_(False)
    find_blocks(model)
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert all(p.grad is None for p in model.parameters())


def test_a_stack_is_a_sequence_of_units():
    stack = find_blocks(build("bert"))
    assert list(stack) == list(stack.units) and len(stack) == 5
    assert stack[1] is stack["bert.encoder.layer.0"] and stack[-1] is stack.units[-1]
    assert stack[1:3] == stack.units[1:3]
    assert "stem" in stack and stack[2] in stack and "bert" not in stack
    with pytest.raises(KeyError, match=r"no unit 'bert'; the units are stem, bert.encoder.layer.0"):
        stack["bert"]
    for parameter in stack[1].named_parameters().values():
        parameter.requires_grad_(False)
    assert repr(stack).splitlines() == [
        "5 units of BertForSequenceClassification",
        "    0  stem: 5,344 parameters, trainable",
        "    1  bert.encoder.layer.0: 6,789 parameters, frozen",
        "    2  bert.encoder.layer.1: 6,789 parameters, trainable",
        "    3  bert.encoder.layer.2: 6,789 parameters, trainable",
        "    4  bert.encoder.layer.3: 6,789 parameters, trainable",
    ]
    assert repr(stack[0]) == "stem: 5,344 parameters, trainable"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft 0.21 still asks for it
def test_how_many_units_may_freeze():
    assert find_blocks(build("bert")).deepest_safe_depth() == 5, "the classifier stays"
    assert find_blocks(BertModel(build("bert").config)).deepest_safe_depth() == 4, "nobody reads the pooler"
    assert find_blocks(LlamaModel(LlamaConfig(**TEXT))).deepest_safe_depth() == 5, "the final norm stays"
    llama = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 2]))
    assert find_blocks(llama).deepest_safe_depth() == 3, "the third block has the last weights to train"
    bert = BertForSequenceClassification(build("bert").config)
    for name, parameter in bert.named_parameters():
        parameter.requires_grad_("embeddings" in name or "pooler" in name)
    assert find_blocks(bert).deepest_safe_depth() == 5, "the classifier reads the pooler"
    bert.bert.pooler.requires_grad_(False)
    assert find_blocks(bert).deepest_safe_depth() == 0
