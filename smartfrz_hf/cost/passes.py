"""
What a training pass costs by unit, whatever is frozen.

Sets of units are bit masks here: unit `i` has the bit `1 << i`, and the head the bit behind that of the last unit.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PassCosts:
    """
    FLOPs of a training pass, per element of the model's main input. The last unit is the head.

    Attributes:
        forward (`list[float]`): of each unit's forward pass.
        backward (`list[dict[int, float]]`): of each unit's backward pass, by a set of units, as a bit mask: they are spent
            if any of these trains. That is the unit alone for the gradients of its weights, and it and all units in front
            of it for those of its activations.
    """

    forward: list[float]
    backward: list[dict[int, float]]

    def backward_with(self, frozen: int) -> list[float]:
        """
        FLOPs of each unit's backward pass.

        Args:
            frozen (`int`): bit mask of the units that are frozen.
        """
        return [sum(flops for units, flops in parts.items() if units & ~frozen) for parts in self.backward]

    def state_dict(self) -> dict[str, Any]:
        """Both attributes, as JSON values. Sets of units are hexadecimal numbers."""
        return {
            "forward": self.forward,
            "backward": [{hex(units): flops for units, flops in parts.items()} for parts in self.backward],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "PassCosts":
        """From what `state_dict` gave."""
        backward = [{int(units, 16): flops for units, flops in parts.items()} for parts in state["backward"]]
        return cls(state["forward"], backward)


def backward_of_chain(unit: int, flops: float) -> dict[int, float]:
    """
    The backward pass of a unit of which only the whole cost is known: one half for its weights, and one for its activations, which
    depend on all units in front of it.
    """
    return {1 << unit: flops} if not unit else {1 << unit: flops / 2, (2 << unit) - 1: flops / 2}


def apart_of(frozen: int) -> int:
    """Those of the frozen units, as a bit mask, that have one in front of them which is not frozen."""
    first_active = ~frozen & (frozen + 1)
    return frozen & ~(first_active - 1)
