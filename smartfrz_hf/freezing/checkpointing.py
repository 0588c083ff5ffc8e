"""Activation checkpointing of units that are frozen behind units that train."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..model.forward_patch import LeftBehind


class CheckpointedModules:
    """
    Keeps frozen modules under activation checkpointing while the backward pass runs through them.

    Transformers checkpoints a layer in training mode only, and a frozen layer computes in evaluation mode. Its activations would
    stay in memory, more of them than before it froze. So such a layer is in training mode when it is called, and in evaluation
    mode inside the checkpointed function.

    Args:
        modules (`Iterable[torch.nn.Module]`): frozen modules. Those among them that are checkpointed now are kept so.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self._layers = [m for m in modules if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
        self._hooks = [
            hook
            for layer in self._layers
            for hook in (
                layer.register_forward_pre_hook(LeftBehind(self._enter)),
                layer.register_forward_hook(LeftBehind(self._leave), always_call=True),
            )
        ]
        self._training = False

    def set_training(self, training: bool) -> None:
        """To be called before each pass, with the mode of the model."""
        self._training = training
        for layer in self._layers:
            layer.training = training

    def remove(self) -> None:
        """Take the hooks off. The modes of the layers stay as they are."""
        while self._hooks:
            self._hooks.pop().remove()

    def _enter(self, layer: nn.Module, *_: Any) -> None:
        layer.training = False

    def _leave(self, layer: nn.Module, *_: Any) -> None:
        layer.training = self._training
