"""With the activation cache, losses and weights are those without it, bit for bit."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset
from training import Rows, train

from smartfrz_hf import Freezer, SmartFRZConfig, SmartFRZTrainer, find_blocks
from smartfrz_hf.activation_cache import ActivationCache, ActivationStore

# Its one block runs several times.
REFUSED = {"albert"}


def run(folder, cache, model="bert", dataset=None, policy="linear", callbacks=(), smartfrz=None, **changes):
    config = SmartFRZConfig(policy=policy, activation_cache=cache, **smartfrz or {})
    arguments = {"num_train_epochs": 5, "max_steps": -1, "eval_strategy": "epoch", "logging_steps": 1} | changes
    return train(
        folder,
        callbacks,
        build(model),
        SmartFRZTrainer,
        dataset or Rows(32, images=ARCHITECTURES[model].build().main_input_name == "pixel_values"),
        {"smartfrz": config},
        **arguments,
    )


def losses(trainer):
    return [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]


def assert_same(off, on):
    assert losses(on) == losses(off)
    for key, value in off.model.state_dict().items():
        assert torch.equal(value, on.model.state_dict()[key]), key


@pytest.fixture
def patient(monkeypatch):
    """Tiny models compute faster than anything can be looked up; keep their cache on nevertheless."""
    monkeypatch.setattr(ActivationCache, "_why_not", lambda self: None)


class Text(Rows):
    """Rows for a language model."""

    def __getitem__(self, row):
        found = self.rows[row]
        return found | {"labels": torch.where(found["attention_mask"].bool(), found["input_ids"], -100)}


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_is_exact_or_refused_in_every_architecture(tmp_path, name):
    dataset = Text(32) if name in ("gpt2", "llama", "qwen2") else None
    changes = {"eval_strategy": "no"} if dataset else {}
    changes |= {"smartfrz": {"linear_depth": 1.0}}
    if name in REFUSED:
        changes |= {"policy": "static", "smartfrz": {"static_depth": 2}}
    off, on = (run(tmp_path / str(cache), cache, name, dataset, **changes) for cache in (False, True))
    assert_same(off, on)
    cache = on.ledger.cache
    assert off.ledger.cache is None
    if name in REFUSED:
        assert "cannot be served" in cache.off
    else:
        assert cache.off is None and cache.hits > 0 and cache.bytes_memory > 0
        assert on.ledger.compute_saved > off.ledger.compute_saved


def collate(rows):
    """Dynamic padding."""
    length = max(int(row["attention_mask"].sum()) for row in rows)
    return {
        "input_ids": torch.stack([row["input_ids"][:length] for row in rows]),
        "attention_mask": torch.stack([row["attention_mask"][:length] for row in rows]),
        "labels": torch.stack([row["labels"] for row in rows]),
    }


@pytest.mark.usefixtures("patient")
def test_dynamic_padding_accumulation_and_growing_depth_are_exact(tmp_path):
    def go(cache, folder):
        config = SmartFRZConfig(policy="linear", linear_depth=1.0, activation_cache=cache)
        return train(
            tmp_path / folder,
            model=build("bert"),
            trainer_class=SmartFRZTrainer,
            dataset=Rows(48),
            trainer_kwargs={"smartfrz": config, "data_collator": collate},
            remove_unused_columns=False,
            max_steps=-1,
            num_train_epochs=6,
            gradient_accumulation_steps=2,
            eval_strategy="epoch",
            logging_steps=1,
        )

    off, on = go(False, "off"), go(True, "on")
    assert_same(off, on)
    assert len(on.ledger.stages) >= 4 and on.ledger.cache.hits > 0


class HalfAugmented(Rows):
    """Every second row has another first token each time it is read, drawn from the global generator."""

    def __getitem__(self, row):
        found = dict(self.rows[row])
        draw = torch.randint(5, 99, (1,))
        if row % 2:
            found["input_ids"] = torch.cat([draw, found["input_ids"][1:]])
        return found


def test_augmented_rows_are_misses(tmp_path):
    changes = {"dataset": HalfAugmented(32), "policy": "static", "eval_strategy": "no"}
    off, on = run(tmp_path / "off", False, **changes), run(tmp_path / "on", True, **changes)
    assert_same(off, on)


class Fresh(Dataset):
    """Rows that never come again."""

    def __len__(self):
        return 32

    def __getitem__(self, row):
        ids = torch.randint(5, 99, (12,))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 2}


def test_turns_itself_off_when_no_row_comes_again(tmp_path):
    trainer = run(tmp_path, True, dataset=Fresh(), policy="static", eval_strategy="no")
    assert "rows came again" in trainer.ledger.cache.off
    assert "forward" not in trainer.model.bert.__dict__


@pytest.mark.parametrize("budgets", [{"cache_memory": 0.0}, {"cache_memory": 5000.0}])
def test_a_budget_too_small_costs_nothing(tmp_path, budgets):
    off = run(tmp_path / "off", False, policy="static")
    on = run(tmp_path / "on", True, policy="static", smartfrz=budgets)
    assert_same(off, on)
    if on.ledger.cache is not None:
        assert on.ledger.cache.bytes_memory <= 5000


def test_asking_for_hidden_states_runs_the_front(tmp_path):
    model = build("bert").eval()
    stack = find_blocks(model)
    Freezer(stack).freeze_to(3)
    batch = ARCHITECTURES["bert"].batch(model)
    expected = model(**batch, output_hidden_states=True)
    cache = ActivationCache(stack, ActivationStore(2**24))
    cache.freeze_to(3)
    for _ in range(3):
        model(**batch)
    assert cache.savings.hits == 8
    found = model(**batch, output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(expected.hidden_states, found.hidden_states, strict=True))
    cache.close()


def test_other_weights_empty_it():
    model = build("bert").eval()
    stack = find_blocks(model)
    Freezer(stack).freeze_to(3)
    batch = ARCHITECTURES["bert"].batch(model)
    cache = ActivationCache(stack, ActivationStore(2**24))
    cache.freeze_to(3)
    with torch.no_grad():
        for _ in range(3):
            model(**batch)
        state = {key: value + 0.01 if "layer.0" in key else value for key, value in model.state_dict().items()}
        model.load_state_dict(state)
        found = model(**batch).logits
        cache.close()
        assert torch.equal(found, model(**batch).logits)


def test_a_copy_of_the_model_runs_by_itself():
    model = build("bert").eval()
    stack = find_blocks(model)
    Freezer(stack).freeze_to(3)
    batch = ARCHITECTURES["bert"].batch(model)
    cache = ActivationCache(stack, ActivationStore(2**24))
    cache.freeze_to(3)
    with torch.no_grad():
        for _ in range(3):
            expected = model(**batch).logits
        twin = copy.deepcopy(model)
        for parameter in model.bert.encoder.layer[0].parameters():
            parameter.fill_(0.5)
        assert torch.equal(twin(**batch).logits, expected)
    cache.close()


ROWS = Rows(12).rows


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 11), min_size=1, max_size=6),
            st.integers(0, 9),
            st.sampled_from(["left", "right"]),
            st.booleans(),
        ),
        min_size=2,
        max_size=8,
    ),
    st.sampled_from([0, 4000, 2**24]),
    st.integers(0, 7),
)
def test_never_gives_a_wrong_activation(batches, budget, grow_at):
    """Any order, duplicates, padding, empty masks, growing depth and budget: logits are those of the plain model."""
    model = build("bert").eval()
    stack = find_blocks(model)
    freezer = Freezer(stack)
    freezer.freeze_to(2)
    cache = ActivationCache(stack, ActivationStore(budget))
    cache.freeze_to(2)
    plain = copy.deepcopy(build("bert").eval())
    with torch.no_grad():
        for number, (chosen, padding, side, empty) in enumerate(batches):
            if number == grow_at:
                freezer.freeze_to(4)
                cache.freeze_to(4)
            ids = torch.stack([ROWS[row]["input_ids"] for row in chosen])
            mask = torch.stack([ROWS[row]["attention_mask"] for row in chosen])
            shape = (len(chosen), padding)
            parts = [(ids, mask), (torch.full(shape, number), torch.zeros(shape, dtype=torch.long))]
            ids, mask = (torch.cat(part, 1) for part in zip(*(parts if side == "right" else parts[::-1]), strict=True))
            if empty:
                mask[0] = 0
            batch = {"input_ids": ids, "attention_mask": mask}
            assert torch.equal(model(**batch).logits, plain(**batch).logits)
    cache.close()
