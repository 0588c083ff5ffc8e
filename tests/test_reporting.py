"""What a run freezes is shown where people look, with the callback alone."""

import json
import sys

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import arguments, build, smartfrz, train
from transformers import Trainer

from smartfrz_hf import Decision, FreezingRun, Policy, SmartFRZCallback, SmartFRZTrainer
from smartfrz_hf.reporting import add_to_model_card, opening_line

KEYS = {"depth", "frozen_fraction", "compute_saved", "cache_hit_rate", "cache_bytes", "cache_seconds_saved"}
STATIC = {"policy": "static", "static_depth": 2}


def test_log_history_has_the_figures(tmp_path):
    trainer = train(tmp_path, [SmartFRZCallback(**STATIC)], eval_strategy="steps", eval_steps=10)
    logs = [{key for key in log if key.startswith("freeze/")} for log in trainer.state.log_history]
    assert {f"freeze/{key}" for key in KEYS} in logs
    for log, keys in zip(trainer.state.log_history, logs, strict=True):
        assert bool(keys) == ("loss" in log or "train_loss" in log)
    assert trainer.state.log_history[0]["freeze/depth"] == 2


def test_tensorboard_has_the_figures_and_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    train(tmp_path, [SmartFRZCallback(**STATIC)], report_to="tensorboard")
    (file,) = (tmp_path / "logs").rglob("events*")
    events = EventAccumulator(str(file)).Reload()
    assert {f"train/freeze/{key}" for key in KEYS} <= set(events.Tags()["scalars"])
    assert {event.value for event in events.Scalars("train/freeze/depth")} == {2}
    assert "smartfrz/text_summary" in events.Tags()["tensors"]


def test_wandb_has_the_figures_and_the_configuration(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": tmp_path, "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, str(value))
    train(tmp_path, [SmartFRZCallback(**STATIC)], report_to="wandb")
    try:
        assert {f"train/freeze/{key}" for key in KEYS} <= set(wandb.run.summary.keys())
        assert wandb.run.config["smartfrz/static_depth"] == 2
    finally:
        wandb.finish()


