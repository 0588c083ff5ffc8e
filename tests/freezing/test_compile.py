"""`torch.compile`: the model really runs compiled, one graph more for each freezing stage, and trains as it does without."""

import logging

import pytest
import torch
from architectures import TEXT
from torch._dynamo.utils import counters
from training import Rows, arguments, assert_left_alone, assert_same_run
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback
from versions import RENAMED

from smartfrz_hf import SmartFRZCallback, SmartFRZConfig, SmartFRZTrainer
from smartfrz_hf.policies import Decision

STAGES = {2: 1, 4: 2, 6: 3}
# The step after a stage makes a graph.
GRAPHS = [1, 1, 2, 2, 3, 3, 4, 4]


def tiny_bert(**changes):
    """Three units."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**TEXT | {"num_hidden_layers": 2} | changes))
    model.config.problem_type = "single_label_classification"  # which BERT sets in its first pass, and compiles again
    return model


class Graphs(TrainerCallback):
    """How many graphs there are after each step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def run(folder, backend=None, alone=False, model=None, config=None, **changes):
    """Three freezing stages in eight steps."""
    if backend is not None:
        changes |= {"torch_compile": True, "torch_compile_backend": backend}
    settings = {
        "model": tiny_bert() if model is None else model,
        "args": arguments(folder, max_steps=8, logging_steps=1, **changes),
        "train_dataset": Rows(40),
        "eval_dataset": Rows(8),
    }
    config = SmartFRZConfig(policy="linear", first_decision=1, decide_every=1, **config or {})
    graphs = Graphs()
    if alone:
        callback = SmartFRZCallback(config)
        trainer = Trainer(**settings, callbacks=[callback, graphs])
    else:
        trainer = SmartFRZTrainer(**settings, callbacks=[graphs], smartfrz=config)
        callback = trainer.smartfrz
    callback.policy.decide = lambda seen: Decision(max([0, *(d for s, d in STAGES.items() if s <= seen.step)]), "told")
    trainer.train()
    assert {stage.step: stage.depth for stage in callback.ledger.stages} == STAGES
    return trainer, callback, graphs.counts


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback alone"])
def test_one_graph_more_for_each_stage(tmp_path, alone):
    plain, counted, _ = run(tmp_path, alone=alone)
    trainer, callback, graphs = run(tmp_path, "eager", alone)
    # With the callback alone, hooks inside the compiled model wait for the first batch, which makes one graph more.
    assert graphs == [count + alone for count in GRAPHS]
    assert_same_run(plain, trainer)
    assert callback.ledger.spent == counted.ledger.spent and callback.ledger.full == counted.ledger.full
    assert_left_alone(trainer.model)


@pytest.mark.slow
def test_gradients_of_a_traced_backward_pass(tmp_path):
    plain, _, _ = run(tmp_path)
    trainer, _, graphs = run(tmp_path, "aot_eager")
    assert graphs == GRAPHS
    for before, after in zip(plain.state.log_history[:-1], trainer.state.log_history[:-1], strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-6)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
    for (key, p), q in zip(plain.model.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.slow
def test_inductor(tmp_path):
    """Without dropout, whose random numbers are others there."""
    nothing = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    plain, _, _ = run(tmp_path, model=tiny_bert(**nothing))
    trainer, _, graphs = run(tmp_path, "inductor", model=tiny_bert(**nothing))
    assert graphs == GRAPHS
    for before, after in zip(plain.state.log_history[:-1], trainer.state.log_history[:-1], strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_more_stages_than_graphs_are_allowed(tmp_path):
    """The limit is put back, and a second run starts with no graph."""
    config = torch._dynamo.config
    with config.patch(recompile_limit=2, accumulated_recompile_limit=2):
        trainer, _, graphs = run(tmp_path, "eager")
        assert graphs == GRAPHS and (config.recompile_limit, config.accumulated_recompile_limit) == (2, 2)
        trainer.train()
        assert counters["stats"]["unique_graphs"] == 2 * GRAPHS[-1]


@pytest.mark.slow
def test_a_model_that_came_compiled(tmp_path, caplog):
    """The cache says in one line that it is off."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        model = tiny_bert()
        model.compile(backend="eager")
        _, callback, graphs = run(tmp_path, model=model)
    transformers_logging.disable_propagation()
    assert sum("The activation cache is off" in record.message for record in caplog.records) == 1
    # As with the callback alone, hooks inside the compiled model make one graph more; in torch 2.7 several.
    assert callback.ledger.cache is None and (not RENAMED or graphs == [count + 1 for count in GRAPHS])
