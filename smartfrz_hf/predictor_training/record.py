"""Recording one full training run: weight snapshots, learning rates, and each unit's CKA to its own end."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..model.units import BlockStack, evaluation_mode, find_blocks
from ..signals.probe import FrontProbe, shift, spread_tokens
from ..signals.probe_history import ProbeHistory, compared_snapshots
from ..signals.weights import WeightSampler
from .cka import linear_cka
from .rewind import Rewinder

PROBE_ROWS = 128
SELF_CKA_LAG = 4


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


class Probe:
    """
    A fixed batch of held-out rows that is run again and again over a run.

    Args:
        stack ([`BlockStack`]): the units.
        batches (`list[dict[str, torch.Tensor]]`): the rows, in batches, as inputs of the model with their labels.
    """

    def __init__(self, stack: BlockStack, batches: list[dict[str, torch.Tensor]]):
        self.stack = stack
        device = next(stack.model.parameters()).device
        self.batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]

    def predict(self, most_rows: int | None = None) -> tuple[float, torch.Tensor]:
        """Mean loss in evaluation mode, and the logits, of shape `(rows, classes)`, on the first rows."""
        losses: list[float] = []
        logits: list[torch.Tensor] = []
        with evaluation_mode(self.stack.model):
            for batch in self.batches:
                if sum(len(part) for part in logits) >= (most_rows or float("inf")):
                    break
                output = self.stack.model(**batch)
                losses.append(output.loss.item() * len(batch["labels"]))
                logits.append(output.logits.float().cpu())
        found = torch.cat(logits)
        return sum(losses) / len(found), found

    def outputs(self) -> tuple[float, list[tuple[torch.Tensor, torch.Tensor]]]:
        """
        The loss, and per unit what it puts out: one vector a row, of shape `(rows, features)`, and single tokens, of
        shape `(2 * rows, features)`.
        """
        found: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self.stack.units]
        batches = iter(self.batches)
        mask: torch.Tensor | None = None

        def stem(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal mask
            mask = next(batches).get("attention_mask")
            keep(0, args[0] if args else kwargs["hidden_states"])

        def block(unit: int) -> Callable:
            return lambda module, args, output: keep(unit, output[0] if isinstance(output, tuple) else output)

        def keep(unit: int, hidden: torch.Tensor) -> None:
            found[unit].append((pool(hidden, mask).float().cpu(), spread_tokens(hidden, mask).float().cpu()))

        hooks = [self.stack.blocks[0].register_forward_pre_hook(stem, with_kwargs=True)]
        hooks += [module.register_forward_hook(block(i)) for i, module in enumerate(self.stack.blocks, start=1)]
        try:
            loss, _ = self.predict()
        finally:
            for hook in hooks:
                hook.remove()
        return loss, [(torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])) for parts in found]


class RecordingCallback(TrainerCallback):
    """
    Records a run of any [`~transformers.Trainer`], without changing it by one bit.

    Args:
        probe (`list[dict[str, torch.Tensor]]`): the probe rows, in batches, as inputs of the model with their labels.
        weights_per_unit (`int`): weights recorded per unit.
        snapshots (`int`): snapshots over the run; a run of fewer steps records every step.
        probes (`int`): how often over the run the units' outputs and the probe's loss are taken.
        rewinds (`int`): at how many moments of the run all weights are kept for the rewind test.
        rewind_rows (`int`): most rows of the probe that the rewind test uses.
        progress (`Callable[[float], None]`, *optional*): told the fraction of the run done since its last call.
    """

    def __init__(
        self,
        probe: list[dict[str, torch.Tensor]],
        weights_per_unit: int = 1024,
        snapshots: int = 200,
        probes: int = 20,
        rewinds: int = 8,
        rewind_rows: int = 64,
        progress: Callable[[float], None] | None = None,
    ):
        self.probe, self.weights_per_unit, self.snapshots, self.probes = probe, weights_per_unit, snapshots, probes
        self.rewinds, self.rewind_rows, self.progress = rewinds, rewind_rows, progress
        self.steps: list[int] = []
        self.learning_rates: list[float] = []
        self.weights: list[torch.Tensor] = []
        self.probe_steps: list[int] = []
        self.probe_losses: list[float] = []
        self.rewind_steps: list[int] = []
        self.gradient_norms: list[list[float]] = []
        self._outputs: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self._front_changes: list[torch.Tensor] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Record the starting point."""
        stack = find_blocks(model)
        self.names = stack.names
        self._sampler = WeightSampler(stack.units, self.weights_per_unit, seed=args.seed)
        self._probe = Probe(stack, self.probe)
        self._front = ProbeHistory(FrontProbe(stack))
        self._rewinder = Rewinder(stack)
        self._gradients = [torch.zeros(self.weights_per_unit) for _ in stack.units]
        self._start = self._probe.predict(self.rewind_rows)
        self._record(state, kwargs["lr_scheduler"])

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Add up the gradients at the sampled positions."""
        for unit, total in enumerate(self._gradients):
            total += self._sampler.read_gradient(unit).cpu()
        if not self._front.steps:
            self._look(0)

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
            loss, outputs = self._probe.outputs()
            self.probe_losses.append(loss)
            self._outputs.append(outputs)
            self.gradient_norms.append([float(total.norm()) for total in self._gradients])
            for total in self._gradients:
                total.zero_()
            if self._front.steps:
                self._look(step)
        if step < last and step in {round(i * last / self.rewinds) for i in range(self.rewinds)}:
            self.rewind_steps.append(step)
            self._rewinder.keep()

    def _look(self, step: int) -> None:
        self._front.record(step)
        changes = self._front.changes
        self._front_changes.append(
            torch.zeros(len(self.names), len(compared_snapshots(0)), 2) if changes is None else changes
        )

    def on_train_end(self, args, state, control, **kwargs):
        """Hold the rewind test."""
        self._front.probe.close()
        self._rewound = self._rewinder.outcomes(lambda: self._probe.predict(self.rewind_rows))
        self._end = self._probe.predict(self.rewind_rows)

    def result(self) -> dict[str, torch.Tensor]:
        """
        What was recorded.

        Returns:
            `dict[str, torch.Tensor]`: `steps` `(snapshots,)`, `learning_rates` `(snapshots,)`, `weights`
            `(snapshots, units, weights_per_unit)`; `probe_steps` `(probes,)`, `probe_losses` `(probes,)`, `cka` and `token_cka`
            `(probes, units)`, the linear CKA of each unit's output at a probe to its output at the end of the run, of
            pooled rows and of single tokens; `self_cka` `(probes, units)`, that of the pooled rows to `SELF_CKA_LAG`
            probes before; `front_changes` `(probes, units, 8)`, what [`ProbeSnapshot.changes`] says of 1, 2 and 4 probes before
            and of the start; `gradient_norms` `(probes, units)`, the norm of the sampled gradients added up since the last
            probe; `rewind_steps` `(moments,)`, `rewind_losses` `(moments, units)`, the loss with the front up to each
            unit put back to each moment, `rewind_range` `(2,)`, the loss on the same rows at the start and the end of
            the run, and `rewind_shifts` `(moments, units)`, how far putting the front back probe_features the logits, as a
            fraction of how far the whole run moved them, squared.
        """
        outputs, end = self._outputs, self._outputs[-1]
        (start_loss, start_logits), (end_loss, end_logits) = self._start, self._end
        whole = max(shift(start_logits, end_logits), 1e-12)
        before = [outputs[max(0, i - SELF_CKA_LAG)] for i in range(len(outputs))]

        def cka(first: list, second: list, view: int) -> list[float]:
            return [linear_cka(a[view], b[view]) for a, b in zip(first, second, strict=True)]

        return {
            "steps": torch.tensor(self.steps),
            "learning_rates": torch.tensor(self.learning_rates),
            "weights": torch.stack(self.weights),
            "probe_steps": torch.tensor(self.probe_steps),
            "probe_losses": torch.tensor(self.probe_losses),
            "cka": torch.tensor([cka(now, end, 0) for now in outputs]),
            "token_cka": torch.tensor([cka(now, end, 1) for now in outputs]),
            "self_cka": torch.tensor([cka(now, then, 0) for now, then in zip(outputs, before, strict=True)]),
            "gradient_norms": torch.tensor(self.gradient_norms),
            "front_changes": torch.stack(self._front_changes).flatten(2),
            "rewind_steps": torch.tensor(self.rewind_steps),
            "rewind_losses": torch.tensor([[loss for loss, _ in row] for row in self._rewound]),
            "rewind_range": torch.tensor([start_loss, end_loss]),
            "rewind_shifts": torch.tensor([[shift(z, end_logits) / whole for _, z in row] for row in self._rewound]),
        }
