"""The front probe: what a change of the front does to what the model says, seen on a few rows while it trains."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .batches import first_rows, float_tensors, map_tensors, named_tensors, pack, unpack
from .blocks import BlockStack, evaluation_mode
from .stand_in import StandIn

ROWS = 16
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

    This is the *rewind test*, held during training: what left the front at the earlier look goes into the rest of the
    model as it is now. No weight is touched, and no random number drawn.

    Args:
        stack ([`BlockStack`]): the units. Each block has to run once in a pass.
        rows (`int`, *optional*, defaults to 16): most rows.

    Attributes:
        on_pass (`Callable[[int, int], None]`): told of each pass: the first unit that runs, and the elements of its main
            input.
    """

    def __init__(self, stack: BlockStack, rows: int = ROWS):
        self._stack, self._rows = stack, rows
        self._rest: dict[int, list] = {}  # what blocks put out beside hidden states, where they do
        self._inputs: tuple[tuple, dict[str, Any]] | None = None
        self.on_pass: Callable[[int, int], None] = lambda first, elements: None
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
        The rows, and what else is needed, as plain JSON values, with the tensors set apart.

        Raises:
            TypeError: the model takes or puts out something else than tensors and plain values.
        """
        return pack((self._inputs, list(self._rest.items())), tensors)

    def restore(self, state: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` gave."""
        self._inputs, rest = unpack(state, tensors)
        self._rest = dict(rest)
        self._hook.remove()

    def _take_inputs(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        kwargs = {key: value for key, value in kwargs.items() if key not in ("labels", "num_items_in_batch")}
        self._inputs = first_rows((args, kwargs), self._rows)
        self._hook.remove()

    def look(self, frozen: Look | None = None, depth: int = 0) -> Look:
        """
        What the model makes of the rows now.

        Args:
            frozen ([`Look`], *optional*): one since which the front has not changed. It does not run again then.
            depth (`int`, *optional*, defaults to 0): units of that front.
        """
        hidden: list[torch.Tensor] = [torch.empty(0)] * len(self._stack)
        if frozen is None:
            depth = 0
        else:
            hidden[:depth] = frozen.hidden[:depth]

        def stem(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden[0] = args[0] if args else kwargs["hidden_states"]

        def block(unit: int, module: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(output, tuple):
                output, *self._rest[unit] = output
            hidden[unit] = output

        blocks = [*enumerate(self._stack.blocks, start=1)]
        with ExitStack() as stack:
            if depth:
                self._put(stack, hidden[:depth])
            else:
                stack.enter_context(blocks[0][1].register_forward_pre_hook(stem, with_kwargs=True))
            for unit, module in blocks[max(0, depth - 1) :]:
                stack.enter_context(module.register_forward_hook(partial(block, unit)))
            output = self._run(depth)
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
        with ExitStack() as stack:
            self._put(stack, [*now.hidden[:unit], then.hidden[unit]])
            return self._run(unit + 1)

    def _put(self, stack: ExitStack, hidden: list[torch.Tensor]) -> None:
        """Have units of the front give what they are told, until the stack is closed."""

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return ((hidden[0], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden[0]})

        blocks = self._stack.blocks
        stack.enter_context(blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
        for unit, left in enumerate(hidden[1:], start=1):
            output = (left, *self._rest[unit]) if unit in self._rest else left
            stack.callback(StandIn(blocks[unit - 1], partial(_give, output)).remove)

    def changes(self, now: Look, then: Look, first: int = 0) -> torch.Tensor:
        """
        How far the model has come since an earlier look, unit by unit.

        Args:
            now ([`Look`]): of the model as it is.
            then ([`Look`]): the earlier one.
            first (`int`, *optional*, defaults to 0): units before this one are left out.

        Returns:
            `torch.Tensor` of shape `(units - first, 3)`: mean squared distances; of what the model says from what it would say with
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
                for unit in range(first, len(self._stack))
            ]
        )

    def _run(self, first: int) -> torch.Tensor:
        """
        What the model says: its logits, or the last thing it puts out, at some tokens where it has any. Unit `first` is the
        first one that runs.
        """
        assert self._inputs is not None, "the first training batch has not come yet"
        args, kwargs = map_tensors(self._inputs, lambda tensor: tensor)  # dictionaries that the model may write into
        # What is looked at is not what was compiled.
        with evaluation_mode(self._stack.model), torch.compiler.set_stance("force_eager"):
            output = self._stack.model(*args, **kwargs)
        self.on_pass(first, self._elements)
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


def _give(output: Any, *args, **kwargs) -> Any:
    return output
