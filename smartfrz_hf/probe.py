"""The front probe: what a change of the front does to what the model says, seen on a few rows while it trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .blocks import BlockStack, evaluation_mode
from .stand_in import StandIn

ROWS = 16
TOKENS = 2  # a row, of outputs that have some


def spread_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, count: int = TOKENS) -> torch.Tensor:
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


@dataclass(frozen=True)
class Look:
    """
    What the model makes of the probe at one moment.

    Attributes:
        hidden (`list[torch.Tensor]`): what leaves each unit.
        output (`torch.Tensor` of shape `(rows, classes)`): what it says, such as its logits.
    """

    hidden: list[torch.Tensor]
    output: torch.Tensor


class FrontProbe:
    """
    Runs a few rows of the first training batch through the model again and again, and says how far what it says would
    move if its front went back to what it was at an earlier look.

    This is the *rewind test*, held during training with what left the front then, in the place of its weights.

    Args:
        stack ([`BlockStack`]): the units.
        rows (`int`, *optional*, defaults to 16): most rows.
    """

    def __init__(self, stack: BlockStack, rows: int = ROWS):
        self._stack, self._rows = stack, rows
        self._blocks = stack.blocks
        self._rest: dict[int, list] = {}  # what blocks put out beside hidden states, where they do
        self._inputs: tuple[tuple, dict[str, Any]] | None = None
        self._hook = stack.model.register_forward_pre_hook(self._take_inputs, with_kwargs=True)

    @property
    def ready(self) -> bool:
        """Whether it has got its rows."""
        return self._inputs is not None

    @property
    def able(self) -> bool:
        """Whether each block is known to run once in a pass, so that its output can be replaced."""
        return all(unit.runs_once for unit in self._stack.units[1:])

    def close(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()

    def _take_inputs(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        rows = _rows((args, kwargs))
        if rows:
            kwargs = {key: value for key, value in kwargs.items() if key not in ("labels", "num_items_in_batch")}
            self._inputs = _first_rows((args, kwargs), rows, self._rows)
            self._hook.remove()

    def look(self) -> Look:
        """What the model makes of the rows now."""
        hidden: list[torch.Tensor] = [torch.empty(0)] * len(self._stack)

        def stem(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden[0] = args[0] if args else kwargs["hidden_states"]

        def block(unit: int, module: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(output, tuple):
                output, *self._rest[unit] = output
            hidden[unit] = output

        hooks = [self._blocks[0].register_forward_pre_hook(stem, with_kwargs=True)]
        hooks += [module.register_forward_hook(partial(block, i)) for i, module in enumerate(self._blocks, start=1)]
        try:
            output = self._run()
        finally:
            for hook in hooks:
                hook.remove()
        return Look(hidden, output)

    def rewound(self, now: Look, then: Look, unit: int) -> torch.Tensor:
        """
        What the model says with the front up to a unit as it was.

        Args:
            now ([`Look`]): of the model as it is.
            then ([`Look`]): the earlier one.
            unit (`int`): the last unit of the front.

        Returns:
            `torch.Tensor` of shape `(rows, classes)`.
        """
        if unit == 0:

            def swap(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
                if args:
                    return (then.hidden[0], *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": then.hidden[0]}

            hook = self._blocks[0].register_forward_pre_hook(swap, with_kwargs=True)
            try:
                return self._run()
            finally:
                hook.remove()
        stand_ins = []
        for index, module in enumerate(self._blocks[:unit], start=1):
            left: Any = then.hidden[index] if index == unit else now.hidden[index]
            if index in self._rest:
                left = (left, *self._rest[index])
            stand_ins.append(StandIn(module, partial(_give, left)))
        try:
            return self._run()
        finally:
            for stand_in in reversed(stand_ins):
                stand_in.remove()

    def changes(self, now: Look, then: Look) -> torch.Tensor:
        """
        How far the model has come since an earlier look, unit by unit.

        Args:
            now ([`Look`]): of the model as it is.
            then ([`Look`]): the earlier one.

        Returns:
            `torch.Tensor` of shape `(units, 3)`: mean squared distances; of what the model says from what it would say with
            the front up to the unit as it was, of what leaves the unit from what left it, and of what the model says
            from what it said.
        """
        whole = shift(now.output, then.output)
        return torch.tensor(
            [
                [
                    shift(now.output, self.rewound(now, then, unit)),
                    float((now.hidden[unit] - then.hidden[unit]).float().pow(2).mean()),
                    whole,
                ]
                for unit in range(len(self._stack))
            ]
        )

    def _run(self) -> torch.Tensor:
        """What the model says: its logits, or the last thing it puts out, at some tokens where it has any."""
        assert self._inputs is not None, "the first training batch has not come yet"
        args, kwargs = _copy(self._inputs)
        with evaluation_mode(self._stack.model):
            output = self._stack.model(*args, **kwargs)
        said = output.get("logits") if isinstance(output, Mapping) else None
        if said is None:
            said = _tensors(output)[-1]
        if said.dim() > 2:
            mask = next((v for k, v in _named(self._inputs) if k == "attention_mask" and v.shape == said.shape[:2]), None)
            said = spread_tokens(said, mask)
        return said.float().reshape(len(said), -1)


def _give(output: Any, *args, **kwargs) -> Any:
    return output


def _map(value: Any, change: Any) -> Any:
    """A copy of nested lists, tuples and dictionaries, with each tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(part, change) for part in value)
    return value


def _named(value: Any, name: str = "") -> list[tuple[str, torch.Tensor]]:
    """All tensors of nested lists, tuples and dictionaries, each with the innermost key."""
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    if isinstance(value, Mapping):
        return [found for key, part in value.items() for found in _named(part, str(key))]
    if isinstance(value, list | tuple):
        return [found for part in value for found in _named(part, name)]
    return []


def _tensors(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors that have rows."""
    return [tensor for _, tensor in _named(value) if tensor.is_floating_point() and tensor.dim()]


def _rows(inputs: Any) -> int:
    """Rows of a batch: what most of its tensors begin with."""
    sizes = [len(tensor) for _, tensor in _named(inputs) if tensor.dim()]
    return max(sizes, key=sizes.count, default=0)


def _first_rows(inputs: Any, rows: int, most: int) -> Any:
    """The first rows of a batch, in memory of their own."""
    return _map(inputs, lambda t: t[:most].clone() if t.dim() and len(t) == rows else t.clone())


def _copy(inputs: Any) -> Any:
    """A batch that the model may write into."""
    return _map(inputs, lambda tensor: tensor)
