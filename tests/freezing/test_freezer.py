"""A frozen prefix costs no backward work and does not change by one bit, and freezing is undone exactly."""

import warnings

import peft
import pytest
import torch
import transformers as t
from architectures import ARCHITECTURES, build
from odd_models import ODD_MODELS
from torch.utils.flop_counter import FlopCounterMode
from versions import checkpoint_activations

from smartfrz_hf import Freezer, find_blocks
from smartfrz_hf.model.tracing import evaluation_mode

CHECKPOINTED = [name for name in ARCHITECTURES if build(name).supports_gradient_checkpointing]


def depths(stack):
    return range(1, len(stack) + 1) if len(stack) < 8 else (1, 3, len(stack))


def count_backward(model, batch):
    """FLOPs of the backward pass, and the names of the modules in which any were counted."""

    def by_module():
        return {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the counter's module tracker cannot follow recomputed modules
        with FlopCounterMode(display=False) as counter:
            loss = model(**batch).loss
            forward, before = counter.get_total_flops(), by_module()
            loss.backward()
    root = f"{type(model).__name__}."
    grown = {name.removeprefix(root) for name, flops in by_module().items() if flops > before.get(name, 0)}
    return counter.get_total_flops() - forward, grown


def backward_flops(model, batch):
    return count_backward(model, batch)[0]


def step(model, batch, optimizer):
    model.train()
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prefix_stays_bit_for_bit_and_leaves_the_optimizer(name):
    model = build(name)
    batch = ARCHITECTURES[name].batch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    stack = find_blocks(model)
    freezer = Freezer(stack, optimizer)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    step(model, batch, optimizer)
    for depth in depths(stack):
        freezer.freeze_to(depth)
        prefix = {key: p for unit in stack.units[:depth] for key, p in unit.named_parameters().items()}
        state = model.state_dict()
        modules = [f"{module}." for unit in stack.units[:depth] for module in unit.modules]
        frozen = {k: v.clone() for k, v in state.items() if k in prefix or k.startswith(tuple(modules))}
        active = {k: p.clone() for k, p in model.named_parameters() if p.requires_grad}
        step(model, batch, optimizer)
        step(model, batch, optimizer)
        after = model.state_dict()
        for key, value in frozen.items():  # running statistics, too
            assert torch.equal(after[key], value), key
        for parameter in prefix.values():
            assert parameter.grad is None and parameter not in optimizer.state
        used = {k for k, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        assert used and all(not torch.equal(after[key], active[key]) for key in used if active[key].numel() > 8)
        assert not any(m.training for unit in stack.units[:depth] for r in unit.modules.values() for m in r.modules())
    for before, group in zip(groups, optimizer.param_groups, strict=True):
        assert len(before) == len(group["params"])
        assert all(a is b for a, b in zip(before, group["params"], strict=True))


def reached(model, stack, batch):
    """Names of the units in which any backward work ran, by autograd and by the FLOP counter, and the FLOPs."""
    units = set()
    hooks = []
    for unit in stack.units:
        for module in unit.modules.values():
            for child in module.modules():
                hooks.append(
                    child.register_forward_hook(
                        lambda m, _, out, unit=unit: _watch(out, units, unit.name) if torch.is_grad_enabled() else None
                    )
                )
    flops, modules = count_backward(model, batch)
    for hook in hooks:
        hook.remove()
    counted = {
        unit.name
        for unit in stack.units
        for name in unit.modules
        if any(module == name or module.startswith(f"{name}.") for module in modules)
    }
    return units, counted, flops


def _watch(output, units, name):
    tensors = output if isinstance(output, (tuple, list)) else [output]
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(lambda *_: units.add(name))


@pytest.mark.parametrize("checkpointing", ["off", "on", "reentrant"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_backward_work_in_the_prefix(name, checkpointing):
    if checkpointing != "off" and name not in CHECKPOINTED:
        with pytest.raises(ValueError, match="does not support"):
            checkpoint_activations(build(name))
        return
    model = build(name)
    batch = ARCHITECTURES[name].batch(model)
    if checkpointing != "off":
        checkpoint_activations(model, checkpointing == "reentrant")
    stack = find_blocks(model)
    freezer = Freezer(stack)
    if (name, checkpointing) == ("deberta-v2", "reentrant"):
        with pytest.raises(RuntimeError, match="second time"):  # plain DeBERTa cannot: its blocks share a tensor
            backward_flops(model, batch)
        freezer.freeze_to(1)
        model.zero_grad()
    units, counted, full = reached(model, stack, batch)
    assert units == set(stack.names[freezer.depth :]), "backward reaches every active unit"
    assert counted >= set(stack.names[1:]), "and every block's work is counted"
    last = full
    for depth in depths(stack):
        freezer.freeze_to(depth)
        model.train()
        model.zero_grad()
        units, counted, flops = reached(model, stack, batch)
        assert units == set(stack.names[depth:])
        assert not counted & set(stack.names[:depth])
        assert flops < last or depth == 1, "each block of the prefix saves its part"
        last = flops
        got = {key for key, p in model.named_parameters() if p.grad is not None}
        prefix = {key for unit in stack.units[:depth] for key in unit.named_parameters()}
        assert got and not got & prefix


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "gpt2", "vit", "convnext", "resnet", "swin"])
def test_backward_is_as_little_as_by_hand(name):
    """The best that anyone can do by hand: no parameter in front asks for a gradient."""
    model, by_hand = build(name), build(name)
    batch = ARCHITECTURES[name].batch(model)
    depth = 3
    Freezer(find_blocks(model)).freeze_to(depth)
    for unit in find_blocks(by_hand).units[:depth]:
        for parameter in unit.named_parameters().values():
            parameter.requires_grad_(False)
    assert backward_flops(model, batch) == backward_flops(by_hand, batch)


@pytest.mark.parametrize("name", ["bert", "llama", "resnet", "vit"])
def test_active_gradients_are_those_of_full_training(name):
    """Freezing changes what is computed, never the gradient of what is still active."""
    model, twin = build(name), build(name)
    for m in (model, twin):  # dropout off, statistics still: the passes are comparable
        m.eval()
    batch = ARCHITECTURES[name].batch(model)
    stack = find_blocks(model)
    Freezer(stack).freeze_to(3)
    model(**batch).loss.backward()
    twin(**batch).loss.backward()
    for (key, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if p.requires_grad and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", ["bert", "resnet", "deberta-v2", "albert"])
def test_undo_restores_every_flag(name):
    model = build(name)
    if name in CHECKPOINTED:
        checkpoint_activations(model)
    stack = find_blocks(model)
    head = next(p for key, p in model.named_parameters() if key.startswith("classifier"))
    some = next(iter(stack.units[1].named_parameters().values()))
    some.requires_grad_(False)  # the user's own choice must survive
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    modes = {key: m.training for key, m in model.named_modules()}
    attributes = {key: set(m.__dict__) for key, m in model.named_modules()}
    hooks = {key: len(m._forward_pre_hooks) + len(m._forward_hooks) for key, m in model.named_modules()}
    freezer = Freezer(stack)
    freezer.freeze_to(1)
    freezer.freeze_to(2)
    model.train()
    assert not some.requires_grad and head.requires_grad and freezer.depth == 2
    freezer.unfreeze_to(1)
    assert freezer.depth == 1
    freezer.unfreeze_to(0)
    assert flags == {key: p.requires_grad for key, p in model.named_parameters()}
    assert modes == {key: m.training for key, m in model.named_modules()}
    assert attributes == {key: set(m.__dict__) for key, m in model.named_modules()}
    assert hooks == {key: len(m._forward_pre_hooks) + len(m._forward_hooks) for key, m in model.named_modules()}
    model.eval()
    assert not any(m.training for m in model.modules())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft 0.21 still asks for it
def test_peft_base_stays_frozen_after_undo():
    model = peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query", "value"]))
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    stack = find_blocks(model)
    freezer = Freezer(stack)
    freezer.freeze_to(3)
    batch = ARCHITECTURES["bert"].batch(model)
    model(**batch).loss.backward()
    got = [key for key, p in model.named_parameters() if p.grad is not None]
    assert got and not any(f"layer.{i}." in key for key in got for i in (0, 1))
    freezer.unfreeze_to(0)
    assert flags == {key: p.requires_grad for key, p in model.named_parameters()}


@pytest.mark.parametrize("trains", [True, False])
def test_tied_head_is_named_once_if_it_trained(caplog, trains):
    model = build("gpt2")
    model.lm_head.weight.requires_grad_(trains)  # under LoRA, it does not
    freezer = Freezer(find_blocks(model))
    with caplog.at_level("WARNING"):
        import transformers

        transformers.utils.logging.enable_propagation()
        freezer.freeze_to(1)
        freezer.freeze_to(3)
        transformers.utils.logging.disable_propagation()
    said = [record.message for record in caplog.records if "lm_head.weight" in record.message]
    assert len(said) == trains and all("transformer.wte.weight" in line for line in said)


def test_depth_out_of_range_is_refused():
    freezer = Freezer(find_blocks(build("bert")))
    with pytest.raises(ValueError, match="0 of 5 units"):
        freezer.freeze_to(6)
    freezer.freeze_to(2)
    with pytest.raises(ValueError, match="unfreeze_to"):
        freezer.freeze_to(1)


def loss_of(output):
    return output["loss"] if output.get("loss") is not None else output["logits"].sum() + output["exits"].sum()


@pytest.mark.parametrize("name", ODD_MODELS)
def test_everything_that_is_not_frozen_gets_the_gradient_of_full_training(name):
    """Norms behind the last block, decoders, other towers, and heads that run early."""
    make, blocks, batch = ODD_MODELS[name]
    model = make().eval()
    loss_of(model(**batch)).backward()
    full = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    never = {key for key, p in model.named_parameters() if not p.requires_grad}
    stack = find_blocks(model, blocks)
    freezer = Freezer(stack)
    for depth in range(1, stack.deepest_safe_depth() + 1):
        freezer.freeze_to(depth)
        model.zero_grad()
        loss_of(model(**batch)).backward()
        frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
        found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == full.keys() - frozen
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, full[key], msg=key)
        inside = {p for unit in stack[:depth] for p in unit.named_parameters().values()}
        assert frozen == never | {key for key, p in model.named_parameters() if p in inside}


def test_as_many_units_freeze_as_a_loss_allows():
    """A sentence encoder: its loss reads the last hidden states, and nobody reads the pooler."""
    model = build("bert").bert
    batch = {key: value for key, value in ARCHITECTURES["bert"].batch(model).items() if key != "labels"}
    stack = find_blocks(model)
    Freezer(stack).freeze_to(stack.deepest_safe_depth())
    model(**batch).last_hidden_state.mean().backward()
    assert all(p.grad is not None for p in stack[-1].named_parameters().values())


def test_gradients_of_the_inputs_asked_for_twice():
    """As by PEFT and by the Trainer."""
    model = build("bert")
    model.enable_input_require_grads()
    model.enable_input_require_grads()
    freezer = Freezer(find_blocks(model))
    freezer.freeze_to(2)
    embeddings, ids = model.get_input_embeddings(), torch.tensor([[5, 6]])
    assert not embeddings(ids).requires_grad
    freezer.unfreeze_to(0)
    model.requires_grad_(False)
    assert embeddings(ids).requires_grad
    model.disable_input_require_grads()
    assert not embeddings(ids).requires_grad


def test_what_modules_keep_for_evaluation_is_forgotten():
    """LeViT keeps sums of its weights in evaluation mode, until its own `train` is called."""
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
    model = t.LevitForImageClassification(t.LevitConfig(image_size=64, drop_path_rate=0, **sizes)).train()
    picture = {"pixel_values": torch.rand(2, 3, 64, 64)}
    with evaluation_mode(model):
        model(**picture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    fresh = t.LevitForImageClassification(model.config)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert model.eval()(**picture).logits.equal(fresh.eval()(**picture).logits)


def test_frozen_units_stay_in_evaluation_mode_under_any_train():
    class OfItsOwn(type(build("bert"))):
        def train(self, mode=True):
            for module in self.modules():
                module.training = mode
            return self

    model = build("bert")
    model.__class__ = OfItsOwn
    freezer = Freezer(find_blocks(model))
    freezer.freeze_to(3)
    model.train()
    model(**ARCHITECTURES["bert"].batch(model))
    layers = model.bert.encoder.layer
    assert not any(m.training for part in (model.bert.embeddings, *layers[:2]) for m in part.modules())
    assert all(m.training for part in layers[2:] for m in part.modules())
    freezer.unfreeze_to(0)
    assert not model.bert._forward_pre_hooks


def test_noise_on_embeddings_that_do_not_train_is_told(caplog):
    import transformers

    model = build("bert")
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    transformers.utils.logging.enable_propagation()
    Freezer(find_blocks(model)).freeze_to(3)
    transformers.utils.logging.disable_propagation()
    assert sum("NEFTune" in record.message for record in caplog.records) == 1
