"""What has another name in older versions: Transformers 5.23 renamed gradient checkpointing to activation checkpointing."""

from typing import Any

import pytest
from transformers import PreTrainedModel
from transformers.models.vit import modeling_vit

RENAMED = hasattr(PreTrainedModel, "activation_checkpointing_enable")
# Of ViT and DeiT.
VIT_BLOCKS = "encoder.layer" if hasattr(modeling_vit, "ViTEncoder") else "layers"


def settings(changes: dict[str, Any]) -> dict[str, Any]:
    """Fields of `TrainingArguments` under the names of the installed version."""
    if RENAMED:
        return changes
    return {key.replace("activation_", "gradient_"): value for key, value in changes.items()}


def checkpoint_activations(model: PreTrainedModel, reentrant: bool = False) -> None:
    """Turn on activation checkpointing in all blocks."""
    enable = model.activation_checkpointing_enable if RENAMED else model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


VISION_TOWER = "model.vision_tower" if RENAMED else "model.vision_tower.vision_model"  # of LLaVA

accumulates = pytest.mark.skipif(
    not RENAMED,
    reason="the Trainer of this version divides accumulated gradients twice, unless the model counts items",
)
# Earlier versions load the optimizer to the device "cpu:0" there, which torch refuses.
resume_on_two_cpu_ranks = pytest.mark.skipif(
    not RENAMED, reason="the Trainer of this version cannot resume on several CPU ranks"
)
