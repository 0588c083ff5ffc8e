"""What people do beside training, and freezing, its start stage or the activation cache must not spoil."""

import math

import pytest
import torch
from architectures import TEXT, build
from cached import assert_same_losses, losses
from cached import run as cached_run
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from training import Rows, assert_left_alone, predictor_that_says, train
from transformers import (
    BertConfig,
    EarlyStoppingCallback,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)
from versions import RENAMED

from smartfrz_hf import (
    Decision,
    FreezingRun,
    Policy,
    SmartFRZCallback,
    SmartFRZConfig,
    SmartFRZMixin,
    SmartFRZTrainer,
    find_blocks,
)
from smartfrz_hf.activation_cache.monitor import CacheMonitor
from smartfrz_hf.signals.pilot_signals import PilotSignals

STEPS, OPTIONS = 40, {"first_decision": 10, "decide_every": 10}
DEPTH, PILOT = 3, 4


class StartAt(Policy):
    """Freezes some units at the end of the pilot."""

    pilot = 0.1

    def __init__(self, depth=DEPTH):
        self.depth, self.seen = depth, []

    def decide(self, observation):
        if observation.pilot is None:
            return Decision(observation.depth, "no pilot")
        self.seen.append(observation)
        return Decision(self.depth, "at the start")


class At(TrainerCallback):
    """Calls a function at the end of some steps."""

    def __init__(self, function, steps):
        self.function, self.steps = function, steps

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            self.function(model, control)


@pytest.fixture
def always(monkeypatch):
    """A tiny model computes faster than anything can be looked up; keep the cache on nevertheless."""
    monkeypatch.setattr(CacheMonitor, "loss", lambda self: None)


def front_of(model, depth=DEPTH):
    """Copies of the weights in front of `depth`."""
    units = find_blocks(model).units[:depth]
    return {name: p.detach().clone() for unit in units for name, p in unit.named_parameters().items()}


def assert_front(model, first):
    for name, p in front_of(model).items():
        assert torch.equal(p, first[name]), name


def started(folder, callbacks=(), model=None, dataset=None, trainer_kwargs=None, smartfrz=None, **changes):
    """A run whose front freezes at the end of the pilot, with the weights of the start."""
    model = build("bert") if model is None else model
    first, policy = front_of(model), StartAt()
    config = SmartFRZConfig(**OPTIONS | (smartfrz or {}))
    arguments = {"max_steps": STEPS, "logging_steps": 1, "dataset": dataset or Rows(24)} | changes
    kwargs = {"smartfrz": config, "policy": policy} | (trainer_kwargs or {})
    trainer = train(folder, callbacks, model, SmartFRZTrainer, trainer_kwargs=kwargs, **arguments)
    assert_left_alone(trainer.model)
    return trainer, first, policy


# The activation cache


def test_label_smoothing(tmp_path, always):
    """The Trainer takes the labels out and computes the loss itself."""
    for name in ("bert", "gpt2"):
        runs = [
            cached_run(
                tmp_path,
                cache,
                name,
                dataset=[row | {"labels": row["input_ids"]} for row in Rows()] if name == "gpt2" else Rows(),
                label_smoothing_factor=0.2,
                eval_strategy="no",
            )
            for cache in (False, True)
        ]
        assert_same_losses(*runs)
        assert runs[1].ledger.cache.hits and runs[1].ledger.cache.off is None


class FreezingSeq2SeqTrainer(SmartFRZMixin, Seq2SeqTrainer):
    pass


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces")
def test_text_is_generated_in_evaluation(tmp_path, always):
    """By an encoder-decoder, whose encoder is the front."""
    generated = {}
    for cache in (False, True):
        texts = []

        def note(found, texts=texts):
            texts.append(found.predictions)
            return {}

        torch.manual_seed(0)
        encoder, decoder = BertConfig(**TEXT), BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
        config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
        config.decoder_start_token_id = config.pad_token_id = config.eos_token_id = 0
        model = EncoderDecoderModel(config)
        model.generation_config = GenerationConfig.from_model_config(config)
        args = Seq2SeqTrainingArguments(
            str(tmp_path),
            num_train_epochs=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=1,
            predict_with_generate=True,
            generation_max_length=6,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = [row | {"labels": row["input_ids"][:6]} for row in Rows(16)]
        trainer = FreezingSeq2SeqTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=rows[:8],
            compute_metrics=note,
            smartfrz={"policy": "static", "static_depth": 2.0, "first_decision": 2, "activation_cache": cache},
        )
        trainer.train()
        generated[cache] = texts
        if cache:
            assert trainer.ledger.cache.hits and trainer.ledger.cache.off is None
    assert all((a == b).all() for a, b in zip(generated[False], generated[True], strict=True))


