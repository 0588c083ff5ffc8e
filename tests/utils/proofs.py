"""What each architecture allows, proved on a tiny model: a row of `docs/models.md`."""

import copy
from functools import partial
from typing import Any

import peft
import torch
from counting import counted
from torch import nn
from transformers import set_seed
from zoo import build_tiny, loss_of, make_batch

from smartfrz_hf import BlockStack, Freezer, find_blocks
from smartfrz_hf.activation_cache import ActivationCache, ActivationStore
from smartfrz_hf.model.discovery import NoOrderError
from smartfrz_hf.model.forward_patch import ForwardPatch
from smartfrz_hf.model.nested import float_tensors
from smartfrz_hf.model.tracing import evaluation_mode


def prove(model_type: str, **build: Any) -> dict[str, Any]:
    """
    Prove on a tiny model what freezing does to it. Values are plain, for a table.

    Raises:
        AssertionError: something that must hold for each model does not.
    """
    model = build_tiny(model_type, **build)
    batch = make_batch(model)
    row: dict[str, Any] = {"type": model_type, "model": type(model).__name__}
    try:
        stack = find_blocks(model)
        row["found"] = "first batch" if stack.problem else "itself"
    except NoOrderError:
        row["found"] = "first batch"
    if row["found"] == "first batch":
        stack = find_blocks(model, inputs=batch)
        row["problem"] = stack.problem
    row["units"] = len(stack)
    row["stacks"] = summary(stack)
    assert_partition(stack)
    assert_order(stack, batch)
    row["tied"] = [
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if name not in dict(model.named_parameters())
    ]
    depth = min(1 + len(stack) // 2, stack.deepest_safe_depth())
    row["depth"] = depth
    try:
        row |= freezes_as_by_hand(model, batch, depth, stack)
    except AssertionError:
        # Where BatchNorm sees one pixel of two pictures, as at the end of a tiny MobileViT, it makes 1 and -1 of any two values:
        # the gradients in front of it are nothing but rounding errors, which vanish in double precision. A fault does not.
        double = {
            name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in batch.items()
        }
        row |= freezes_as_by_hand(copy.deepcopy(model).double(), double, depth, stack)
    row["cache"] = cached(copy.deepcopy(model), batch, depth)
    row["peft"] = adapted(copy.deepcopy(model), batch, depth, stack.names)
    return row


def summary(stack: BlockStack) -> str:
    """Names of the blocks in short: `encoder.block.* (2), decoder.block.* (2)`."""
    groups: dict[str, int] = {}
    for name in stack.names[1:]:
        key = ".".join("*" if part.isdigit() else part for part in name.split("."))
        groups[key] = groups.get(key, 0) + 1
    return ", ".join(f"{key} ({count})" for key, count in groups.items())


def assert_partition(stack: BlockStack) -> None:
    """Each parameter is in exactly one of the units and the head."""
    inside = [p for unit in stack.units for p in unit.named_parameters().values()]
    inside += stack.head_parameters().values()
    assert len(inside) == len(set(inside)), "a parameter is in two units"
    assert set(inside) == set(stack.model.parameters())


def assert_order(stack: BlockStack, batch: dict[str, Any]) -> None:
    """Hooks fire in the order of the units."""
    fired: list[str] = []

    def run(name: str, forward: Any, /, *args: Any, **kwargs: Any) -> Any:
        fired.append(name)
        return forward(*args, **kwargs)

    patches = []
    for unit in stack.units[1:]:  # not hooks, without which SqueezeBERT calls its blocks
        block = unit.modules[unit.name]
        patches.append(ForwardPatch(block, partial(run, unit.name)))
    with evaluation_mode(stack.model):  # no layer is dropped
        stack.model(**copy.deepcopy(batch))
    for patch in reversed(patches):
        patch.remove()
    assert list(dict.fromkeys(fired)) == stack.names[1:], f"ran as {list(dict.fromkeys(fired))}"


def freezes_as_by_hand(model: nn.Module, batch: dict[str, Any], depth: int, stack: BlockStack) -> dict[str, Any]:
    """
    A frozen front costs no more than one that is frozen by hand, gets no gradient, and leaves the gradients behind it as they are,
    with activation checkpointing, too.
    """
    full = copy.deepcopy(model)
    spent = counted(lambda: backward(full, batch))
    ours, hand = copy.deepcopy(model), copy.deepcopy(model)
    frozen = find_blocks(ours, inputs=batch)
    Freezer(frozen).freeze_to(depth)
    for name in stack.names[:depth]:
        for module in [hand.get_submodule(part) for part in stack[name].modules]:
            module.eval().requires_grad_(False)
        for own in stack[name].own:
            hand.get_parameter(own).requires_grad_(False)
    reached: dict[str, bool] = {}

    def note(name: str, output: Any) -> None:
        reached[name] = reached.get(name, False) or any(t.requires_grad for t in float_tensors(output))

    for unit in frozen.units[1:depth]:
        unit.modules[unit.name].register_forward_hook(lambda *args, name=unit.name: note(name, args[-1]))
    cost = counted(lambda: backward(ours, batch))
    by_hand = counted(lambda: backward(hand, batch))
    assert cost <= by_hand, f"{cost} FLOPs, and {by_hand} when frozen by hand"
    assert all(p.grad is None for unit in frozen.units[:depth] for p in unit.named_parameters().values())
    assert_same_gradients(ours, hand)
    checkpointing = "no"
    if getattr(model, "supports_gradient_checkpointing", False):
        ours.zero_grad()
        try:
            ours.activation_checkpointing_enable()
            checkpointing = "yes"
        except ValueError:  # the class says that it does, and has no layer that can
            pass
    if checkpointing == "yes":
        Freezer(frozen).freeze_to(depth)
        backward(ours, batch)
        assert_same_gradients(ours, hand)
    saved = round(1 - cost / spent, 3) if spent else None
    return {"saved": saved, "cut": not any(reached.values()), "checkpointing": checkpointing}


def assert_same_gradients(model: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), f"{name} has a gradient in one of both"
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")


def backward(model: nn.Module, batch: dict[str, Any]) -> None:
    set_seed(0)  # some models draw with NumPy
    loss_of(model, copy.deepcopy(batch)).backward()


def cached(model: nn.Module, batch: dict[str, Any], depth: int) -> str:
    """`served`, or why not."""
    model.eval()
    stack = find_blocks(model, inputs=batch)
    Freezer(stack).freeze_to(depth)
    with torch.no_grad():
        set_seed(0)  # some models draw in evaluation mode, too
        expected = named(model(**copy.deepcopy(batch)))
        cache = ActivationCache(stack, ActivationStore(2**24))
        cache.freeze_to(depth)
        try:
            for _ in range(3):
                set_seed(0)
                given = named(model(**copy.deepcopy(batch)))
                for name in expected.keys() & given.keys():  # without past keys and values
                    for a, b in zip(float_tensors(expected[name]), float_tensors(given[name]), strict=True):
                        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
            if cache.savings.hits:
                return "served"
            return cache.savings.off or cache._why_unused()
        finally:
            cache.close()


def named(output: Any) -> Any:
    """The output of a model; where it is no dictionary, a dictionary of it."""
    return output if hasattr(output, "keys") else {"output": output}


def adapted(model: nn.Module, batch: dict[str, Any], depth: int, names: list[str]) -> str:
    """`yes` where LoRA on all linear layers leaves the units as they are, and the frozen front has no gradient."""
    try:
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
        backward(wrapped, batch)
    except Exception as error:  # PEFT's own
        return f"no ({type(error).__name__} of PEFT)"
    wrapped.zero_grad()
    stack = find_blocks(wrapped, inputs=batch)
    # A stack without linear layers has no adapter, and nothing to train.
    assert stack.names == [name for name in names if name in stack.names], f"units with LoRA: {stack.names}"
    depth = min(depth, stack.deepest_safe_depth())
    Freezer(stack).freeze_to(depth)
    backward(wrapped, batch)
    inside = [p for unit in stack.units[:depth] for p in unit.named_parameters().values()]
    assert all(p.grad is None for p in inside)
    assert any(p.grad is not None for p in wrapped.parameters())
    return "yes"
