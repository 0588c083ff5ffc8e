"""Frozen weights compute in lower precision, or lie in host memory only, and are what they were all the same."""

import copy
import io

import pytest
import torch
from architectures import ARCHITECTURES, build
from safetensors.torch import load_file
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import Rows, train

from smartfrz_hf import Freezer, SmartFRZConfig, SmartFRZTrainer, find_blocks
from smartfrz_hf.activation_cache import ActivationCache, ActivationStore
from smartfrz_hf.activation_cache.monitor import CacheMonitor
from smartfrz_hf.freezing.weights import OffloadedParameter


def go(folder, smartfrz=None, **changes):
    config = SmartFRZConfig(policy="static", static_depth=3, **smartfrz or {})
    return train(
        folder,
        model=build("bert"),
        trainer_class=SmartFRZTrainer,
        dataset=Rows(48),
        trainer_kwargs={"smartfrz": config},
        **{"max_steps": -1, "num_train_epochs": 4, "per_device_train_batch_size": 8, "logging_steps": 1} | changes,
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_changes_rounding_only(name, dtype):
    model = build(name).eval()
    batch = ARCHITECTURES[name].batch(model)
    expected, before = model(**batch), copy.deepcopy(model.state_dict())
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    stack = find_blocks(model)
    freezer = Freezer(stack, dtype=dtype)
    freezer.freeze_to(3 if len(stack) > 3 else 2)
    lowered = [parameter for parameter in model.parameters() if parameter.dtype == dtype]
    assert lowered
    found = model(**batch)
    assert found.logits.dtype == torch.float32
    assert not torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0.05, atol=0.05)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    freezer.unfreeze_to(0)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert torch.equal(model(**batch).logits, expected.logits)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_saves_and_gives_back_the_weights_themselves(tmp_path):
    start = build("bert").state_dict()
    trainer = go(tmp_path, {"frozen_dtype": "bfloat16"}, save_strategy="epoch", save_total_limit=1)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    saved = load_file(checkpoint / "model.safetensors")
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(saved[key], value), key
        frozen = key.startswith(("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"))
        assert torch.equal(value, start[key]) == frozen, key


@torch.no_grad()
def test_other_weights_can_be_loaded_meanwhile():
    model = build("bert").eval()
    batch = ARCHITECTURES["bert"].batch(model)
    other = {key: value + 0.01 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    twin = copy.deepcopy(model)
    twin.load_state_dict(other)
    freezer = Freezer(find_blocks(model), dtype=torch.bfloat16)
    freezer.freeze_to(3)
    model.load_state_dict(other)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other[key]), key
    freezer.unfreeze_to(0)
    assert torch.equal(model(**batch).logits, twin(**batch).logits)


def test_offloading_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(CacheMonitor, "loss", lambda self: None)
    offloaded = []
    real = SmartFRZTrainer.training_step

    def training_step(self, *args, **kwargs):
        weights = self.smartfrz.run.front.freezer.weights
        blank = [p for p in self.model.parameters() if isinstance(p, OffloadedParameter)]
        offloaded.append(len(blank))
        assert bool(blank) == weights.offloaded
        return real(self, *args, **kwargs)

    changes = {"num_train_epochs": 6, "save_strategy": "epoch", "eval_strategy": "epoch"}
    off = go(tmp_path / "off", **changes)
    monkeypatch.setattr(SmartFRZTrainer, "training_step", training_step)
    settings = {"activation_cache": True, "offload_frozen": True}
    on = go(tmp_path / "on", settings, **changes)
    assert offloaded[0] == 0 and max(offloaded) >= 30  # two blocks of 16 tensors
    for key, value in off.model.state_dict().items():
        assert torch.equal(value, on.model.state_dict()[key]), key
    for checkpoint in (tmp_path / "on").glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


@torch.no_grad()
@pytest.mark.parametrize("read", ["average", "foreach", "penalty", "data", "vector", "copy", "file"])
def test_whoever_reads_offloaded_weights_gets_them(read, caplog):
    """A moving average had NaN in it for good."""
    model = build("bert")
    stack = find_blocks(model)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    freezer = Freezer(stack)
    freezer.freeze_to(3)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if read == "foreach" else None)
    freezer.weights.offload(stack.blocks[:2])
    away = [parameter for parameter in model.parameters() if isinstance(parameter, OffloadedParameter)]
    told = [(p.shape, p.dtype, p.numel(), p.grad, p.requires_grad, p.device) for p in model.parameters()]
    assert len(away) == 32 and freezer.weights.offloaded and told
    if read in ("average", "foreach"):
        averaged.update_parameters(model)
        found = list(averaged.module.parameters())
    elif read == "penalty":
        assert torch.stack([(p**2).sum() for p in model.parameters()]).isfinite().all()
        found = list(model.parameters())
    elif read == "data":
        found = [p.data for p in model.parameters()]
    elif read == "copy":
        found = copy.deepcopy(list(model.parameters()))
        assert all(type(parameter) is torch.nn.Parameter for parameter in found)
    elif read == "file":
        file = io.BytesIO()
        torch.save(list(model.parameters()), file)
        found = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    else:
        vector = parameters_to_vector(model.parameters())
        found = vector.split([p.numel() for p in expected])
    assert not freezer.weights.offloaded and not any(isinstance(p, OffloadedParameter) for p in model.parameters())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.reshape(-1), other.reshape(-1))
    freezer.weights.offload(stack.blocks[:2])
    assert not freezer.weights.offloaded and "read outside the forward pass" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_offloaded_weights_come_back_for_a_new_row(dtype):
    model = build("bert").eval()
    batch = ARCHITECTURES["bert"].batch(model)
    new = batch | {"input_ids": (batch["input_ids"] + 1).clamp(max=98)}
    stack = find_blocks(model)
    freezer = Freezer(stack, dtype=dtype)
    freezer.freeze_to(3)
    expected, expected_new = model(**batch).logits, model(**new).logits
    cache = ActivationCache(stack, ActivationStore(2**24), weights=freezer.weights)
    cache.freeze_to(3)
    for _ in range(6):
        assert torch.equal(model(**batch).logits, expected)
    assert freezer.weights.offloaded
    assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model(**new).logits, expected_new)
    hits = cache.savings.hits
    assert not freezer.weights.offloaded
    assert torch.equal(model(**batch).logits, expected)
    assert cache.savings.hits == hits + len(expected), "what was kept is still good"
    for _ in range(6):
        model(**batch)
    assert freezer.weights.offloaded
    cache.close()
    assert not freezer.weights.offloaded
    assert torch.equal(model(**new).logits, expected_new)


def test_refuses_what_cannot_work():
    with pytest.raises(ValueError, match=r"`frozen_dtype` is 'int8'; it must be one of 'float16', 'bfloat16'"):
        SmartFRZConfig(frozen_dtype="int8")
    with pytest.raises(ValueError, match="`offload_frozen` needs `activation_cache`"):
        SmartFRZConfig(offload_frozen=True, activation_cache=False)
