"""The front probe: how far what leaves each unit, and what the model says, still probe_features, seen on a few rows in training."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any

import torch
from torch import nn

from ..model.nested import first_rows, float_tensors, map_tensors, named_tensors, pack, unpack
from ..model.units import BlockStack, evaluation_mode

ROWS = 16
MAX_NUMBERS = 2**12  # kept of what leaves a unit, of each row
TOKENS = 2  # a row, of outputs that have some


def spread_tokens(
    hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, count: int = TOKENS
) -> torch.Tensor:
    """
    Some single tokens of each row, evenly spread over those that are not padding: always the same ones.

    Args:
        hidden (`torch.Tensor`): of shape `(rows, tokens, features)` or `(rows, features, height, width)`.
        attention_mask (`torch.Tensor`, *optional*): of shape `(rows, tokens)`, 0 at padding.
        count (`int`): tokens a row.

    Returns:
        `torch.Tensor` of shape `(rows * count, features)`.
    """
    hidden = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
    rows, tokens = hidden.shape[:2]
    if attention_mask is None:
        attention_mask = torch.ones(rows, tokens, device=hidden.device)
    present = attention_mask.bool().long()
    wanted = (present.sum(1, keepdim=True) * torch.arange(1, 2 * count, 2, device=hidden.device)) // (2 * count)
    # The place of a row's k-th token, wherever its padding is.
    places = torch.searchsorted(present.cumsum(1), wanted + 1).clamp(max=tokens - 1)
    return hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])).flatten(0, 1)


def shift(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Mean squared distance of logits, of shape `(rows, classes)`; what is common to all classes says nothing."""
    change = logits - others
    return float((change - change.mean(1, keepdim=True) if change.shape[1] > 1 else change).pow(2).mean())


def thinned(hidden: torch.Tensor) -> torch.Tensor:
    """Of each row at most 4,096 numbers, evenly spread over all features and always the same ones: `(rows, numbers)`."""
    numbers = hidden.detach().flatten(1)
    stride = -(-numbers.shape[1] // MAX_NUMBERS)
    while gcd(stride, hidden.shape[-1]) > 1:  # else it would see some features only, at every place
        stride += 1
    return numbers[:, ::stride].clone()


@dataclass(frozen=True)
class ProbeSnapshot:
    """
    What the model makes of the probe at one moment.

    Attributes:
        hidden (`list[torch.Tensor]`): what leaves each unit, thinned, `(rows, numbers)`.
        output (`torch.Tensor` of shape `(rows, classes)`): what the model says, such as its logits.
    """

    hidden: list[torch.Tensor]
    output: torch.Tensor

    def changes(self, then: "ProbeSnapshot") -> torch.Tensor:
        """
        How far the model has come since an earlier look.

        Returns:
            `torch.Tensor` of shape `(units, 2)`: mean squared distances, of what leaves the unit from what left it, and
            of what the model says from what it said, which is the same for all units.
        """
        pairs = zip(self.hidden, then.hidden, strict=True)
        hidden = torch.stack([(a - b).float().pow(2).mean() for a, b in pairs]).cpu()
        return torch.stack([hidden, torch.full_like(hidden, shift(self.output, then.output))], dim=1)


class FrontProbe:
    """
    Runs a few rows of the first training batch through the model again and again, in evaluation mode.

    No weight is touched, and no random number drawn. Of a block that runs several times in a pass, the last time counts.

    Args:
        stack ([`BlockStack`]): the units.
        rows (`int`, *optional*, defaults to 16): most rows.

    Attributes:
        on_pass (`Callable[[int], None]`): told of each pass: the elements of its main input.
    """

    def __init__(self, stack: BlockStack, rows: int = ROWS):
        self._stack, self._rows = stack, rows
        self._inputs: tuple[tuple, dict[str, Any]] | None = None
        self.on_pass: Callable[[int], None] = lambda elements: None
        self._hook = stack.model.register_forward_pre_hook(self._take_inputs, with_kwargs=True)

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self._stack)

    @property
    def ready(self) -> bool:
        """Whether it has got its rows."""
        return self._inputs is not None

    @property
    def _elements(self) -> int:
        named = named_tensors(self._inputs)
        main_input = getattr(self._stack.model, "main_input_name", "input_ids")
        return next(
            (tensor.numel() for name, tensor in named if name == main_input), named[0][1].numel() if named else 1
        )

    def close(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()

    def state(self, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """
        The rows as plain JSON values, with the tensors set apart.

        Raises:
            TypeError: the model takes something else than tensors and plain values.
        """
        return pack(self._inputs, tensors)

    def restore(self, state: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` gave."""
        self._inputs = unpack(state, tensors)
        self._hook.remove()

    def _take_inputs(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        kwargs = {key: value for key, value in kwargs.items() if key not in ("labels", "num_items_in_batch")}
        self._inputs = first_rows((args, kwargs), self._rows)
        self._hook.remove()

    def look(self) -> ProbeSnapshot:
        """What the model makes of the rows now."""
        hidden: list[torch.Tensor] = [torch.empty(0)] * len(self._stack)

        def stem(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden[0] = thinned(args[0] if args else kwargs["hidden_states"])

        def block(unit: int, module: nn.Module, args: tuple, output: Any) -> None:
            hidden[unit] = thinned(output[0] if isinstance(output, tuple) else output)

        blocks = self._stack.blocks
        with ExitStack() as stack:
            stack.enter_context(blocks[0].register_forward_pre_hook(stem, with_kwargs=True))
            for unit, module in enumerate(blocks, start=1):
                stack.enter_context(module.register_forward_hook(partial(block, unit)))
            return ProbeSnapshot(hidden, self._run())

    def _run(self) -> torch.Tensor:
        """What the model says: its logits, or the last thing it puts out, at some tokens where it has any."""
        assert self._inputs is not None, "the first training batch has not come yet"
        args, kwargs = map_tensors(self._inputs, lambda tensor: tensor)  # dictionaries that the model may write into
        # What is looked at is not what was compiled.
        with evaluation_mode(self._stack.model), torch.compiler.set_stance("force_eager"):
            output = self._stack.model(*args, **kwargs)
        self.on_pass(self._elements)
        said = output.get("logits") if isinstance(output, Mapping) else None
        if said is None:
            said = float_tensors(output)[-1]
        if said.dim() > 2:
            mask = next(
                (v for k, v in named_tensors(self._inputs) if k == "attention_mask" and v.shape == said.shape[:2]),
                None,
            )
            said = spread_tokens(said, mask)
        return said.float().reshape(len(said), -1)
