"""The front probe: a few training rows, run through the model again and again to see how much its outputs still change."""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from math import gcd
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import nn

from ..model.forward_patch import LeftBehind
from ..model.generators import device_of
from ..model.nested import (
    batch_size,
    block_input,
    first_rows,
    float_tensors,
    from_state,
    main_input_elements,
    named_tensors,
    to_state,
)
from ..model.tracing import evaluation_mode
from ..model.units import BlockStack

ROWS = 16
MAX_FEATURES = 2**12  # kept of each row of a unit's output
TOKENS = 2  # kept of each row of the model's output, where it has tokens
# What only the loss reads. TRL's `fused_lm_head` has the head return the log-probabilities of the labels, in place of logits.
NOT_INPUTS = ("labels", "num_items_in_batch", "fused_lm_head")


def spread_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Two tokens of each row, evenly spread over those that are not padding. Always the same ones.

    Args:
        hidden (`torch.Tensor`): of shape `(rows, tokens, features)` or `(rows, features, height, width)`.
        attention_mask (`torch.Tensor`, *optional*): of shape `(rows, tokens)`, 0 at padding.

    Returns:
        `torch.Tensor` of shape `(2 * rows, features)`.
    """
    hidden = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
    rows, tokens = hidden.shape[:2]
    if attention_mask is None:
        attention_mask = torch.ones(rows, tokens, device=hidden.device)
    present = attention_mask.bool().long()
    wanted = (present.sum(1, keepdim=True) * torch.arange(1, 2 * TOKENS, 2, device=hidden.device)) // (2 * TOKENS)
    # The position of a row's k-th token, wherever its padding is.
    positions = torch.searchsorted(present.cumsum(1), wanted + 1).clamp(max=tokens - 1)
    return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])).flatten(0, 1)


def shift(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Mean squared distance of two logits of shape `(rows, classes)`, without the part that is common to all classes."""
    change = logits - others
    return float((change - change.mean(1, keepdim=True) if change.shape[1] > 1 else change).pow(2).mean())


