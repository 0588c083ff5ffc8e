"""Activation checkpointing of units that are frozen behind units that train."""

from collections.abc import Callable, Iterable

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .._compat import checkpoint_in_evaluation


class CheckpointedModules:
    """
    Keeps frozen modules under activation checkpointing while the backward pass runs through them.

    Transformers checkpoints a layer in training mode only, and a frozen layer computes in evaluation mode. Its activations would
    stay in memory, more of them than before it froze. So such a layer is in training mode when it is called, and in evaluation
    mode inside the checkpointed function.

    Args:
        modules (`Iterable[torch.nn.Module]`): frozen modules.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self._layers = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
        self._undo: list[Callable[[], None]] = []

    def before_pass(self, training: bool) -> None:
        """
        To be called before each pass: checkpointing may be turned off and on again in between.

        Args:
            training (`bool`): whether the model is in training mode.
        """
        for layer in self._layers:
            undo = checkpoint_in_evaluation(layer)
            self._undo += [] if undo is None else [undo]
            layer.training = training and bool(layer.gradient_checkpointing)

    def remove(self) -> None:
        """Give the layers their own checkpointing functions back. Their modes stay as they are."""
        while self._undo:
            self._undo.pop()()