def test_mlflow_has_the_figures_and_the_configuration(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    train(tmp_path, [SmartFRZCallback(**STATIC)], report_to="mlflow")
    data = mlflow.last_active_run().data
    assert {f"freeze/{key}" for key in KEYS} <= set(data.metrics)
    assert data.params["smartfrz/static_depth"] == "2"


def test_trackio_has_the_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    logged = []
    monkeypatch.setattr(trackio, "log", lambda metrics, **kwargs: logged.append(metrics))
    train(tmp_path, [SmartFRZCallback(**STATIC)], report_to="trackio", project="smartfrz-test")
    assert {f"train/freeze/{key}" for key in KEYS} <= set(logged[0])


def test_a_tracker_that_refuses_breaks_no_run(tmp_path, caplog, monkeypatch):
    class MLflowCallback(transformers.TrainerCallback):
        """Looks like the one of Transformers."""

    class Broken:
        def active_run(self):
            raise OSError("no network")

    monkeypatch.setitem(sys.modules, "mlflow", Broken())
    transformers.logging.enable_propagation()
    trainer = train(tmp_path, [MLflowCallback(), SmartFRZCallback(**STATIC)])
    transformers.logging.disable_propagation()
    assert trainer.state.global_step == 20
    assert sum("did not take the configuration" in record.message for record in caplog.records) == 1


def test_progress_bar_and_lines(tmp_path, capsys):
    train(tmp_path, [SmartFRZCallback(**STATIC)], disable_tqdm=False)
    out, err = capsys.readouterr()
    assert "frozen 2/5" in err
    first, *_, last = [line for line in out.splitlines() if line.startswith("SmartFRZ")]
    assert first == (
        "SmartFRZ: 2 of 5 units of BertForSequenceClassification are frozen, and no other will freeze (policy static)."
    )
    assert last.startswith("SmartFRZ: 2 of 5 units are frozen at the end, the first froze at step 0 of 20; saved ")


def test_a_policy_that_freezes_nothing_says_so(tmp_path, capsys):
    train(tmp_path, [SmartFRZCallback(policy="never")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("SmartFRZ")]
    assert lines == [
        "SmartFRZ: no unit of BertForSequenceClassification will freeze (policy never).",
        "SmartFRZ: nothing froze in 20 steps.",
    ]


@pytest.mark.parametrize(
    ("first", "every", "line"),
    [
        (1, 1, "may freeze, decided at every step of 20 (policy linear)."),
        (4, 4, "may freeze, decided every 4 steps of 20 (policy linear)."),
        (0.5, 4, "may freeze, decided every 4 steps of 20, from step 10 on (policy linear)."),
        (0.5, 0.5, "may freeze, decided at step 10 of 20 (policy linear)."),
        (100, 1, "will freeze (policy linear; the first decision is due at step 100 of 20)."),
    ],
)
def test_the_first_line_says_when_it_is_decided(first, every, line):
    model = build("bert")
    config = {"policy": "linear", "first_decision": first, "decide_every": every}
    with FreezingRun(model, torch.optim.SGD(model.parameters()), 20, config) as run:
        assert opening_line(run).endswith(f"BertForSequenceClassification {line}")


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    policy=st.sampled_from(["linear", "freezeout", "random", "static", "never"]),
    start=st.sampled_from([0.0, 0.5, 0.9, 0.96, 0.99]),
    level=st.sampled_from([0.3, 1.0]),
    every=st.integers(1, 12),
)
def test_the_first_line_says_what_a_schedule_comes_to(policy, start, level, every):
    model = build("bert")
    config = {"policy": policy, "linear_start": start, "linear_depth": level, "static_depth": int(level * 4)}
    with FreezingRun(
        model, torch.optim.SGD(model.parameters()), 20, config | {"first_decision": every, "decide_every": every}
    ) as run:
        line, most = opening_line(run), run.most_units
        for step in range(1, 21):
            run.step(step)
        assert run.frozen_units == most
    if not most:
        assert line.startswith("SmartFRZ: no unit of BertForSequenceClassification will freeze"), line
        assert (f"; the last decision is due at step {19 // every * every} of 20)" in line) == (policy != "never")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # from peft
@pytest.mark.parametrize(
    ("name", "task", "most"), [("bert", "SEQ_CLS", 5), ("gpt2", None, 5), ("gpt2", "CAUSAL_LM", 4)]
)
def test_the_first_line_says_how_many_can_freeze(name, task, most):
    model = build(name)
    if task is not None:
        model = get_peft_model(model, LoraConfig(task_type=task))
    deepest = type("Deepest", (Policy,), {"decide": lambda self, seen: Decision(seen.units * (seen.step > 0), "all")})
    with FreezingRun(model, torch.optim.SGD(model.parameters()), 20, policy=deepest()) as run:
        line = opening_line(run)
        run.step(1)
        assert run.frozen_units == most and f": up to {most} of 5 units " in line


def test_one_is_not_told_as_many(tmp_path, capsys):
    train(tmp_path, [SmartFRZCallback(policy="static", static_depth=1)], max_steps=2)
    train(tmp_path, [SmartFRZCallback(policy="never")], max_steps=1)
    out = capsys.readouterr().out
    assert "1 of 5 units is frozen at the end" in out and "nothing froze in 1 step." in out


def test_a_quiet_log_is_quiet(tmp_path, capsys):
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    train(tmp_path, [smartfrz(0.1)])
    transformers.logging.set_verbosity(before)
    assert "SmartFRZ" not in capsys.readouterr().out


def test_a_callback_that_is_added_later(tmp_path):
    trainer = Trainer(build("bert"), arguments(tmp_path), train_dataset=train(tmp_path / "other").train_dataset)
    trainer.add_callback(SmartFRZCallback(**STATIC))
    trainer.train()
    trainer.train()
    assert all("freeze/depth" in log for log in trainer.state.log_history)
    assert sum(type(callback).__name__ == "Reporter" for callback in trainer.callback_handler.callbacks) == 1


def test_model_card_of_the_mixin(tmp_path):
    trainer = train(tmp_path, trainer_class=SmartFRZTrainer, trainer_kwargs={"smartfrz": STATIC})
    for _ in range(2):
        trainer.create_model_card(tags=["test"])
    card = ModelCard.load(tmp_path / "README.md")
    assert "smartfrz" in card.data.tags and "test" in card.data.tags
    assert card.text.count("## Layer freezing") == 1 and "`policy='static'`" in card.text
    assert "| `bert.encoder.layer.0` | " in card.text and (tmp_path / "freeze_timeline.png").is_file()


def test_model_card_with_the_callback_alone(tmp_path):
    callback = SmartFRZCallback(**STATIC)
    trainer = train(tmp_path, [callback])
    trainer.train()
    for _ in range(2):
        trainer.create_model_card(tags="test")
    add_to_model_card(tmp_path / "README.md", callback.ledger, callback.config)  # once more does no harm
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags.count("smartfrz") == 1 and "test" in card.data.tags
    assert card.text.count("## Layer freezing") == 1 and "`policy='static'`" in card.text
    assert "| `bert.encoder.layer.0` | " in card.text and (tmp_path / "freeze_timeline.png").is_file()
    assert trainer.model.model_tags == ["smartfrz"]


def test_model_card_of_a_trainer_that_has_not_trained(tmp_path):
    trainer = Trainer(build("bert"), arguments(tmp_path), callbacks=[SmartFRZCallback(**STATIC)])
    trainer.create_model_card()
    assert "## Layer freezing" not in (tmp_path / "README.md").read_text()


def test_the_ledger_keeps_what_the_predictor_said(tmp_path):
    callback = smartfrz(0.9, first_decision=5, decide_every=5, record_every=1, max_depth=2)
    train(tmp_path, [callback])
    records = callback.ledger.records
    assert [(record.step, record.depth) for record in records] == [(0, 0), (5, 0), (10, 2), (15, 2)]
    assert records[0].probabilities is None and records[1].probabilities == pytest.approx([0.9] * 5)
    assert len(records[2].probabilities) == 3 and records[1].seconds < records[3].seconds
    state = callback.ledger.state_dict()
    again = type(callback.ledger)()
    again.load_state_dict(json.loads(json.dumps(state)))
    assert again.records == records and again.seconds > state["seconds"]
