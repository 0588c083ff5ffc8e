"""The change that LoRA makes to a weight matrix, read at single positions."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

# Names of the two factors in a layer of PEFT: of linear and convolution layers, and of embeddings.
FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


class LoRAChange:
    r"""
    The change \\(\sum s\, B A\\) of a weight matrix, summed over the active adapters of its layer, with the scale \\(s\\) of each
    ([LoRA](https://arxiv.org/abs/2106.09685), equation 3). The matrix itself is never computed.

    Args:
        layer (`torch.nn.Module`): the layer of PEFT.
        factors (`dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]`):
            \\(A\\) and \\(B\\) of each adapter. Of a kernel \\(A\\) with more dimensions, the first one is the rank.

    Attributes:
        shape (`torch.Size`): of the product.
        parameters (`set[torch.nn.Parameter]`): all factors.
    """

    def __init__(self, layer: nn.Module, factors: dict[str, tuple[nn.Parameter, nn.Parameter]]):
        self._layer: Any = layer
        self._factors = factors
        a, b = next(iter(factors.values()))
        self.shape = torch.Size([len(b), a.numel() // len(a)])
        self.device = a.device
        self.parameters = {parameter for pair in factors.values() for parameter in pair}

    def dim(self) -> int:
        """Two: it is a matrix."""
        return len(self.shape)

    def numel(self) -> int:
        """Elements of the matrix."""
        return self.shape.numel()

    def at(self, index: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """
        The elements at some positions. Under FSDP2 all ranks have to call it, since the factors are put together first.

        Args:
            index (`tuple` of two `torch.Tensor` of shape `(positions,)`): rows and columns.

        Returns:
            `torch.Tensor` of shape `(positions,)`, `float32`.
        """
        rows, columns = index
        total = torch.zeros(len(rows), dtype=torch.float32, device=self.device)
        for adapter in self._layer.active_adapters:
            if adapter in self._factors:
                a, b = (_whole(factor).flatten(1) for factor in self._factors[adapter])
                total += self._layer.scaling[adapter] * (b[rows].float() * a[:, columns].T.float()).sum(1)
        return total


def lora_changes(modules: Iterable[nn.Module], trainable: Collection[nn.Parameter]) -> Iterator[LoRAChange]:
    """
    The changes that LoRA trains in some modules.

    Layers of which the change is more than the product of two matrices are left out: DoRA and other variants, AdaLoRA,
    adapters of fused experts and of grouped convolutions.

    Args:
        modules (`Iterable[torch.nn.Module]`): where to look, also inside.
        trainable (`Collection[torch.nn.Parameter]`): a layer counts if one of its factors is among these.
    """
    for layer in (layer for module in modules for layer in module.modules()):
        if not hasattr(layer, "scaling") or not hasattr(layer, "active_adapters"):
            continue
        if getattr(layer, "lora_variant", None) or hasattr(layer, "lora_E") or getattr(layer, "num_experts", 1) > 1:
            continue
        factors = {
            adapter: (getattr(a, "weight", a), getattr(b, "weight", b))
            for first, second in FACTORS
            for adapter, a in getattr(layer, first, {}).items()
            for b in [getattr(layer, second)[adapter]]
        }
        change = LoRAChange(layer, factors) if factors else None
        fits = all(b.numel() == len(b) * len(a) for a, b in factors.values())
        if change is not None and fits and not change.parameters.isdisjoint(trainable):
            yield change


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
