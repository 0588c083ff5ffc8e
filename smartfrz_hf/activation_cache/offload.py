"""The weights of a front that nobody needs, in host memory."""

from ..freezing.weights import FrozenWeights
from ..model.units import BlockStack
from .state import FrontState


class Offload:
    """
    Moves the weights of frozen blocks to host memory while all rows that come are found, and back.

    Args:
        weights ([`FrozenWeights`], *optional*): moves them. Without it, nothing is moved.
        state ([`FrontState`]): is told that the weights are the same ones as before.
    """

    def __init__(self, weights: FrozenWeights | None, state: FrontState):
        self.weights, self.state = weights, state
        self._found_in_a_row = 0

    def look(self) -> None:
        """Notice what has changed in the front since the last call."""
        if self.state.look() and self.weights is not None and self.weights.offloaded:
            self.weights.reload()
            self.state.look()

    def wake(self) -> None:
        """Bring the weights back before a frozen block runs."""
        if self.weights is not None and self.weights.offloaded:
            self._found_in_a_row = 0
            self.weights.reload()
            self.state.accept_weights()

    def count(self, found: int, kept: float, stack: BlockStack, depth: int) -> None:
        """Note rows of which all were found; `0` where some were not. `kept` are as many rows as this process sees an epoch."""
        self._found_in_a_row = self._found_in_a_row + found if found else 0
        if self.weights is not None and not self.weights.offloaded and self._found_in_a_row > kept:
            self.weights.offload(stack.blocks[: depth - 1])
            self.state.accept_weights()