# The start stage


def test_a_vocabulary_that_grows_after_the_callback_was_made(tmp_path):
    """New tokens, when the Trainer has been made already: units and pilot are those of the model that is trained."""
    callback = SmartFRZCallback(SmartFRZConfig(**OPTIONS), policy=StartAt())
    model = build("bert")

    class Grows(TrainerCallback):
        def on_init_end(self, args, state, control, **kwargs):
            model.resize_token_embeddings(model.config.vocab_size + 7)

    trainer = train(tmp_path, [callback, Grows()], model, dataset=Rows(24), max_steps=STEPS)
    assert callback.ledger.depth == DEPTH and math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_predictions_of_another_callback_within_the_pilot(tmp_path):
    def predict(model, control):
        model.eval()
        with torch.no_grad():
            for row in Rows(8):
                model(**{name: value[None] for name, value in row.items()})
        model.train()

    ends = []
    for callbacks in ([], [At(predict, range(PILOT + 2))]):
        trainer, first, _ = started(tmp_path, callbacks, smartfrz={"activation_cache": False})
        assert_front(trainer.model, first)
        ends.append((losses(trainer), trainer.ledger.stages))
    assert ends[0] == ends[1]


def test_evaluation_on_start_and_at_each_step(tmp_path):
    trainer, first, policy = started(
        tmp_path, eval_strategy="steps", eval_steps=1, eval_on_start=True, max_grad_norm=0.1
    )
    (stage,) = trainer.ledger.stages
    assert (stage.step, stage.depth) == (PILOT, DEPTH)
    assert_front(trainer.model, first)


@pytest.mark.parametrize("stop", [2, 4])
def test_a_run_that_ends_in_the_pilot(tmp_path, stop):
    def end(model, control):
        control.should_training_stop = True

    trainer, _, policy = started(tmp_path, [At(end, [stop])])
    assert trainer.state.global_step == stop and len(policy.seen) == (stop == PILOT)
    assert all(group["lr"] <= 1e-3 for group in trainer.optimizer.param_groups)


def test_early_stopping_gives_the_best_weights_back(tmp_path):
    """The best checkpoint is one of the pilot, in which the front had other weights than at the end."""
    scores = iter([0.1, 0.9, *[0.5] * 40])
    trainer, first, _ = started(
        tmp_path,
        [EarlyStoppingCallback(5)],
        trainer_kwargs={"compute_metrics": lambda found: {"score": next(scores)}},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    assert trainer.state.global_step == 7 and trainer.state.best_global_step == 2
    assert trainer.ledger.depth == DEPTH
    best = build("bert").from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, best[name]), name
    assert any(not torch.equal(best[name], value) for name, value in first.items())


def test_training_twice_with_the_start_stage(tmp_path):
    """The second run has a pilot of its own, from the weights that the first one has left."""
    trainer, first, policy = started(tmp_path)
    assert_front(trainer.model, first)
    second = front_of(trainer.model)
    trainer.train()
    assert len(policy.seen) == 2 and trainer.ledger.depth == DEPTH
    assert_front(trainer.model, second)
    assert_left_alone(trainer.model)


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_rows_than_a_batch(tmp_path, rows, always):
    for changes in ({"max_steps": 1}, {"max_steps": -1, "num_train_epochs": 40}):
        trainer, first, policy = started(tmp_path, dataset=Rows(rows), **changes)
        long = changes["max_steps"] == -1
        assert len(policy.seen) == long and trainer.ledger.depth == DEPTH * long
        assert all(math.isfinite(loss) for loss in losses(trainer))


