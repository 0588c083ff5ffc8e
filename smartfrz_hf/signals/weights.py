"""The weight history: a fixed sample of each unit's weights, over the last snapshots."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..model.units import Unit
from .lora import LoRAChange, lora_changes


@dataclass(frozen=True)
class _Read:
    """The elements of a matrix that belong to a sample and that this process holds, and their places in the sample."""

    source: nn.Parameter | LoRAChange
    index: tuple[torch.Tensor, ...]
    places: torch.Tensor


class WeightSampler:
    """
    Reads a sample of each unit's weights, always at the same positions, so that one predictor fits layers of any size
    ("layer tailoring" in SmartFRZ, arXiv 2401.16720).

    Positions are drawn once, without replacement, evenly over all trainable floating-point matrices and convolution
    kernels of the unit. A unit with fewer weights than `weights_per_unit` repeats them in turn. Each read is one indexed
    gather per parameter, on its device: no parameter is copied as a whole. A unit without floating-point weights, such as the
    stem of a network whose first layer is a block, reads as zeros. Under FSDP2 each process reads its own shards, and the
    samples are put together from all of them.

    Args:
        units (`Sequence[Unit]`): the units, in order.
        weights_per_unit (`int`): weights in a sample.
        seed (`int`, *optional*, defaults to `0`): seed of the positions. The process's random state is not touched.
        lora_products (`bool`, *optional*, defaults to `False`):
            Whether to read, in place of the two factors of a LoRA layer, the change of the weight matrix that they make
            together ([`~smartfrz_hf.signals.lora.LoRAChange`]). It has no gradient, so [`read_gradients`] is not for this.
    """

    def __init__(self, units: Sequence[Unit], weights_per_unit: int, seed: int = 0, lora_products: bool = False):
        self.weights_per_unit, self.lora_products = weights_per_unit, lora_products
        parameters = [p for unit in units for p in unit.named_parameters().values()]
        self._mesh: DeviceMesh | None = next((p.device_mesh for p in parameters if isinstance(p, DTensor)), None)
        self._device = parameters[0].device if parameters else torch.device("cpu")
        generator = np.random.default_rng(seed)
        self._reads = [self._draw(unit, generator) for unit in units]

    def _draw(self, unit: Unit, generator: np.random.Generator) -> list[_Read]:
        sources = self._sources(unit)
        if not sources:
            return []
        ends = np.cumsum([source.numel() for source in sources])
        if ends[-1] >= self.weights_per_unit:
            positions = np.sort(generator.choice(ends[-1], self.weights_per_unit, replace=False, shuffle=False))
        else:
            positions = np.sort(np.arange(self.weights_per_unit) % ends[-1])
        reads = []
        for source, end in zip(sources, ends, strict=True):
            start = end - source.numel()
            (places,) = np.nonzero((positions >= start) & (positions < end))
            if len(places):
                flat = torch.from_numpy(positions[places] - start).to(source.device)
                # An index per dimension reads strided weights (channels-last kernels) without a copy.
                index = torch.unravel_index(flat, source.shape)
                reads.append(self._in_shard(_Read(source, index, torch.from_numpy(places).to(source.device))))
        return reads

    def _sources(self, unit: Unit) -> list[nn.Parameter | LoRAChange]:
        """What a sample of a unit is drawn from."""
        parameters = [p for p in unit.named_parameters().values() if p.is_floating_point() and p.numel()]
        # Weights that do not train, such as the base model under PEFT, show nothing.
        parameters = [p for p in parameters if p.requires_grad] or parameters
        changes = list(lora_changes(unit.modules.values(), set(parameters))) if self.lora_products else []
        factors = {factor for change in changes for factor in change.parameters}
        sources: list[nn.Parameter | LoRAChange] = [*(p for p in parameters if p not in factors), *changes]
        return [source for source in sources if source.dim() >= 2] or sources

    def _in_shard(self, read: _Read) -> _Read:
        """The part that this process holds. What is not sharded is read by the first process."""
        if self._mesh is None:
            return read
        rank, shape = self._mesh.get_local_rank(), read.source.shape
        if not isinstance(read.source, DTensor):
            return read if rank == 0 else _Read(read.source, tuple(i[:0] for i in read.index), read.places[:0])
        placement: Any = read.source.placements[0]
        rows = -(-shape[placement.dim] // self._mesh.size())  # the last shards may be shorter, or empty
        along = read.index[placement.dim] - rows * rank
        here = (along >= 0) & (along < rows)
        index = [along if dim == placement.dim else i for dim, i in enumerate(read.index)]
        return _Read(read.source, tuple(i[here] for i in index), read.places[here])

    @torch.no_grad()
    def read(self, units: Sequence[int]) -> torch.Tensor:
        """
        The weights of several units at their positions. Under FSDP2 all ranks have to call it.

        Args:
            units (`Sequence[int]`): indices of the units.

        Returns:
            `torch.Tensor` of shape `(units, weights_per_unit)`, `float32`.
        """
        return self._put_together([self._take(unit, lambda parameter: parameter) for unit in units])

    def read_gradients(self, units: Sequence[int]) -> torch.Tensor:
        """
        The gradients of several units at their positions, zero where there is none. Under FSDP2 all ranks have to call it.

        Args:
            units (`Sequence[int]`): indices of the units.

        Returns:
            `torch.Tensor` of shape `(units, weights_per_unit)`, `float32`.
        """
        return self._put_together([self._take(unit, lambda parameter: parameter.grad) for unit in units])

    def _take(self, unit: int, get: Callable[[nn.Parameter], torch.Tensor | None]) -> torch.Tensor:
        """A sample of one unit, zero where another process holds the element."""
        if not self._reads[unit]:
            return torch.zeros(self.weights_per_unit, dtype=torch.float32, device=self._device)
        parts = []
        for read in self._reads[unit]:
            if isinstance(read.source, LoRAChange):
                parts.append(read.source.at(read.index))
                continue
            tensor = get(read.source)
            if tensor is None:
                parts.append(torch.zeros(len(read.places), dtype=torch.float32, device=read.places.device))
            else:
                held, index = tensor.to_local() if isinstance(tensor, DTensor) else tensor, read.index
                if held.is_sparse:  # the gradient of `nn.Embedding(sparse=True)`
                    held = held.index_select(0, index[0]).to_dense()
                    index = (torch.arange(len(held), device=held.device), *index[1:])
                parts.append(held[index].float())
        if self._mesh is None:
            return torch.cat(parts)
        sample = parts[0].new_zeros(self.weights_per_unit)
        sample[torch.cat([read.places for read in self._reads[unit]])] = torch.cat(parts)
        return sample

    def _put_together(self, samples: list[torch.Tensor]) -> torch.Tensor:
        stacked = torch.stack([sample.to(samples[0].device) for sample in samples])
        if self._mesh is not None:
            # Each element comes from one process. As integers they add up to the same bits, also those of -0 and NaN.
            dist.all_reduce(stacked.view(torch.int32), group=self._mesh.get_group())
        return stacked


class WeightHistory:
    """
    The last `window` snapshots of each unit in a ring buffer, and the snapshot at the start of the run.

    Args:
        units (`int`): number of units.
        window (`int`): snapshots kept.
        weights_per_unit (`int`): weights of a unit in a snapshot.
        device (`torch.device`, *optional*): device of the buffer. Defaults to the CPU.

    Attributes:
        start (`torch.Tensor` of shape `(units, weights_per_unit)`): the first snapshot.
        steps (`list[int]`): the steps of all snapshots so far.
    """

    def __init__(self, units: int, window: int, weights_per_unit: int, device: torch.device | str | None = None):
        device = "cpu" if device is None else device  # whatever the default ones of torch are
        self._ring = torch.zeros(units, window, weights_per_unit, dtype=torch.float32, device=device)
        self.start = torch.zeros(units, weights_per_unit, dtype=torch.float32, device=device)
        self.steps: list[int] = []

    @property
    def window(self) -> int:
        """Snapshots kept."""
        return self._ring.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(units, window, weights_per_unit)`."""
        units, window, weights_per_unit = self._ring.shape
        return units, window, weights_per_unit

    @property
    def filled(self) -> int:
        """Number of snapshots that are kept now, at most `window`."""
        return min(len(self.steps), self.window)

    def record(self, sampler: WeightSampler, step: int, units: Iterable[int] | None = None) -> None:
        """
        Take a snapshot.

        Args:
            sampler ([`WeightSampler`]): reads the weights.
            step (`int`): optimizer steps done.
            units (`Iterable[int]`, *optional*): indices of the units to record. Defaults to all.
        """
        slot = len(self.steps) % self.window
        units = list(range(len(self._ring)) if units is None else units)
        self._ring[units, slot] = sampler.read(units).to(self._ring.device)
        if not self.steps:
            self.start[units] = self._ring[units, slot]
        self.steps.append(step)

    def snapshots(self) -> torch.Tensor:
        """The snapshots, `(units, window, weights_per_unit)`, oldest first. Only the last `filled` of them were taken."""
        oldest = len(self.steps) % self.window
        return torch.cat([self._ring[:, oldest:], self._ring[:, :oldest]], dim=1)  # faster than `roll`

    def state_dict(self) -> dict[str, Any]:
        """
        What a run needs to continue.

        Returns:
            `dict`: `"snapshots"` (as [`~WeightHistory.snapshots`] gives them), `"start"` and `"steps"` (`list[int]`).
        """
        return {"snapshots": self.snapshots(), "start": self.start, "steps": list(self.steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Continue from a state, on the device of this history.

        Raises:
            ValueError: the snapshots have another shape.
        """
        if tuple(state["snapshots"].shape) != self.shape:
            raise ValueError(
                f"The state holds a weight history of shape {tuple(state['snapshots'].shape)} (units, window, "
                f"weights_per_unit), and this one has the shape {self.shape}: the model or the predictor is another one."
            )
        self.steps = list(state["steps"])
        self.start = state["start"].to(self._ring)
        oldest = len(self.steps) % self.window  # the slot that the next snapshot goes to
        self._ring = state["snapshots"].to(self._ring).roll(oldest, dims=1)
