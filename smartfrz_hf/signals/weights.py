"""The weight history: what each unit's weights were, at a fixed set of sampled positions, over the last snapshots."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..model.units import Unit


@dataclass(frozen=True)
class _Read:
    """Which elements of a parameter belong to a sample, as far as this process holds them, and where they go in it."""

    parameter: nn.Parameter
    index: tuple[torch.Tensor, ...]
    places: torch.Tensor


class WeightSampler:
    """
    Reads a fixed-size sample of each unit's weights, always at the same positions (SmartFRZ, "layer tailoring": one
    predictor fits layers of any size).

    Positions are drawn once, without replacement, evenly over all trainable floating-point matrices and convolution
    kernels of the unit; a unit with fewer weights than `weights_per_unit` repeats them in turn. Each read is one indexed
    gather per parameter, on its device: no parameter is ever copied whole. Under FSDP2 each process reads what lies in its
    shards, and all of them put their parts together, sample by sample.

    Args:
        units (`Sequence[Unit]`): the units, in order.
        weights_per_unit (`int`): weights per unit.
        seed (`int`, *optional*, defaults to `0`): seed of the positions. The process's random state is not touched.

    Raises:
        ValueError: a unit has no floating-point parameter at all.
    """

    def __init__(self, units: Sequence[Unit], weights_per_unit: int, seed: int = 0):
        self.weights_per_unit = weights_per_unit
        sharded = (p for unit in units for p in unit.named_parameters().values() if isinstance(p, DTensor))
        self._mesh: DeviceMesh | None = next((p.device_mesh for p in sharded), None)
        generator = np.random.default_rng(seed)
        self._reads = [self._draw(unit, generator) for unit in units]

    def _draw(self, unit: Unit, generator: np.random.Generator) -> list[_Read]:
        parameters = [p for p in unit.named_parameters().values() if p.is_floating_point() and p.numel()]
        if not parameters:
            raise ValueError(f"Unit {unit.name!r} has no floating-point weights to record.")
        # Frozen weights (a PEFT base) say nothing about what still probe_features.
        parameters = [p for p in parameters if p.requires_grad] or parameters
        parameters = [p for p in parameters if p.dim() >= 2] or parameters
        ends = np.cumsum([p.numel() for p in parameters])
        if ends[-1] >= self.weights_per_unit:
            positions = np.sort(generator.choice(ends[-1], self.weights_per_unit, replace=False, shuffle=False))
        else:
            positions = np.sort(np.arange(self.weights_per_unit) % ends[-1])
        reads = []
        for parameter, end in zip(parameters, ends, strict=True):
            start = end - parameter.numel()
            (places,) = np.nonzero((positions >= start) & (positions < end))
            if len(places):
                flat = torch.from_numpy(positions[places] - start).to(parameter.device)
                # An index per dimension reads strided weights (channels-last kernels) without a copy.
                index = torch.unravel_index(flat, parameter.shape)
                reads.append(self._in_shard(_Read(parameter, index, torch.from_numpy(places).to(parameter.device))))
        return reads

    def _in_shard(self, read: _Read) -> _Read:
        """What of it this process holds; a parameter that is not sharded is read by the first one."""
        if self._mesh is None:
            return read
        rank, shape = self._mesh.get_local_rank(), read.parameter.shape
        if not isinstance(read.parameter, DTensor):
            return read if rank == 0 else _Read(read.parameter, tuple(i[:0] for i in read.index), read.places[:0])
        placement: Any = read.parameter.placements[0]
        rows = -(-shape[placement.dim] // self._mesh.size())  # the last shards may be shorter, or empty
        along = read.index[placement.dim] - rows * rank
        here = (along >= 0) & (along < rows)
        index = [along if dim == placement.dim else i for dim, i in enumerate(read.index)]
        return _Read(read.parameter, tuple(i[here] for i in index), read.places[here])

    @torch.no_grad()
    def read(self, unit: int) -> torch.Tensor:
        """
        The unit's weights at its positions, now.

        Args:
            unit (`int`): index of the unit.

        Returns:
            `torch.Tensor` of shape `(weights_per_unit,)`, `float32`.
        """
        return self.read_all([unit])[0]

    @torch.no_grad()
    def read_all(self, units: Sequence[int]) -> torch.Tensor:
        """
        The weights of several units at their positions, now. Under FSDP2 to be called on all ranks.

        Args:
            units (`Sequence[int]`): indices of the units.

        Returns:
            `torch.Tensor` of shape `(units, weights_per_unit)`, `float32`.
        """
        return self._put_together([self._take(unit, lambda parameter: parameter) for unit in units])

    def read_gradient(self, unit: int) -> torch.Tensor:
        """
        The gradient at the unit's positions, now; zero where there is none.

        Args:
            unit (`int`): index of the unit.

        Returns:
            `torch.Tensor` of shape `(weights_per_unit,)`, `float32`.
        """
        return self._put_together([self._take(unit, lambda parameter: parameter.grad)])[0]

    def _take(self, unit: int, what: Callable[[nn.Parameter], torch.Tensor | None]) -> torch.Tensor:
        """A sample of one unit, zero where another process holds it."""
        parts = []
        for read in self._reads[unit]:
            tensor = what(read.parameter)
            if tensor is None:
                parts.append(torch.zeros(len(read.places), device=read.places.device))
            else:
                held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                parts.append(held[read.index].float())
        if self._mesh is None:
            return torch.cat(parts)
        sample = torch.zeros(self.weights_per_unit, device=parts[0].device)
        sample[torch.cat([read.places for read in self._reads[unit]])] = torch.cat(parts)
        return sample

    def _put_together(self, samples: list[torch.Tensor]) -> torch.Tensor:
        found = torch.stack([sample.to(samples[0].device) for sample in samples])
        if self._mesh is not None:
            # Each element comes from one process. As whole numbers they add up to the same bits, also those of -0 and NaN.
            dist.all_reduce(found.view(torch.int32), group=self._mesh.get_group())
        return found


class WeightHistory:
    """
    The last `window` snapshots of each unit in a ring buffer, and the snapshot at the start of the run.

    Args:
        units (`int`): number of units.
        window (`int`): snapshots kept.
        weights_per_unit (`int`): weights per snapshot.
        device (`torch.device`, *optional*): where the buffer lives. Defaults to the CPU.
    """

    def __init__(self, units: int, window: int, weights_per_unit: int, device: torch.device | str | None = None):
        self._ring = torch.zeros(units, window, weights_per_unit, device=device)
        self.start = torch.zeros(units, weights_per_unit, device=device)
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
        """Snapshots at hand, at most `window`."""
        return min(len(self.steps), self.window)

    def record(self, sampler: WeightSampler, step: int, units: Iterable[int] | None = None) -> None:
        """
        Take a snapshot.

        Args:
            sampler ([`WeightSampler`]): reads the weights.
            step (`int`): optimizer steps done.
            units (`Iterable[int]`, *optional*): the units to record: the active ones. Defaults to all.
        """
        slot = len(self.steps) % self.window
        units = list(range(len(self._ring)) if units is None else units)
        self._ring[units, slot] = sampler.read_all(units).to(self._ring.device)
        if not self.steps:
            self.start[units] = self._ring[units, slot]
        self.steps.append(step)

    def snapshots(self) -> torch.Tensor:
        """`torch.Tensor` of shape `(units, window, weights_per_unit)`, oldest first; the last `filled` snapshots are real."""
        oldest = len(self.steps) % self.window
        return torch.cat([self._ring[:, oldest:], self._ring[:, :oldest]], dim=1)  # quicker than `roll`

    def mask(self) -> torch.Tensor:
        """`torch.Tensor` of shape `(window,)`, `bool`: which snapshots are real."""
        return torch.arange(self.window, device=self._ring.device) >= self.window - self.filled

    def save(self, path: str | os.PathLike) -> None:
        """Write the history to one safetensors file."""
        tensors = {"ring": self._ring.contiguous(), "start": self.start.contiguous()}
        save_file(tensors, path, metadata={"steps": json.dumps(self.steps)})

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str | None = None) -> "WeightHistory":
        """Read what `save` wrote."""
        with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
            ring, start = file.get_tensor("ring"), file.get_tensor("start")
            steps = json.loads(file.metadata()["steps"])
        units, window, weights_per_unit = ring.shape
        history = cls(units, window, weights_per_unit, device)
        history._ring, history.start, history.steps = ring, start, steps
        return history
