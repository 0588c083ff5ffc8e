"""Whether a loss reads what the model returns at padded positions."""

from typing import Any

import torch

from ..model.nested import tensors_in
from .calls import Call, content


class PaddingWatch:
    """
    Finds out by the gradient whether anything behind the model reads padded positions.

    Rows can be kept without their padding, and found again at any padded length, if nothing reads what the model returns there.
    The loss may be computed anywhere, so its gradient tells: where it does not read, the gradient is zero. Without an answer, and
    where padding is read, rows are kept with their padding, and found again at the same length only.

    Attributes:
        unread (`bool`, *optional*): the answer so far; `None` while there is none. `False` is final.
    """

    def __init__(self) -> None:
        self.unread: bool | None = None
        self._seen: list[torch.Tensor] = []

    def watch(self, call: Call, output: Any) -> None:
        """
        Watch the backward pass of a training batch that has padding.

        Args:
            call ([`Call`]): the batch.
            output (`Any`): what the backbone has returned for it.
        """
        if self.unread is False or call.mask is None or not torch.is_grad_enabled():
            return
        outside = ~content(call.mask)

        def note(gradient: torch.Tensor) -> None:
            self._seen.append((gradient != 0).reshape(*outside.shape, -1).any(2).logical_and(outside).any())

        tensors = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
        by_position = [tensor for tensor in tensors if tensor.shape[:2] == outside.shape]
        watched = [tensor for tensor in by_position if tensor.requires_grad]
        if self.unread is None and not by_position:
            self.unread = True
        elif self.unread is None and not watched and any(tensor.requires_grad for tensor in tensors):
            self.unread = False  # no gradient will tell, such as of what a frozen encoder returns beside its decoder
        for tensor in watched:
            tensor.register_hook(note)

    def settle(self) -> None:
        """Take the answers of the backward passes so far into account."""
        if self._seen:
            self.unread = not bool(torch.stack(self._seen).any())
            self._seen.clear()
