"""Runs of models with more than one stack, and what is said where freezing cannot help."""

import copy

import peft
import pytest
import torch
from architectures import ARCHITECTURES, build
from by_hand import STEPS, At, batches, by_run, step
from odd_models import llava
from torch import nn
from torch.utils.data import Dataset
from training import Rows, arguments, train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from zoo import build_tiny

from smartfrz_hf import Freezer, FreezingRun, SmartFRZCallback, SmartFRZTrainer, find_blocks


class Captions(Dataset):
    """Images with a caption."""

    def __len__(self):
        return 16

    def __getitem__(self, row):
        generator = torch.Generator().manual_seed(row)
        ids = torch.cat([torch.full((16,), 98), torch.randint(5, 90, (4,), generator=generator)])
        return {"input_ids": ids, "labels": ids, "pixel_values": torch.rand(3, 32, 32, generator=generator)}


def test_the_first_rows_of_the_data_show_the_towers(tmp_path, caplog):
    callback = SmartFRZCallback(policy=At({0: 0, 4: 3}), first_decision=4)
    train(tmp_path, [callback], llava(), dataset=Captions(), max_steps=8)
    names = callback.run.stack.names
    assert [name.split(".")[1] for name in names[1:]] == ["vision_tower"] * 4 + ["language_model"] * 4
    assert callback.ledger.stages[0].depth == 3
    assert not [record for record in caplog.records if "did not run" in record.getMessage()]


def test_a_tower_frozen_by_hand_while_the_language_model_freezes(tmp_path):
    model = llava()
    model.model.vision_tower.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    callback = SmartFRZCallback(policy=At({0: 0, 4: 2}), first_decision=4)
    train(tmp_path, [callback], model, dataset=Captions(), max_steps=8)
    assert callback.run.stack.names[1:] == [f"model.language_model.layers.{i}" for i in range(4)]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any("vision_tower" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed), "it trained until the stem froze"


def test_blocks_with_a_backward_pass_of_their_own_are_refused():
    with pytest.raises(ValueError, match=r"ReformerForMaskedLM runs its blocks inside a backward pass of its own"):
        find_blocks(build_tiny("reformer"))


