"""What only a GPU can show: bf16 and fp16 autocast there, memory, exact resume, compiled models. Skipped without CUDA."""

import pytest
import torch
from architectures import build
from torch import nn
from training import Rows, arguments, assert_same_run, predictor_that_says, train
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback

from smartfrz_hf import SmartFRZCallback, SmartFRZConfig, find_blocks
from smartfrz_hf.activation_cache.monitor import CacheMonitor
from smartfrz_hf.cost.flops import ComputeMeter
from smartfrz_hf.policies import Decision, Policy

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, and CUDA_VISIBLE_DEVICES=0"
)
STATIC = {"policy": "static", "static_depth": 2, "first_decision": 1}
PRECISIONS = pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["fp32", "bf16", "fp16"])


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class FromTheStart(Policy):
    """Freezes two units after the pilot."""

    pilot = 0.1

    def decide(self, observation):
        return Decision(max(observation.depth, 2 if observation.pilot is not None else 0), "told")


def small():
    """A BERT without dropout, on the CPU: the Trainer moves it."""
    torch.manual_seed(0)
    model = build("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class Later(Policy):
    """Freezes seven units after eight steps."""

    def decide(self, observation):
        return Decision(max(observation.depth, 7 if observation.step >= 8 else 0), "told")


@PRECISIONS
def test_never_is_plain_training(tmp_path, precision):
    plain = train(tmp_path, model=small(), use_cpu=False, **precision)
    never = SmartFRZCallback(SmartFRZConfig(policy="never"))
    assert_same_run(plain, train(tmp_path, [never], model=small(), use_cpu=False, **precision))
    assert next(plain.model.parameters()).is_cuda
    assert abs(never.ledger.compute_saved) < 0.01


@PRECISIONS
@pytest.mark.parametrize("cache", [True, False])
def test_a_frozen_front_is_one_frozen_by_hand(tmp_path, precision, cache):
    model = small()
    for unit in find_blocks(model).units[:2]:
        for parameter in unit.named_parameters().values():
            parameter.requires_grad_(False)
        for module in unit.modules.values():
            module.eval()
    by_hand = train(tmp_path, model=model, use_cpu=False, max_steps=40, **precision)
    config = SmartFRZConfig(**STATIC, activation_cache=cache)  # the first step is one of rate 0
    callback = SmartFRZCallback(config)
    ours = train(tmp_path, [callback], model=small(), use_cpu=False, max_steps=40, **precision)
    assert callback.ledger.depth == 2
    if cache:
        assert callback.ledger.cache.hits > 60 and callback.ledger.cache.off is None
    for (name, p), q in zip(by_hand.model.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-2 if precision else 1e-4, rtol=1e-2, msg=name)


@PRECISIONS
def test_a_pilot_is_undone(tmp_path, precision):
    """What freezes from the start has the weights of the start, and the run resumes in mid-pilot and after it."""
    settings = {"use_cpu": False, "max_steps": 60, "save_strategy": "steps", "save_steps": 3, **precision}

    def run(resume=None):
        callback = SmartFRZCallback(SmartFRZConfig(activation_cache=False), policy=FromTheStart())
        return callback, train(tmp_path, [callback], model=small(), resume=resume, **settings)

    first = {name: p.detach().clone() for name, p in small().named_parameters()}
    callback, whole = run()
    assert callback.ledger.depth == 2
    frozen = {f"{name}" for unit in find_blocks(whole.model).units[:2] for name in unit.named_parameters()}
    for name, p in whole.model.named_parameters():
        assert torch.equal(p.cpu(), first[name]) == (name in frozen), name
    ends = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    for step in (3, 30):
        again = run(str(tmp_path / f"checkpoint-{step}"))[1]
        for name, p in again.model.named_parameters():
            torch.testing.assert_close(p, ends[name], atol=1e-3 if precision else 1e-6, rtol=1e-3, msg=name)


class Peaks(TrainerCallback):
    """The most memory of each step."""

    def __init__(self):
        self.bytes = []

    def on_step_begin(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs):
        self.bytes.append(torch.cuda.max_memory_allocated())


@pytest.mark.parametrize("offload", [False, True])
def test_memory_falls(tmp_path, offload):
    """Gradients, optimizer state and activations of the front go; its weights, too, if that is asked for and the cache serves all."""
    torch.use_deterministic_algorithms(False)
    peaks = Peaks()
    config = SmartFRZConfig(first_decision=8, offload_frozen=offload)
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=120, max_position_embeddings=64, **shape))
    callback = SmartFRZCallback(config, policy=Later())
    args = arguments(tmp_path, use_cpu=False, bf16=True, max_steps=40, per_device_train_batch_size=8)
    Trainer(model, args, train_dataset=Rows(32), callbacks=[callback, peaks]).train()
    blocks = sum(p.numel() for unit in find_blocks(model).units[:7] for p in unit.named_parameters().values())
    assert callback.ledger.depth == 7
    fell = min(peaks.bytes[2:7]) - max(peaks.bytes[-4:])
    # Two moments and a gradient of fp32 a parameter, and its weight.
    assert fell > (4 if offload else 3) * 4 * blocks * 0.95, (peaks.bytes, blocks)


