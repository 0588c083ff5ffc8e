"""Weights that somebody means to train go on training, whatever is frozen around them."""

import peft
import pytest
import torch
from architectures import ARCHITECTURES, build
from torch import nn
from transformers.utils import logging

from smartfrz_hf import Freezer, find_blocks

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft 0.21 still asks for it


@pytest.fixture
def log(caplog):
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def trained(model, freezer, optimizer, name="bert", steps=2):
    """Names of the parameters that some training steps change."""
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    batch = ARCHITECTURES[name].batch(model)
    for _ in range(steps):
        model.train()
        model(**batch).loss.backward()
        freezer.check()
        optimizer.step()
        optimizer.zero_grad()
    return {key for key, p in model.named_parameters() if not p.equal(before[key])}


def start(model, depth):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    freezer = Freezer(find_blocks(model), optimizer)
    freezer.freeze_to(depth)
    return freezer, optimizer


def flags(model):
    return {key: p.requires_grad for key, p in model.named_parameters()}


def test_modules_to_save_train_on(log):
    """The embeddings of a causal model, as one trains them for new tokens."""
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    before = flags(model)
    freezer, optimizer = start(model, 3)
    assert freezer.kept
    changed = trained(model, freezer, optimizer, "llama")
    assert any("embed_tokens.modules_to_save" in key for key in changed)
    assert not any(f"layers.{i}." in key for key in changed for i in (0, 1))
    said = [record.message for record in log.records if "stays trainable" in record.message]
    assert len(said) == 1 and "embed_tokens" in said[0]
    freezer.unfreeze_to(0)
    assert flags(model) == before and not freezer.kept


def test_trainable_token_rows_train_on():
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [97, 98]}}
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    freezer, optimizer = start(model, 3)
    assert any("trainable_tokens_delta" in key for key in trained(model, freezer, optimizer, "llama"))


def test_new_rows_of_a_vocabulary_train_on():
    model = build("bert")
    model.resize_token_embeddings(104)
    table = model.get_input_embeddings().weight
    new = (torch.arange(104) >= 99).unsqueeze(1)
    table.register_hook(lambda gradient: gradient * new)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    freezer = Freezer(find_blocks(model), optimizer)
    freezer.freeze_to(3)
    batch = ARCHITECTURES["bert"].batch(model)
    batch["input_ids"][:, 2] = 101
    before = table.detach().clone()
    model(**batch).loss.backward()
    optimizer.step()
    assert table[101].ne(before[101]).any() and table[:99].equal(before[:99])
    assert not any(p.requires_grad for p in freezer.stack[1].named_parameters().values())


def test_gradient_hooks_on_everything_keep_nothing_from_freezing():
    """As they are used to clip gradients."""
    model = build("bert")
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-1, 1))
    freezer, _ = start(model, 3)
    assert not freezer.kept and not any(unit.trainable for unit in freezer.stack[:3])


def test_what_somebody_thaws_trains(log):
    model = build("bert")
    model.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    freezer, optimizer = start(model, 4)
    assert freezer.check() == []
    for parameter in model.bert.encoder.layer[1].parameters():
        parameter.requires_grad_(True)
    model.bert.embeddings.position_embeddings.weight.requires_grad_(True)
    model(**ARCHITECTURES["bert"].batch(model)).loss.backward()
    thawed = freezer.check()
    assert len(thawed) == 17 and freezer.check() == [] and freezer.kept
    changed = trained(model, freezer, optimizer)
    assert {key for key in changed if "layer.1." in key} == {key for key in thawed if "layer.1." in key}
    assert not any(f"layer.{i}." in key or "word" in key for key in changed for i in (0, 2))
    assert len(log.records) == 1 and "trains from now on" in log.records[0].message
    freezer.unfreeze_to(0)
    assert all(p.requires_grad for p in model.parameters()), "what was thawed is not frozen again"


def test_switching_adapters_thaws_nothing():
    """Preference training takes the model without its adapter as the reference, at each step."""
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    freezer, optimizer = start(model, 3)
    batch = ARCHITECTURES["llama"].batch(model)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for _ in range(3):
        with torch.no_grad(), model.disable_adapter():
            model(**batch)
        model(**batch).loss.backward()
        assert freezer.check() == []
        optimizer.step()
        optimizer.zero_grad()
    changed = {key for key, p in model.named_parameters() if not p.equal(before[key])}
    assert changed and not any(f"layers.{i}." in key for key in changed for i in (0, 1))
    assert not freezer.kept


def test_a_second_adapter_is_somebodys_wish():
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    freezer = Freezer(find_blocks(model))
    freezer.freeze_to(3)
    model.set_adapter("other")
    assert freezer.check() and all(".other." in key for key in freezer.kept)


class SoftPrompt(nn.Module):
    """Trains a few vectors in front of the embeddings of a causal model."""

    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(3, 32))
        self.model = build("llama")

    def forward(self, input_ids, labels):
        embedded = self.model.get_input_embeddings()(input_ids)
        prompt = self.prompt.expand(len(input_ids), -1, -1)
        labels = torch.cat([labels.new_full((len(labels), 3), -100), labels], dim=1)
        return self.model(inputs_embeds=torch.cat([prompt, embedded], dim=1), labels=labels)


def test_what_lies_in_front_of_a_frozen_front_gets_its_gradient(log):
    model = SoftPrompt().train()
    freezer, _ = start(model, 3)
    batch = ARCHITECTURES["llama"].batch(model.model)
    for _ in range(2):
        model(batch["input_ids"], batch["labels"]).loss.backward()
    assert model.prompt.grad is not None and model.prompt.grad.ne(0).any()
    assert all(p.grad is None for unit in freezer.stack[:3] for p in unit.named_parameters().values())
    said = [record.message for record in log.records if "requires a gradient because of" in record.message]
    assert len(said) == 1 and "because of prompt." in said[0]


def test_adversarial_noise_gets_its_gradient():
    model = build("bert")
    start(model, 3)
    noise = torch.zeros(4, 16, 32, requires_grad=True)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output + noise)
    model(**ARCHITECTURES["bert"].batch(model)).loss.backward()
    assert noise.grad is not None and noise.grad.ne(0).any()