class Stops(nn.Module):
    """Its blocks have gradients only if what enters them requires one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 4) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, ids):
        hidden = self.embed(ids)
        with torch.set_grad_enabled(hidden.requires_grad and torch.is_grad_enabled()):
            for block in self.blocks:
                hidden = block(hidden)
        return self.head(hidden)


def test_it_is_said_when_nothing_behind_the_front_gets_a_gradient(caplog):
    model, inputs = Stops(), {"ids": torch.ones(2, 3, dtype=torch.long)}
    freezer = Freezer(find_blocks(model, inputs=inputs))
    freezer.freeze_to(1)
    model(**inputs).sum().backward()
    for _ in range(2):
        freezer.check()
    said = [record.getMessage() for record in caplog.records if "gets a gradient" in record.getMessage()]
    assert len(said) == 1 and "Stops" in said[0]


def test_experts_with_their_router_loss_and_the_cache():
    model = build_tiny("mixtral", output_router_logits=True, router_aux_loss_coef=0.1)
    data, depths = batches(model), {0: 0, 2: 2}
    off, on = copy.deepcopy(model), copy.deepcopy(model)
    by_run(off, data, depths, cache=False)
    by_run(on, data, depths, cache=True)
    for a, b in zip(off.state_dict().values(), on.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_a_run_that_never_freezes_is_plain_training_with_silu():
    model = build_tiny("llama", hidden_act="silu")
    data, plain = batches(model), copy.deepcopy(model)
    by_run(model, data, {0: 0}, cache=True)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    for number in range(STEPS):
        step(plain, optimizer, data[number % 2], number)
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft 0.21 still asks for it
def test_adalora_allocates_ranks_behind_the_frozen_front():
    config = {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 2, "total_step": 8, "deltaT": 1}
    model = build("bert")
    wrapped = peft.get_peft_model(model, peft.AdaLoraConfig(target_modules=["query", "value"], **config))
    tuner, optimizer = wrapped.base_model, torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    batch, allocate = ARCHITECTURES["bert"].batch(model), type(tuner).update_and_allocate
    with FreezingRun(wrapped, optimizer, 8, policy=At({0: 2})) as run:
        before = {name: p.detach().clone() for name, p in run.stack[1].named_parameters().items()}
        for number in range(8):
            wrapped(**batch).loss.backward()
            optimizer.step()
            tuner.update_and_allocate(number)
            optimizer.zero_grad()
            run.step()
    for name, parameter in run.stack[1].named_parameters().items():
        assert torch.equal(parameter, before[name]), name
    ranks = [p for name, p in run.stack[2].named_parameters().items() if "lora_E" in name]
    assert any((p == 0).any() for p in ranks), "singular values of active adapters went to zero"
    assert tuner.update_and_allocate.__func__ is allocate


def test_a_sharded_run_that_is_resumed_finds_the_units_by_the_data(tmp_path, monkeypatch):
    stages = [{"step": 2, "depth": 3, "apart": []}]
    state = {"step": 4, "depth": 3, "apart": [], "ledger": {"stages": stages}}
    for room in ("trainer", "checkpoint"):
        monkeypatch.setattr(f"smartfrz_hf.{room}.is_sharded", lambda model: True)
    monkeypatch.setattr("smartfrz_hf.trainer.load_state", lambda checkpoint: state)
    trainer = SmartFRZTrainer(llava(), arguments(tmp_path), train_dataset=Captions(), smartfrz={"policy": "never"})
    with trainer.around_loading("checkpoint"):
        frozen = {name.split(".")[1] for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert frozen == {"vision_tower"} and all(parameter.requires_grad for parameter in trainer.model.parameters())


class AddAdapter(TrainerCallback):
    """Adds a second adapter in mid-run, and trains that one from then on."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 8:
            self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
            model.add_adapter("other", peft.LoraConfig(target_modules=["query", "value"]))
            model.set_adapter("other")
            new = [p for name, p in model.named_parameters() if ".other." in name]
            optimizer.param_groups[0]["params"].extend(new)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("cache", [False, True])
def test_a_second_adapter_is_added_in_mid_run(tmp_path, caplog, cache):
    model = peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query", "value"]))
    callback, adds = SmartFRZCallback(policy=At({0: 0, 4: 3}), first_decision=4, activation_cache=cache), AddAdapter()
    train(tmp_path, [callback, adds], model, max_steps=16, lr_scheduler_type="constant")
    assert [(stage.step, stage.depth) for stage in callback.ledger.stages] == [(4, 3)]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, adds.before.get(name, p))}
    assert not any(".default." in name for name in changed), "the first adapter is off"
    trained = {name for name, p in model.named_parameters() if "other" in name and "lora_B" in name and p.any()}
    assert {name.split(".")[5] for name in trained} == {"0", "1", "2", "3"}, "the new one trains, in the front too"
    assert any("other" in record.getMessage() for record in caplog.records), "and a warning says so"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_a_base_of_few_bits(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    build_tiny("llama", hidden_size=64, intermediate_size=64, head_dim=16, num_hidden_layers=4).save_pretrained(
        tmp_path / "model"
    )
    quantization = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantization, device_map="cpu")
    names = ["q_proj", "v_proj", "down_proj"]
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(base), peft.LoraConfig(target_modules=names))
    # The base is stored in another order once it has run on a CPU.
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name}
    data = Rows(16)
    for row in data.rows:
        row["labels"] = row["input_ids"]
    callback = SmartFRZCallback(policy=At({0: 3}))
    train(tmp_path, [callback], model, dataset=data, num_train_epochs=5, max_steps=-1)
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert {name.split(".")[4] for name in changed} == {"2", "3"}
    assert callback.ledger.compute_saved > 0.1 and callback.ledger.cache.rows > 0