def test_grouped_queries_are_counted(caplog):
    """The counter of torch 2.11 fails on them in a fused kernel."""
    torch.use_deterministic_algorithms(False)
    model = build("llama").cuda()
    model.set_attn_implementation("sdpa")
    stack = find_blocks(model)
    meter = ComputeMeter(model, stack)
    with torch.autocast("cuda", torch.bfloat16):
        ids = torch.randint(5, 99, (4, 16), device="cuda")
        model.train()(input_ids=ids, labels=ids).loss.backward()
    meter.count()
    meter.close()
    assert "cannot be counted" not in caplog.text and meter.spent.forward > 0


def test_a_compiled_model_freezes(tmp_path):
    torch.use_deterministic_algorithms(False)
    config = SmartFRZConfig(**STATIC)
    callback = SmartFRZCallback(config)
    trainer = train(tmp_path, [callback], model=small(), use_cpu=False, bf16=True, torch_compile=True, max_steps=30)
    assert callback.ledger.depth == 2 and trainer.state.log_history[-1]["train_loss"] < 1.0


def test_the_shipped_predictor_decides(tmp_path):
    """Weights are sampled, the probe runs and the predictor answers where the model is."""
    callback = SmartFRZCallback(SmartFRZConfig())
    train(tmp_path, [callback], model=small(), use_cpu=False, bf16=True, max_steps=120, dataset=Rows(64))
    assert callback.ledger.max_steps == 120
    other = SmartFRZCallback(SmartFRZConfig(), predictor_that_says(0.95, front_probe=True))
    train(tmp_path, [other], model=small(), use_cpu=False, fp16=True, max_steps=60, dataset=Rows(64))
    assert other.ledger.depth > 0


def epochs(folder, **options):
    """Rows, steps and the cache of a run of five epochs whose front is frozen."""
    torch.use_deterministic_algorithms(False)
    callback = SmartFRZCallback(SmartFRZConfig(**STATIC, **options))
    trainer = train(folder, [callback], model=small(), use_cpu=False, bf16=True, max_steps=60, dataset=Rows(48))
    return trainer.state.log_history[-1]["train_loss"], callback.ledger.cache


def test_the_cache_takes_the_accelerators_memory_first(tmp_path):
    """And what it holds there, in host memory or in both serves the same."""
    (loss, beside), (same, host), (again, both), (last, narrow) = (
        epochs(tmp_path, **options)
        for options in (
            {},
            {"cache_device_memory": 0},
            {"cache_device_memory": 20_000.0},
            {"cache_dtype": "bfloat16"},
        )
    )
    assert beside.bytes_device > 0 and beside.bytes_memory == 0 and beside.hits > 0
    assert host.bytes_device == 0 and host.bytes_memory == beside.bytes_device and host.hits == beside.hits
    assert 0 < both.bytes_device <= 20_000 and both.bytes_held == beside.bytes_held and both.hits == beside.hits
    assert 0 < narrow.bytes_device < beside.bytes_device
    assert same == pytest.approx(loss, rel=1e-2) and again == pytest.approx(loss, rel=1e-2)
    assert last == pytest.approx(loss, rel=3e-2)


def test_the_cache_stays_on_with_convolutions(tmp_path, monkeypatch):
    """In TF32 or not, depending on the rows of the batch, which must not pass for a wrong activation."""
    monkeypatch.setattr(CacheMonitor, "loss", lambda self: None)
    torch.use_deterministic_algorithms(False)
    callback = SmartFRZCallback(SmartFRZConfig(**STATIC | {"static_depth": 3}))
    options = {"num_train_epochs": 6, "per_device_train_batch_size": 32}
    model = build("resnet")
    train(tmp_path, [callback], model, dataset=Rows(96, images=True), use_cpu=False, **options)
    cache = callback.ledger.cache
    assert cache.off is None and cache.checked_rows > 0 and cache.hits > 0.5 * cache.rows