class Stream(IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        yield from Rows(24)


def test_a_dataset_without_a_length(tmp_path, always):
    runs = [
        started(tmp_path, dataset=Stream(), smartfrz={"activation_cache": cache}, max_steps=60)
        for cache in (False, True)
    ]
    assert_same_losses(*(trainer for trainer, _, _ in runs))
    for trainer, first, _ in runs:
        assert trainer.ledger.depth == DEPTH
        assert_front(trainer.model, first)


def loop(model, optimizer, policy=None, steps=STEPS, scaler=None, scale_of=lambda step: 1.0, config=None, **options):
    """A plain loop with the start stage; the loss of a step can be scaled up until it overflows."""
    config = SmartFRZConfig(**OPTIONS | {"activation_cache": False} | (config or {}))
    torch.manual_seed(0)
    run = FreezingRun(model, optimizer, steps, config, policy=policy, **options)
    with run:
        for step, batch in enumerate(DataLoader(Rows(4 * steps), batch_size=4)):
            loss = model(**batch).loss * scale_of(step)
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
            run.step(step + 1)
    return run


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("overflows", [(0, 1), (3, 4, 20), (0, 1, 2, 3)])
def test_steps_that_a_loss_scaler_skips(fused, overflows):
    """
    In the pilot, at its end, and after it. Fused optimizers take the step all the same, and see gradients that are neither
    finite nor unscaled.
    """
    model, policy = build("bert"), StartAt()
    first = front_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run = loop(model, optimizer, policy, scaler=scaler, scale_of=lambda s: 1e38 if s in overflows else 1.0)
    assert run.ledger.depth == DEPTH and 1 <= run.front.rate.factor <= 4
    assert_front(model, first)
    signals = policy.seen[0].pilot
    assert signals.steps == PILOT - len([step for step in overflows if step < PILOT])
    assert signals.contributions.isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_pilot_of_skipped_steps_freezes_nothing():
    """Though a share of the compute is to be saved: nobody knows how much any front saves."""
    model = build("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run = loop(
        model,
        optimizer,
        predictor=predictor_that_says(0.1),
        scaler=scaler,
        scale_of=lambda step: 1e38 if step < PILOT else 1.0,
        config={"target_saving": 0.3},
    )
    assert run.ledger.depth == 0 and run.front.rate.factor == 1


def test_gradients_that_overflow_do_not_raise_the_rate():
    """Each is finite, and their squares are not."""
    huge, small = torch.tensor([math.inf, 1.0, 1.0]), torch.full((3,), 1e-3)
    signals = PilotSignals(4, torch.full((3,), 100.0), huge, -small, small, small, pretrained=2)
    assert signals.rate_factor(1) == 1.0


def test_an_interrupted_step_does_not_keep_the_raised_rate():
    class Interrupted(torch.optim.SGD):
        count = 0

        def step(self, closure=None):
            Interrupted.count += 1
            if Interrupted.count == 10:
                raise KeyboardInterrupt
            return super().step(closure)

    model = build("bert")
    optimizer = Interrupted(model.parameters(), lr=0.01)
    with pytest.raises(KeyboardInterrupt):
        loop(model, optimizer, StartAt())
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert_left_alone(model)


def test_a_policy_may_set_rates_of_units_and_have_the_rest_raised():
    class Both(StartAt):
        def rate_factors(self, progress, units):
            return [0.5] * units

    model = build("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run = loop(model, optimizer, Both())
    assert run.front.rate.factor > 1 and len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("kind", ["sgd", "lbfgs"])
def test_an_optimizer_that_calls_a_closure(kind):
    """Gradients come within the step, so before it there are none, or those of the step before."""
    model, policy = build("bert"), StartAt()
    first = front_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if kind == "lbfgs":
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=2, history_size=2)
    config = SmartFRZConfig(**OPTIONS, activation_cache=False)
    with FreezingRun(model, optimizer, STEPS, config, policy=policy) as run:
        for batch in DataLoader(Rows(4 * STEPS), batch_size=4):

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = model(**batch).loss
                loss.backward()
                return loss

            optimizer.step(closure)
            run.step()
    assert run.ledger.depth == DEPTH and optimizer.param_groups[0]["lr"] == 0.01
    assert_front(model, first)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_decay_and_momentum_leave_a_frozen_front_alone(set_to_none):
    model = build("bert")
    first = front_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True)
    zero_grad = optimizer.zero_grad
    optimizer.zero_grad = lambda set_to_none=set_to_none: zero_grad(set_to_none)
    run = loop(model, optimizer, StartAt())
    assert run.ledger.depth == DEPTH
    assert_front(model, first)


