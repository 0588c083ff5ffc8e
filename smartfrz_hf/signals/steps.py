"""What a policy can read before each optimizer step: the gradients and weights of the active units."""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from ..model.units import BlockStack


@dataclass(frozen=True)
class BeforeUpdate:
    """
    The state of a run just before an optimizer step, when the gradients are complete and no weight has changed yet.

    Under DDP the gradients are averages over all processes, the same in each. Under FSDP2 gradients and weights are
    `DTensor`s, of which each process holds its share; [`l1_norm`] adds up all shares.

    Attributes:
        step (`int`): optimizer steps done.
        max_steps (`int`): optimizer steps of the run.
        depth (`int`): frozen units, counted from the front.
        stack ([`BlockStack`]): the units.
    """

    step: int
    max_steps: int
    depth: int
    stack: BlockStack

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.stack)

    @property
    def progress(self) -> float:
        """Fraction of the run that is done."""
        return self.step / max(1, self.max_steps)

    def weights(self, unit: int) -> dict[str, torch.nn.Parameter]:
        """
        The trainable parameters of a unit, by dotted name. They are the model's own: copy what must not change.

        Args:
            unit (`int`): index of the unit.
        """
        return {name: p for name, p in self.stack[unit].named_parameters().items() if p.requires_grad}

    def gradients(self, unit: int) -> dict[str, torch.Tensor]:
        """
        The gradients of a unit, by dotted name of the parameter. Parameters without a gradient are left out.

        Args:
            unit (`int`): index of the unit.
        """
        return {name: p.grad for name, p in self.weights(unit).items() if p.grad is not None}


@torch.no_grad()
def l1_norm(tensor: torch.Tensor) -> float:
    """The sum of the absolute values of all elements. Under FSDP2 all processes have to call it."""
    total = tensor.abs().sum(dtype=torch.float32)
    return float(total.full_tensor() if isinstance(total, DTensor) else total)
