"""Recording a full training run: weight snapshots, learning rates, and the similarity of outputs to the final ones."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..model.generators import device_of
from ..model.nested import block_input
from ..model.tracing import evaluation_mode
from ..model.units import BlockStack, find_blocks
from ..signals.probe import FrontProbe, shift, spread_tokens
from ..signals.probe_history import ProbeHistory, compared_snapshots
from ..signals.weights import WeightSampler
from .rewind import Rewinder

PROBE_ROWS = 128
SELF_CKA_LAG = 4
EPSILON = 1e-12


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    r"""
    Linear CKA (centered kernel alignment) of two representations (Kornblith et al., 2019, arXiv 1905.00414, section
    3): \\(\|Y^\top X\|_F^2 / (\|X^\top X\|_F\,\|Y^\top Y\|_F)\\) of the column-centered features.

    Args:
        x (`torch.Tensor` of shape `(rows, features)`): one representation.
        y (`torch.Tensor` of shape `(rows, other_features)`): another representation of the same rows.

    Returns:
        `float`: from 0 to 1; 1 if both are constant over the rows, and 0 if only one is.

    Example:

    ```python
    >>> import torch
    >>> from smartfrz_hf.predictor_training.recording import linear_cka

    >>> x = torch.randn(10, 3)
    >>> round(linear_cka(x, 2 * x + 1), 6)
    1.0
    ```
    """
    x, y = x.double(), y.double()
    x, y = x - x.mean(0), y - y.mean(0)
    # Gram matrices over the rows: the cost does not depend on the number of features.
    k, l = x @ x.T, y @ y.T  # noqa: E741 - the paper's symbols
    scale = k.norm() * l.norm()
    if scale == 0:
        return float(k.norm() == l.norm())
    return float((k * l).sum() / scale)


def pool(hidden: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Mean over the tokens that are not padding, or over the positions of a feature map.

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


class HeldOutBatches:
    """
    Held-out rows that the model is run on several times during training, in evaluation mode.

    Args:
        stack ([`BlockStack`]): the units.
        batches (`list[dict[str, torch.Tensor]]`): inputs of the model with their labels.
    """

    def __init__(self, stack: BlockStack, batches: list[dict[str, torch.Tensor]]):
        self.stack = stack
        device = device_of(stack.model)
        self.batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]

    def predict(self, max_rows: int | None = None) -> tuple[float, torch.Tensor]:
        """Mean loss and logits, `(rows, classes)`, on the batches that hold the first `max_rows` rows."""
        losses: list[float] = []
        logits: list[torch.Tensor] = []
        with evaluation_mode(self.stack.model):
            for batch in self.batches:
                if sum(len(part) for part in logits) >= (max_rows or float("inf")):
                    break
                output = self.stack.model(**batch)
                losses.append(output.loss.item() * len(batch["labels"]))
                logits.append(output.logits.float().cpu())
        all_logits = torch.cat(logits)
        return sum(losses) / len(all_logits), all_logits

    def outputs(self) -> tuple[float, list[tuple[torch.Tensor, torch.Tensor]]]:
        """
        Mean loss, and the output of each unit in two views: pooled, `(rows, features)`, and single tokens,
        `(2 * rows, features)`.
        """
        views: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self.stack.units]
        batches = iter(self.batches)
        mask: torch.Tensor | None = None

        def stem_hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal mask
            mask = next(batches).get("attention_mask")
            keep(0, block_input(args, kwargs))

        def block_hook(unit: int) -> Callable:
            return lambda module, args, output: keep(unit, output[0] if isinstance(output, tuple) else output)

        def keep(unit: int, hidden: torch.Tensor) -> None:
            views[unit].append((pool(hidden, mask).float().cpu(), spread_tokens(hidden, mask).float().cpu()))

        with ExitStack() as hooks:
            hooks.enter_context(self.stack.blocks[0].register_forward_pre_hook(stem_hook, with_kwargs=True))
            for unit, block in enumerate(self.stack.blocks, start=1):
                hooks.enter_context(block.register_forward_hook(block_hook(unit)))
            loss, _ = self.predict()
        return loss, [(torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])) for parts in views]


class RecordingCallback(TrainerCallback):
    """
    Records a run of any [`~transformers.Trainer`], without changing it by one bit.

    Args:
        batches (`list[dict[str, torch.Tensor]]`): held-out rows, as inputs of the model with their labels.
        weights_per_unit (`int`, *optional*, defaults to `1024`): number of weights recorded per unit.
        snapshots (`int`, *optional*, defaults to `200`):
            Number of weight snapshots over the run; a shorter run records every step.
        probes (`int`, *optional*, defaults to `20`):
            How often the loss and the outputs on the held-out rows are recorded.
        rewinds (`int`, *optional*, defaults to `8`):
            Number of moments at which all weights are kept for the rewind test.
        rewind_rows (`int`, *optional*, defaults to `64`): number of held-out rows that the rewind test uses.
    """

    def __init__(
        self,
        batches: list[dict[str, torch.Tensor]],
        weights_per_unit: int = 1024,
        snapshots: int = 200,
        probes: int = 20,
        rewinds: int = 8,
        rewind_rows: int = 64,
    ):
        self.batches, self.weights_per_unit, self.snapshots, self.probes = batches, weights_per_unit, snapshots, probes
        self.rewinds, self.rewind_rows = rewinds, rewind_rows
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
        """Record the start of the run."""
        stack = find_blocks(model)
        self.names = stack.names
        self._sampler = WeightSampler(stack.units, self.weights_per_unit, seed=args.seed)
        self._held_out = HeldOutBatches(stack, self.batches)
        self._front = ProbeHistory(FrontProbe(stack))
        self._rewinder = Rewinder(stack)
        self._units = range(len(stack))
        self._gradients = torch.zeros(len(stack), self.weights_per_unit)
        self._start = self._held_out.predict(self.rewind_rows)
        self._record(state, kwargs["lr_scheduler"])

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Sum the gradients at the sampled positions."""
        self._gradients += self._sampler.read_gradients(self._units).cpu()
        if not self._front.steps:
            self._record_front(0)

    def on_step_end(self, args, state, control, **kwargs):
        """Record what is due at this step."""
        self._record(state, kwargs["lr_scheduler"])

    def _record(self, state, lr_scheduler) -> None:
        step, last = state.global_step, state.max_steps
        if step % max(1, last // self.snapshots) == 0 or step == last:
            self.steps.append(step)
            self.learning_rates.append(lr_scheduler.get_last_lr()[0])
            self.weights.append(self._sampler.read(self._units).cpu())
        if step in {round(i * last / self.probes) for i in range(self.probes + 1)}:
            self.probe_steps.append(step)
            loss, outputs = self._held_out.outputs()
            self.probe_losses.append(loss)
            self._outputs.append(outputs)
            self.gradient_norms.append(self._gradients.norm(dim=1).tolist())
            self._gradients.zero_()
            if self._front.steps:
                self._record_front(step)
        if step < last and step in {round(i * last / self.rewinds) for i in range(self.rewinds)}:
            self.rewind_steps.append(step)
            self._rewinder.keep()

    def _record_front(self, step: int) -> None:
        self._front.record(step)
        unknown = torch.zeros(len(self.names), len(compared_snapshots(0)), 2)
        self._front_changes.append(unknown if self._front.changes is None else self._front.changes)

    def on_train_end(self, args, state, control, **kwargs):
        """Carry out the rewind test."""
        self._front.probe.close()
        self._rewound = self._rewinder.evaluate(lambda: self._held_out.predict(self.rewind_rows))
        self._end = self._held_out.predict(self.rewind_rows)

    def result(self) -> dict[str, torch.Tensor]:
        """
        The recorded run.

        Returns:
            `dict[str, torch.Tensor]`:

            - `steps` and `learning_rates`, `(snapshots,)`, and `weights`, `(snapshots, units, weights_per_unit)`;
            - `probe_steps` and `probe_losses`, `(probes,)`;
            - `cka` and `token_cka`, `(probes, units)`: linear CKA of each unit's output to its output at the end of
              the run, of pooled rows and of single tokens;
            - `self_cka`, `(probes, units)`: linear CKA of the pooled rows to those `SELF_CKA_LAG` probes before;
            - `front_changes`, `(probes, units, 8)`: [`ProbeSnapshot.changes`] since 1, 2 and 4 probes before and
              since the start of the run;
            - `gradient_norms`, `(probes, units)`: norm of the sampled gradients, summed since the last probe;
            - `rewind_steps`, `(moments,)`, and `rewind_losses`, `(moments, units)`: loss of the finished model with
              the units up to this one reset to each moment;
            - `rewind_shifts`, `(moments, units)`: mean squared change of the logits by this reset, as a fraction of
              that by the whole run;
            - `rewind_range`, `(2,)`: loss on the same rows at the start and the end of the run.
        """
        outputs, end = self._outputs, self._outputs[-1]
        (start_loss, start_logits), (end_loss, end_logits) = self._start, self._end
        whole_shift = max(shift(start_logits, end_logits), EPSILON)
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
            "rewind_shifts": torch.tensor(
                [[shift(logits, end_logits) / whole_shift for _, logits in row] for row in self._rewound]
            ),
        }