def test_an_average_of_the_weights_that_is_swapped_in(tmp_path, always):
    """For each evaluation, in the pilot and after it."""

    class Average(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

        def swap(self, model):
            for name, p in model.named_parameters():
                self.average[name], p.data = p.data, self.average[name]

        def on_step_end(self, args, state, control, model=None, **kwargs):
            for name, p in model.named_parameters():
                self.average[name].lerp_(p.detach(), 0.5)

        def on_evaluate(self, args, state, control, model=None, **kwargs):
            self.swap(model)
            model.eval()
            with torch.no_grad():
                for batch in DataLoader(Rows(8), batch_size=4):
                    assert model(**batch).loss.isfinite()
            model.train()
            self.swap(model)

    runs = [
        started(tmp_path, [Average()], smartfrz={"activation_cache": cache}, eval_strategy="steps", eval_steps=2)
        for cache in (False, True)
    ]
    assert_same_losses(runs[0][0], runs[1][0])
    for trainer, first, _ in runs:
        assert_front(trainer.model, first)
    assert runs[1][0].ledger.cache.off is None


def test_sparse_gradients():
    model = build("bert")
    embeddings = model.get_input_embeddings()
    sparse = nn.Embedding(*embeddings.weight.shape, padding_idx=embeddings.padding_idx, sparse=True)
    sparse.load_state_dict(embeddings.state_dict())
    model.set_input_embeddings(sparse)
    policy = StartAt()
    run = loop(model, torch.optim.SGD(model.parameters(), lr=0.01), policy)
    dense, twin = StartAt(), build("bert")
    loop(twin, torch.optim.SGD(twin.parameters(), lr=0.01), dense)
    assert run.ledger.depth == DEPTH
    torch.testing.assert_close(policy.seen[0].pilot.gradient, dense.seen[0].pilot.gradient)


def test_a_buffer_that_grows_in_the_pilot():
    """As sinusoidal positions do when a longer row comes."""
    model = build("bert")
    stem = model.bert.embeddings
    stem.register_buffer("weights", torch.zeros(4), persistent=False)
    policy = StartAt()

    def grow(step):
        if step == 2:
            stem.register_buffer("weights", torch.zeros(9), persistent=False)
        return 1.0

    run = loop(model, torch.optim.SGD(model.parameters(), lr=0.01), policy, scale_of=grow)
    assert run.ledger.depth == DEPTH


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype(dtype):
    """As in scripts that call `torch.set_default_dtype`; the predictor that comes with the package decides."""
    model = build("bert").to(dtype)
    torch.set_default_dtype(dtype)
    try:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        run = loop(model, optimizer, config={"target_saving": 0.2, "activation_cache": True}, steps_per_epoch=20)
    finally:
        torch.set_default_dtype(torch.float32)
    assert run.ledger.depth and all(p.dtype == dtype for p in model.parameters())


@pytest.mark.skipif(not RENAMED, reason="torch 2.7 makes numbers on the default device, in its own optimizers, too")
def test_another_default_device(monkeypatch):
    """Nothing that is kept beside the model may be made there: here, it would hold no values."""
    first_rows = {name: torch.stack([row[name] for row in Rows(2)]) for name in Rows(1)[0]}
    monkeypatch.setattr("smartfrz_hf.model.tracing.tiny_batches", lambda model: iter([first_rows]))
    model, rows = build("bert"), Rows(16)
    batches = [
        {name: torch.stack([row[name] for row in rows.rows[i : i + 4]]) for name in first_rows} for i in (0, 4, 8)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.device("meta"):
        config = SmartFRZConfig(**OPTIONS, target_saving=0.2)
        with FreezingRun(model, optimizer, STEPS, config, steps_per_epoch=3) as run:
            for step in range(STEPS):
                model(**batches[step % 3]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step()
    assert run.ledger.depth and run.ledger.cache.hits


def test_several_devices_in_one_process_are_refused():
    model = build("bert")
    with pytest.raises(ValueError, match="one process per device"):
        FreezingRun(nn.DataParallel(model), torch.optim.SGD(model.parameters(), lr=0.1), STEPS)
    assert_left_alone(model)
