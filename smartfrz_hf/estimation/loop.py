"""Training steps with a Trainer's model, data and loss, outside the Trainer's own loop."""

import time
from collections.abc import Generator
from numbers import Integral
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import Trainer, TrainingArguments

from ..activation_cache.checks import time_of

FP16_SCALE = 1024.0  # of the loss, so that small gradients do not become zero


def check_estimate(args: TrainingArguments, dataset: Any, rows: int | None, seconds: float) -> int | None:
    """
    Refuse what cannot be measured, and return the number of training rows, or `None` if nobody knows.

    Raises:
        ValueError: there are several processes, or no data, its length is needed and not known, or `rows` or `seconds` is no
            number to measure with.
    """
    for name, value, kind in (("rows", rows, "whole"), ("seconds", seconds, "finite")):
        legal = value is None or 0 < value < float("inf") and (kind == "finite" or isinstance(value, Integral))
        if not legal:
            raise ValueError(f"`{name}` is {value!r}; it must be a {kind} number above 0.")
    if args.world_size > 1:
        raise ValueError(
            f"`estimate` measures in a single process, and there are {args.world_size}. Start it without `accelerate launch` "
            "and `torchrun`."
        )
    if dataset is None:
        raise ValueError("The Trainer has no `train_dataset`, so there is nothing to estimate. Give it one.")
    if rows is None and hasattr(dataset, "__len__"):
        rows = len(dataset)
    if rows is None and args.max_steps <= 0:
        raise ValueError(
            f"A {type(dataset).__name__} has no length, so the length of the run is not known. Set `max_steps` in "
            "`TrainingArguments`, or call `estimate(trainer, rows=...)`."
        )
    return rows


class Loop:
    """
    Takes training steps as a Trainer would, without its callbacks.

    Args:
        trainer ([`~transformers.Trainer`]): its optimizer and scheduler are made if they are not there.
        steps (`int`): optimizer steps of the whole run.
    """

    def __init__(self, trainer: Trainer, steps: int):
        trainer.create_optimizer_and_scheduler(steps)
        self.trainer, self.args = trainer, trainer.args
        self.model: Any = trainer.model
        self.optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        self.scheduler: Any = trainer.lr_scheduler

    def batches(self) -> Generator[tuple[Any, float], None, None]:
        """Batches of the training data, over and over, each with the seconds that it took to load."""
        loader: Any = self.trainer.get_train_dataloader()
        loader = getattr(loader, "base_dataloader", loader)  # Accelerate's own keeps a record of unfinished passes
        while True:
            began = time.perf_counter()
            for batch in loader:
                batch = send_to_device(batch, self.args.device)
                yield batch, time.perf_counter() - began
                began = time.perf_counter()

    def loss(self, batch: Any) -> torch.Tensor:
        """The loss of a batch, with the Trainer's precision."""
        with self.trainer.accelerator.autocast():
            loss: Any = self.trainer.compute_loss(self.model, batch)
        return loss

    def warm_up(self, batch: Any) -> float:
        """A forward and a backward pass. Returns the seconds that they took."""
        self.model.train()
        began = time_of(next(self.model.parameters()))
        self.loss(batch).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return max(1e-6, time_of(next(self.model.parameters())) - began)

    def step(self, batches: list[Any]) -> float:
        """One optimizer step. Returns the seconds that it took."""
        self.model.train()
        began = time_of(next(self.model.parameters()))
        scale = FP16_SCALE if self.trainer.accelerator.mixed_precision == "fp16" else 1.0
        for batch in batches:
            (self.loss(batch) * (scale / len(batches))).backward()
        if scale != 1.0:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
        if self.args.max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        seconds = time_of(next(self.model.parameters())) - began
        self.optimizer.zero_grad(set_to_none=True)
        return seconds

    def memory(self, batch: Any) -> tuple[int, int]:
        """Bytes of weights, gradients and optimizer state, and of the activations that wait for the backward pass."""
        kept: dict[int, int] = {}
        weights = [*self.model.parameters(), *self.model.buffers()]
        own = {tensor.untyped_storage().data_ptr() for tensor in weights}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss(batch)
        loss.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        states = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        fixed = sum(tensor.nbytes for tensor in (*weights, *gradients, *states))
        self.optimizer.zero_grad(set_to_none=True)
        return fixed, sum(kept.values())
