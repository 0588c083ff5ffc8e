"""Two hundred times at random: freeze, unfreeze, save, resume. Every promise holds each time, and nothing piles up."""

import gc
import os
import random
import threading

import psutil
import pytest
import torch
from architectures import TEXT
from training import Rows, arguments, assert_left_alone, predictor_that_says
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from smartfrz_hf import SmartFRZConfig, SmartFRZTrainer
from smartfrz_hf.policies import Decision

CYCLES, WARM_UP = 200, 40
TINY = TEXT | {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}


class Promises(TrainerCallback):
    """Looks at everything after each step, and at what a resumed run starts with."""

    def __init__(self, chance):
        self.chance, self.saved, self.resumes, self.frozen = chance, None, False, {}
        self.counts = {"froze": 0, "unfroze": 0, "resumed": 0, "steps": 0}

    def inside(self):
        return [unit for unit in self.smartfrz.run.stack.units[: self.smartfrz.run.front.freezer.depth]]

    def parameters_inside(self):
        return {key: p for unit in self.inside() for key, p in unit.named_parameters().items()}

    def everything(self, model, optimizer):
        """What a run that goes on has to find again."""
        smartfrz = self.smartfrz
        return {
            "weights": {key: value.clone() for key, value in model.state_dict().items()},
            "optimizer": {
                key: {name: value.clone() for name, value in optimizer.state[p].items()}
                for key, p in model.named_parameters()
                if p in optimizer.state
            },
            "history": {str(smartfrz.run.observer.history.steps): smartfrz.run.observer.history.snapshots().clone()},
            "depth": {"": torch.tensor(smartfrz.run.front.freezer.depth)},
            "stages": {str(smartfrz.ledger.stages): torch.tensor(0)},
        }

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.resumes:
            found, saved = flat(self.everything(model, optimizer)), flat(self.saved)
            assert found.keys() == saved.keys()
            assert all(torch.equal(value, saved[key]) for key, value in found.items())
            self.counts["resumed"] += 1
        self.frozen = {key: p.detach().clone() for key, p in self.parameters_inside().items()}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        assert all(p.grad is None for p in self.parameters_inside().values())

    def on_step_begin(self, args, state, control, **kwargs):
        # A restart of the learning rate, as far as the callback can tell.
        rises = self.chance.random() < 0.2
        self.smartfrz.run.rates.observe = lambda step, rate: rises
        self.depth = self.smartfrz.run.front.freezer.depth

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        inside = self.parameters_inside()
        for key, p in inside.items():
            assert key not in self.frozen or torch.equal(p, self.frozen[key]), key
            assert not p.requires_grad and p.grad is None and p not in optimizer.state, key
        assert all(p.requires_grad for key, p in model.named_parameters() if key not in inside)
        for unit in self.inside():
            assert not any(child.training for module in unit.modules.values() for child in module.modules())
        self.frozen = {key: self.frozen.get(key, p.detach().clone()) for key, p in inside.items()}
        self.counts["steps"] += 1
        self.counts["froze"] += self.smartfrz.run.front.freezer.depth > self.depth
        self.counts["unfroze"] += any(s.step == state.global_step and not s.depth for s in self.smartfrz.ledger.stages)

    def on_save(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.saved = self.everything(model, optimizer)


def flat(values):
    """Nested dictionaries as one."""
    if not isinstance(values, dict):
        return {(): values}
    return {(key, *rest): value for key, inner in values.items() for rest, value in flat(inner).items()}


def make(folder, promises, chance):
    """A trainer over a new model, and the callback that watches it."""
    trainer = SmartFRZTrainer(
        model=BertForSequenceClassification(BertConfig(**TINY)),
        args=arguments(
            folder,
            logging_strategy="no",
            save_strategy="steps",
            save_total_limit=2,
            lr_scheduler_type="constant_with_warmup",
            per_device_train_batch_size=2,
        ),
        train_dataset=Rows(8),
        smartfrz=SmartFRZConfig(record_every=1, first_decision=1, decide_every=1, cache_memory=2**20),
        predictor=predictor_that_says(0.5),
    )
    trainer.smartfrz.policy.decide = lambda seen: Decision(min(4, seen.depth + chance.choice([0, 0, 1, 2])), "chance")
    promises.smartfrz = trainer.smartfrz
    trainer.add_callback(promises)
    return trainer


def held():
    """Bytes in memory, threads and open files of this process."""
    gc.collect()
    return psutil.Process().memory_info().rss, threading.active_count(), len(os.listdir("/proc/self/fd"))


@pytest.fixture
def little_garbage():
    """Accelerate collects garbage whenever training starts; what is there already need not be looked through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
def test_soak(tmp_path, little_garbage):
    chance = random.Random(0)
    promises, step, trainer, checkpoint, before = Promises(chance), 0, None, None, None
    folder = tmp_path
    for cycle in range(CYCLES):
        if trainer is None or chance.random() < 0.5:
            trainer = make(tmp_path, promises, chance)
        promises.resumes = checkpoint is not None and chance.random() < 0.9
        if not promises.resumes:
            step, folder = 0, tmp_path / f"from-{cycle}"
        step += chance.randint(1, 3)
        trainer.args.output_dir, trainer.args.max_steps, trainer.args.save_steps = str(folder), step, step
        trainer.train(resume_from_checkpoint=checkpoint if promises.resumes else None)
        checkpoint = str(folder / f"checkpoint-{step}")
        assert_left_alone(trainer.model)
        if cycle == WARM_UP:
            before = held()
    assert all(count > 40 for count in promises.counts.values()), promises.counts
    memory, threads, files = held()
    assert (threads, files) == before[1:]
    assert memory - before[0] < 8 * 2**20, f"{(memory - before[0]) / 2**20:.1f} MiB more after {CYCLES} cycles"
