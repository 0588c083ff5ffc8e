"""Warnings about what makes freezing save less than it could."""

import torch
from transformers.utils import logging

from ..model.tracing import leaves
from ..model.units import BlockStack, Unit

logger = logging.get_logger(__name__)

MAX_NAMES = 3


class Explanations:
    """
    Says why freezing saves less than it could, each reason once.

    Args:
        stack ([`BlockStack`]): the units of the model.
    """

    def __init__(self, stack: BlockStack):
        self._stack = stack
        self._said: set[str] = set()

    def kept(self, names: list[str], why: str) -> None:
        """Parameters of frozen units train on."""
        logger.warning(
            f"{listed(names)} in the frozen front {why}. The backward pass goes on through the frozen units to reach "
            "it, so freezing saves less, and no activations are cached."
        )

    def no_gradients(self, depth: int) -> None:
        """
        Say once for each depth if no unit behind the frozen front has a gradient, as in Reformer's reversible blocks.

        Args:
            depth (`int`): units of the frozen front.
        """
        place = f"gradients at depth {depth}"
        known = not depth or place in self._said
        if not known and any(p.grad is not None for p in self._stack.model.parameters()):
            self._said.add(place)
            behind = [p for unit in self._stack.units[depth:] for p in unit.named_parameters().values()]
            if any(p.requires_grad for p in behind) and all(p.grad is None for p in behind):
                logger.warning(
                    f"No unit behind the frozen front of {type(self._stack.model).__name__} gets a gradient, so only its head "
                    'trains now: its blocks need an input that requires one. Train it with `SmartFRZConfig(policy="never")`.'
                )

    def input_requires_grad(self, unit: Unit, asking: list[torch.Tensor], frozen: set[torch.nn.Parameter]) -> None:
        """
        Say once for each unit why the backward pass does not end at the frozen front.

        Args:
            unit ([`Unit`]): the first one that trains.
            asking (`list[torch.Tensor]`): tensors among its inputs that require a gradient.
            frozen (`set[torch.nn.Parameter]`): frozen parameters. [`Freezer.check`] tells of those among them that train.
        """
        if unit.name in self._said or torch.compiler.is_compiling():
            return
        names: dict[torch.Tensor, str] = {p: name for name, p in self._stack.model.named_parameters()}
        # A unit may hold what feeds its block, such as the embeddings of a decoder.
        known = {*frozen, *unit.named_parameters().values()}
        unnamed = "a tensor that is no parameter of the model"
        sources = [names.get(leaf, unnamed) for leaf in leaves(asking) if leaf not in known]
        if sources:
            self._said.add(unit.name)
            logger.warning(
                f"The input of {unit.name}, the first unit that trains, requires a gradient because of {listed(sources)}. It "
                "gets one, so the backward pass goes on through the frozen units, and freezing saves less. What should freeze "
                "with the stem can be named with `SmartFRZConfig(stem=[...])`."
            )


def listed(names: list[str]) -> str:
    """A few names, and how many more there are."""
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
