"""A tiny run with the Trainer: what tests of the callback share."""

import math

import torch
from architectures import build
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from versions import settings

from smartfrz_hf import SmartFRZCallback, SmartFRZConfig, SmartFRZPredictor, SmartFRZPredictorConfig


class Rows(Dataset):
    """Token rows of different lengths whose label is their first token's parity, or small images."""

    def __init__(self, count=32, images=False):
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for i in range(count):
            if images:
                pixels = torch.rand(3, 32, 32, generator=generator)
                self.rows.append({"pixel_values": pixels, "labels": torch.tensor(i % 2)})
            else:
                ids = torch.randint(5, 99, (12,), generator=generator)
                mask = (torch.arange(12) < 12 - i % 4).long()
                self.rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids[0] % 2})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]


class Watcher(TrainerCallback):
    """Notes the loss of nothing and the state of everything: weights and gradients flags after each step."""

    def __init__(self):
        self.weights, self.trainable = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append({key: value.clone() for key, value in model.state_dict().items()})
        self.trainable.append({key for key, p in model.named_parameters() if p.requires_grad})


def arguments(folder, **changes):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "logging_steps": 5,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
    }
    return TrainingArguments(**settings(defaults | changes))


def train(
    folder, callbacks=(), model=None, trainer_class=Trainer, dataset=None, trainer_kwargs=None, resume=None, **changes
):
    """Train a tiny BERT (or `model`), from a checkpoint if there is one to resume, and give the trainer back."""
    model = build("bert") if model is None else model
    images = getattr(model, "main_input_name", "") == "pixel_values"
    trainer = trainer_class(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=dataset or Rows(images=images),
        eval_dataset=Rows(8, images=images),
        callbacks=list(callbacks),
        **trainer_kwargs or {},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def predictor_that_says(probability, window=4, weights_per_unit=32, **config):
    """A predictor with a constant answer."""
    config = SmartFRZPredictorConfig(window=window, weights_per_unit=weights_per_unit, front_sum=False, **config)
    predictor = SmartFRZPredictor(config)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.zero_()
        predictor.head[-1].bias.fill_(torch.logit(torch.tensor(probability)))
    return predictor


START_LIMITS = (("conservative", 0.1, 0.5), ("balanced", 0.3, 1.0), ("aggressive", 1.0, 1.0))


def predictor_that_loses(points, never=0.1, **config):
    """Freezing all costs so many points, and less in proportion to the share of the front; nothing freezes later."""
    limits = {point: {"points": most, "share": share, "blocks": 1.0} for point, most, share in START_LIMITS}
    predictor = predictor_that_says(never, start_stage=True, **{"start_limits": limits} | config)
    with torch.no_grad():
        predictor.start.log_scale.fill_(math.log(points))
        predictor.start.log_share_power.fill_(0.0)
        predictor.start.log_size_power.fill_(-50.0)
    return predictor


def smartfrz(probability=0.9, **config):
    return SmartFRZCallback(SmartFRZConfig(**config), predictor_that_says(probability))


def assert_same_run(first, second):
    assert [log.get("loss") for log in first.state.log_history] == [
        log.get("loss") for log in second.state.log_history
    ]
    for (key, p), (_, q) in zip(first.model.state_dict().items(), second.model.state_dict().items(), strict=True):
        assert torch.equal(p, q), key
    for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True):
        for key, value in first.optimizer.state[p].items():
            assert torch.equal(value, second.optimizer.state[q][key]), key


def assert_left_alone(model):
    """As if nothing had ever been frozen."""
    assert all(parameter.requires_grad for parameter in model.parameters())
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert not {"train", "forward"} & module.__dict__.keys()
    assert not _get_current_dispatch_mode_stack()
