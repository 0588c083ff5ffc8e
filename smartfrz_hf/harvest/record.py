"""Recording one full training run: weight snapshots, learning rates, and each unit's CKA to its own end."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..blocks import BlockStack, evaluation_mode, find_blocks
from ..history import WeightSampler
from .cka import linear_cka
from .rewind import Rewinder

PROBE_ROWS = 256


def pool(hidden: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    One vector a row: the mean over tokens that are not padding, or over the positions of a feature map.

    Args:
        hidden (`torch.Tensor`): of shape `(rows, tokens, features)` or `(rows, features, height, width)`.
        attention_mask (`torch.Tensor`, *optional*): of shape `(rows, tokens)`, 0 at padding.

    Returns:
        `torch.Tensor` of shape `(rows, features)`.
    """
    if hidden.dim() == 4:
        return hidden.mean((2, 3))
    if attention_mask is None:
        return hidden.mean(1)
    weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


class UnitOutputs:
    """
    Collects the pooled output of each unit on a probe batch.

    Args:
        stack ([`BlockStack`]): the units.
        batches (`list[dict[str, torch.Tensor]]`): the probe rows, as inputs of the backbone.
    """

    def __init__(self, stack: BlockStack, batches: list[dict[str, torch.Tensor]]):
        self.stack, self.batches = stack, batches

    @torch.no_grad()
    def __call__(self) -> list[torch.Tensor]:
        """One `torch.Tensor` of shape `(rows, features)` per unit. The model's mode is left as it was."""
        found: list[list[torch.Tensor]] = [[] for _ in self.stack.units]
        mask: torch.Tensor | None = None

        def stem(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found[0].append(pool(args[0] if args else kwargs["hidden_states"], mask))

        def block(unit: int) -> Callable:
            def hook(module: nn.Module, args: tuple, output: Any) -> None:
                found[unit].append(pool(output[0] if isinstance(output, tuple) else output, mask))

            return hook

        modes = {module: module.training for module in self.stack.model.modules()}
        hooks = [self.stack.blocks[0].register_forward_pre_hook(stem, with_kwargs=True)]
        hooks += [module.register_forward_hook(block(i)) for i, module in enumerate(self.stack.blocks, start=1)]
        try:
            self.stack.model.eval()
            for batch in self.batches:
                mask = batch.get("attention_mask")
                self.stack.backbone(**batch)
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in modes.items():
                module.training = mode
        return [torch.cat(parts).float().cpu() for parts in found]


class RecordingCallback(TrainerCallback):
    """
    Records a run of any [`~transformers.Trainer`], without changing it by one bit.

    Args:
        probe (`list[dict[str, torch.Tensor]]`): the probe rows, in batches, as inputs of the model with their labels.
        samples (`int`): weights recorded per unit.
        snapshots (`int`): snapshots over the run; a run of fewer steps records every step.
        probes (`int`): how often over the run the units' outputs and the probe's loss are taken.
        rewinds (`int`): at how many moments of the run all weights are kept for the rewind test.
        rewind_rows (`int`): most rows of the probe that the rewind test uses.
        progress (`Callable[[float], None]`, *optional*): told the fraction of the run done since its last call.
    """

    def __init__(
        self,
        probe: list[dict[str, torch.Tensor]],
        samples: int = 1024,
        snapshots: int = 200,
        probes: int = 40,
        rewinds: int = 16,
        rewind_rows: int = 128,
        progress: Callable[[float], None] | None = None,
    ):
        self.probe, self.samples, self.snapshots, self.probes = probe, samples, snapshots, probes
        self.rewinds, self.rewind_rows, self.progress = rewinds, rewind_rows, progress
        self.steps: list[int] = []
        self.learning_rates: list[float] = []
        self.weights: list[torch.Tensor] = []
        self.probe_steps: list[int] = []
        self.probe_losses: list[float] = []
        self.rewind_steps: list[int] = []
        self._outputs: list[list[torch.Tensor]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Record the starting point."""
        stack = find_blocks(model)
        self.names = stack.names
        self._sampler = WeightSampler(stack.units, self.samples, seed=args.seed)
        self._model = stack.model
        inputs = inspect.signature(stack.backbone.forward).parameters
        self._unit_outputs = UnitOutputs(stack, [{k: v for k, v in b.items() if k in inputs} for b in self.probe])
        self._rewinder = Rewinder(stack)
        self.start_loss = self._loss(self.rewind_rows)
        self._record(state, kwargs["lr_scheduler"])

    def on_step_end(self, args, state, control, **kwargs):
        """Record what is due."""
        self._record(state, kwargs["lr_scheduler"])
        if self.progress is not None:
            self.progress(1 / state.max_steps)

    def _record(self, state, lr_scheduler) -> None:
        step, last = state.global_step, state.max_steps
        if step % max(1, last // self.snapshots) == 0 or step == last:
            self.steps.append(step)
            self.learning_rates.append(lr_scheduler.get_last_lr()[0])
            self.weights.append(torch.stack([self._sampler.read(i).cpu() for i in range(len(self.names))]))
        due = {round(i * last / self.probes) for i in range(self.probes + 1)}
        if step in due:
            self.probe_steps.append(step)
            self._outputs.append(self._unit_outputs())
            self.probe_losses.append(self._loss())
        if step < last and step in {round(i * last / self.rewinds) for i in range(self.rewinds)}:
            self.rewind_steps.append(step)
            self._rewinder.keep()

    def on_train_end(self, args, state, control, **kwargs):
        """Hold the rewind test."""
        self.rewind_losses = self._rewinder.losses(lambda: self._loss(self.rewind_rows))
        self.end_loss = self._loss(self.rewind_rows)

    @torch.no_grad()
    def _loss(self, most_rows: int | None = None) -> float:
        """Mean loss of the model on the probe, in evaluation mode."""
        total, rows = 0.0, 0
        with evaluation_mode(self._model):
            for batch in self.probe:
                if most_rows is not None and rows >= most_rows:
                    break
                count = len(batch["labels"])
                total += self._model(**batch).loss.item() * count
                rows += count
        return total / rows

    def result(self) -> dict[str, torch.Tensor]:
        """
        What was recorded.

        Returns:
            `dict[str, torch.Tensor]`: `steps` `(snapshots,)`, `learning_rates` `(snapshots,)`, `weights`
            `(snapshots, units, samples)`; `probe_steps` `(probes,)`, `probe_losses` `(probes,)` and `cka` `(probes,
            units)`, the linear CKA of each unit's output at a probe to its output at the end of the run;
            `rewind_steps` `(moments,)`, `rewind_losses` `(moments, units)`, as [`Rewinder.losses`] gives them, and
            `rewind_range` `(2,)`, the loss on the same rows at the start and the end of the run.
        """
        end = self._outputs[-1]
        cka = [[linear_cka(now, last) for now, last in zip(outputs, end, strict=True)] for outputs in self._outputs]
        return {
            "steps": torch.tensor(self.steps),
            "learning_rates": torch.tensor(self.learning_rates),
            "weights": torch.stack(self.weights),
            "probe_steps": torch.tensor(self.probe_steps),
            "probe_losses": torch.tensor(self.probe_losses),
            "cka": torch.tensor(cka),
            "rewind_steps": torch.tensor(self.rewind_steps),
            "rewind_losses": self.rewind_losses,
            "rewind_range": torch.tensor([self.start_loss, self.end_loss]),
        }