def thinned(hidden: torch.Tensor) -> torch.Tensor:
    """At most 4,096 values of each row, evenly spread and always the same ones, as a tensor `(rows, values)`."""
    values = hidden.detach().flatten(1)
    stride = -(-values.shape[1] // MAX_FEATURES)
    while gcd(stride, hidden.shape[-1]) > 1:  # else the same few features would be taken of every token
        stride += 1
    return values[:, ::stride].clone()


class FirstBatch:
    """
    Keeps the first rows of the first batch that a model is trained on.

    Args:
        model (`torch.nn.Module`):
            The model; a pre-hook on it takes the rows at its first call in training mode with gradients, which generation and
            the first passes of GradCache are not.
        rows (`int` or `Callable[[int], int]`):
            The largest number of rows, or a function that gives it for the number of rows in the batch. None are kept at 0.

    Attributes:
        inputs (`tuple[tuple, dict]`, *optional*): positional and keyword arguments; `None` until the batch has come.
    """

    def __init__(self, model: nn.Module, rows: int | Callable[[int], int], without: Collection[str] = NOT_INPUTS):
        self._model, self._rows, self._without = model, rows, without
        self.inputs: tuple[tuple, dict[str, Any]] | None = None
        self._everything: tuple[tuple, dict[str, Any]] | None = None
        self._hook = model.register_forward_pre_hook(LeftBehind(self._take), with_kwargs=True)

    @property
    def ready(self) -> bool:
        """Whether the batch has come."""
        return self.inputs is not None

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return device_of(self._model)

    @property
    def elements(self) -> int:
        """Number of elements of the model's main input, such as token ids."""
        return main_input_elements(self._model, self.inputs)

    def take_everything(self) -> bool:
        """Take the arguments that were left out, too. Returns `False` where there are none."""
        before, self.inputs = self.inputs, self._everything or self.inputs
        self._everything = None
        return before is not None and self.inputs is not None and len(self.inputs[1]) > len(before[1])

    def close(self) -> None:
        """Remove the hook from the model."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """
        The rows, as `{"inputs": ...}` in the form of [`~smartfrz_hf.model.nested.to_state`]; `None` before they have come.

        Raises:
            TypeError: the model takes something other than tensors and plain values.
        """
        return {"inputs": None if self.inputs is None else to_state(self.inputs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the rows of another run. They go to the device of the model."""
        if state["inputs"] is not None:
            self.inputs = send_to_device(from_state(state["inputs"]), self.device)
            self.close()

    def _take(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            rows = self._rows if isinstance(self._rows, int) else self._rows(batch_size((args, kwargs)))
            if rows:
                needed = {
                    p.name for p in signature(module.forward).parameters.values() if p.default is Parameter.empty
                }
                args, kwargs = first_rows((args, kwargs), rows)
                inputs = {key: value for key, value in kwargs.items() if key not in self._without or key in needed}
                self.inputs, self._everything = (args, inputs), (args, kwargs)
            self.close()


@dataclass(frozen=True)
class ProbeSnapshot:
    """
    The outputs of the units and of the model for the rows of the probe, at one step.

    Attributes:
        hidden (`list[torch.Tensor]`): one tensor per unit, `(rows, values)`: its output, thinned.
        output (`torch.Tensor` of shape `(rows, classes)`): output of the model, such as its logits.
    """

    hidden: list[torch.Tensor]
    output: torch.Tensor

    def changes(self, earlier: "ProbeSnapshot") -> torch.Tensor:
        """
        How much the outputs have changed since an earlier snapshot.

        Returns:
            `torch.Tensor` of shape `(units, 2)`: mean squared distance of the unit's output, and of the model's output,
            which is the same for all units.
        """
        pairs = zip(self.hidden, earlier.hidden, strict=True)
        hidden = torch.stack([(a - b).float().pow(2).mean() for a, b in pairs]).cpu()
        return torch.stack([hidden, torch.full_like(hidden, shift(self.output, earlier.output))], dim=1)


class FrontProbe:
    """
    Runs a few rows of the first training batch through the model, in evaluation mode, as often as it is asked.

    Changes no weight and draws no random number. For a block that runs several times in a pass, the last output counts.

    Args:
        stack ([`BlockStack`]): the units.
        rows (`int` or `Callable[[int], int]`, *optional*, defaults to 16): as for [`FirstBatch`].

    Attributes:
        batch ([`FirstBatch`]): the rows.
        on_pass (`Callable[[int], None]`): called after each pass with the number of elements of the model's main input.
    """

    def __init__(self, stack: BlockStack, rows: int | Callable[[int], int] = ROWS):
        self._stack = stack
        self.batch = FirstBatch(stack.model, rows)
        self.on_pass: Callable[[int], None] = lambda elements: None

    @property
    def ready(self) -> bool:
        """Whether the first training batch has come."""
        return self.batch.ready

    def close(self) -> None:
        """Remove the hook from the model."""
        self.batch.close()

    def state_dict(self) -> dict[str, Any]:
        """State of [`FirstBatch`]: `{"inputs": ...}`."""
        return self.batch.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the rows of a state."""
        self.batch.load_state_dict(state)

    def run(self) -> ProbeSnapshot:
        """Run the rows through the model as it is now."""
        hidden: list[torch.Tensor] = [torch.empty(0)] * len(self._stack)

        def stem(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden[0] = thinned(block_input(args, kwargs))

        def block(unit: int, module: nn.Module, args: tuple, output: Any) -> None:
            hidden[unit] = thinned(float_tensors(output)[0])

        blocks = self._stack.blocks
        with ExitStack() as hooks:
            hooks.enter_context(blocks[0].register_forward_pre_hook(stem, with_kwargs=True))
            for unit, module in enumerate(blocks, start=1):
                hooks.enter_context(module.register_forward_hook(partial(block, unit)))
            return ProbeSnapshot(hidden, self._output())

    def _output(self) -> torch.Tensor:
        """The model's logits, or its last floating-point output; of outputs with tokens, some tokens."""
        assert self.batch.inputs is not None, "the first training batch has not come yet"
        try:
            output = self._run_model()
        except Exception:  # of a model that computes its loss whether it is given labels or not
            if not self.batch.take_everything():
                raise
            output = self._run_model()
        self.on_pass(self.batch.elements)
        logits = output.get("logits") if isinstance(output, Mapping) else None
        if logits is None:
            logits = float_tensors(output)[-1]
        if logits.dim() > 2:
            masks = (mask for name, mask in named_tensors(self.batch.inputs) if name == "attention_mask")
            logits = spread_tokens(logits, next((mask for mask in masks if mask.shape == logits.shape[:2]), None))
        return logits.float().reshape(len(logits), -1)

    def _run_model(self) -> Any:
        # New containers, since a model may write into the dictionaries that it is given.
        args, kwargs = recursively_apply(lambda tensor: tensor, self.batch.inputs)
        # The hooks must run, so a compiled model runs uncompiled.
        with evaluation_mode(self._stack.model), torch.compiler.set_stance("force_eager"):
            return self._stack.model(*args, **kwargs)
