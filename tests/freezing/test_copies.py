"""Copies and files of a model that are made while its front is frozen are plain models, and exceptions leave one behind, too."""

import copy
import io
import pickle

import pytest
import torch
from architectures import ARCHITECTURES, build
from versions import checkpoint_activations

from smartfrz_hf import Freezer, find_blocks
from smartfrz_hf.model.forward_patch import ForwardPatch
from smartfrz_hf.signals.probe import FirstBatch


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


WAYS = {
    "copy": copy.deepcopy,
    "pickle": unpickled,
    "file": through_a_file,
    "copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "pickle of a copy": lambda model: unpickled(copy.deepcopy(model)),
    "copy of a part": lambda model: copy.deepcopy(model.bert),
}


@pytest.mark.parametrize("smaller", [False, True], ids=["plain", "in bfloat16, one block offloaded"])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_a_plain_model(way, smaller):
    model = build("bert")
    batch = ARCHITECTURES["bert"].batch(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stack = find_blocks(model)
    FirstBatch(model, 2)  # waits for its batch
    freezer = Freezer(stack, dtype=torch.bfloat16 if smaller else None)
    freezer.freeze_to(3)
    if smaller:
        freezer.weights.offload([stack.blocks[0]])
    made = WAYS[way](model)
    prefix = "bert." if way == "copy of a part" else ""
    for key, value in made.named_parameters():
        assert value.equal(before[prefix + key]), key
    made.requires_grad_(True).train()
    assert all(module.training for module in made.modules())
    if prefix:
        batch.pop("labels")
        made(**batch).pooler_output.sum().backward()
    else:
        made(**batch).loss.backward()
    assert all(p.grad is not None for p in made.parameters())
    assert not any(module.training for module in made.eval().modules())
    assert not any(p.grad is not None for p in model.parameters()), "the model itself is not touched"
    assert freezer.depth == 3 and not stack.blocks[0].train().training


def test_patches_of_others_are_copied():
    model = build("bert")
    layer = model.bert.encoder.layer[0]
    outer = ForwardPatch(layer, lambda original: "inner")
    inner = ForwardPatch(layer, lambda original: "outer")
    assert layer.forward() == "outer"
    inner.remove()
    assert layer.forward() == "inner"
    outer.remove(), outer.remove()
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize("where", ["cast", "disable", "hook"])
def test_an_interrupt_while_freezing_can_be_undone(where, monkeypatch):
    model = build("bert")
    checkpoint_activations(model)
    optimizer = torch.optim.AdamW(model.parameters())
    attributes = {key: set(module.__dict__) for key, module in model.named_modules()}
    freezer = Freezer(find_blocks(model), optimizer, torch.bfloat16)
    freezer.freeze_to(1)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    if where == "cast":
        real = freezer.weights.cast
        monkeypatch.setattr(freezer.weights, "cast", lambda unit: (real(unit), interrupt()))
    elif where == "disable":
        model.enable_input_require_grads()
        real_disable = model.disable_input_require_grads
        monkeypatch.setattr(type(model), "disable_input_require_grads", lambda self: (real_disable(), interrupt()))
    else:
        monkeypatch.setattr(freezer._boundary, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        freezer.freeze_to(3)
    monkeypatch.undo()
    freezer.unfreeze_to(0)
    assert freezer.depth == 0
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert attributes == {key: set(module.__dict__) for key, module in model.named_modules()}
    assert not any(m._forward_pre_hooks or m._state_dict_hooks for m in model.modules())
    embeddings = model.get_input_embeddings()
    assert bool(embeddings._forward_hooks), "the embeddings' output requires a gradient again, for checkpointing"
