"""Trainers of other libraries, and unusual ones, on sentences of STS-B: with the callback alone, and with the mixin."""

import logging

import pytest
import torch
import trainers
from trainers import run

from smartfrz_hf import SmartFRZCallback

pytestmark = [
    # TRL sets an argument by the name that it had before Transformers 5.23.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("affordable"),
]

PACKED = (
    "`cu_seq_lens_q` does not have one entry per row of `input_ids`; give it one for each, or train without packing"
)
# Why the activation cache stands aside, and `None` where it serves rows.
CASES = {
    trainers.seq2seq: None,
    trainers.sft: None,
    trainers.sft_completion_only: None,
    trainers.sft_wrapped: None,
    trainers.sft_packing: PACKED,
    trainers.sft_padding_free: PACKED,
    trainers.dpo: None,
    trainers.kto: None,
    trainers.reward: None,
    trainers.grpo: "`use_cache` is asked for",  # by generation, and new completions are new rows
    trainers.sentence_transformer: None,
    trainers.grad_cache: None,
    trainers.adaptive_layer: "`output_hidden_states` is asked for",
    trainers.matryoshka_2d: "`output_hidden_states` is asked for",
    trainers.sparse_encoder: None,
    trainers.cross_encoder: None,
    trainers.multiple_choice: None,
    trainers.reads_padding: None,
}
FAST = (trainers.seq2seq, trainers.multiple_choice, trainers.reads_padding)


@pytest.fixture
def patient(monkeypatch):
    """The cache goes on, though tiny models compute faster than it looks up."""
    monkeypatch.setattr("smartfrz_hf.activation_cache.monitor.CacheMonitor.loss", lambda self: None)


def comparable(weights):
    """
    Without the biases of keys, which attention does not depend on, and of a score for each choice, which the softmax over choices
    does not depend on: their gradients are rounding errors, which Adam enlarges.
    """
    return {name: value for name, value in weights.items() if not name.endswith(("key.bias", "classifier.bias"))}


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    "make",
    [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda case: case.__name__,
)
def test_freezes_with_the_callback_and_with_the_mixin(make, tmp_path, caplog):
    plain = run(make, tmp_path / "plain", cache=False)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        alone = run(make, tmp_path / "alone")
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("smartfrz_hf")]
    mixed = run(make, tmp_path / "mixed", mixin=True)
    for one in (plain, alone, mixed):
        assert [(stage.step, stage.depth) for stage in one.callback.ledger.stages] == [(5, 3)]
        assert one.probes == 2 and one.callback.ledger.compute_saved > 0.1
        assert all(parameter.requires_grad for parameter in one.trainer.model.parameters())
    # Rounding by another number of rows is all that the cache changes; the two ways to train do the same.
    assert alone.losses == pytest.approx(plain.losses, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(comparable(alone.weights), comparable(plain.weights), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(comparable(mixed.weights), comparable(alone.weights), rtol=1e-3, atol=1e-4)
    savings = alone.callback.ledger.cache
    assert savings.off == CASES[make] and (savings.hits > 0) == (savings.off is None), savings
    assert len(lines) == len(set(lines)) and not any("requires a gradient" in line for line in lines), lines
    assert sum("cache" in line for line in lines) <= (savings.off is not None)


@pytest.mark.slow
def test_setfit_trains_its_body(tmp_path):
    """SetFit makes the Trainer of its body itself, so that there is the callback alone."""
    setfit = pytest.importorskip("setfit")
    table = trainers.sentences()
    data = {"text": table["first"].tolist(), "label": [int(score > 2.5) for score in table["score"]]}
    model = setfit.SetFitModel.from_pretrained(trainers.saved(trainers.bert(trainers.t.BertModel), tmp_path))
    callback = SmartFRZCallback(policy="static", static_depth=3)
    arguments = {
        "max_steps": 24,
        "batch_size": 4,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
    }
    trainer = setfit.Trainer(
        model=model,
        args=setfit.TrainingArguments(str(tmp_path), **arguments),
        train_dataset=trainers.Dataset.from_dict(data),
        callbacks=[callback],
    )
    before = {name: value.clone() for name, value in model.model_body.state_dict().items()}
    trainer.train()
    frozen = ("embeddings", "encoder.layer.0.", "encoder.layer.1.")
    for name, value in model.model_body.state_dict().items():
        if "pooler" in name:  # does not run
            continue
        assert torch.equal(value, before[name]) == any(part in name for part in frozen), name
    assert callback.ledger.compute_saved > 0.1 and callback.run.steps_done == 24
    assert len(model.predict(data["text"])) == len(data["text"])
