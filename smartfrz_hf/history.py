"""The weight history: what each unit's weights were, at a fixed set of sampled positions, over the last snapshots."""

import json
import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .blocks import Unit


class WeightSampler:
    """
    Reads a fixed-size sample of each unit's weights, always at the same positions (SmartFRZ, "layer tailoring": one
    predictor fits layers of any size).

    Positions are drawn once, without replacement, evenly over all trainable floating-point matrices and convolution
    kernels of the unit; a unit with fewer weights than `samples` repeats them in turn. Each read is one indexed
    gather per parameter, on its device: no parameter is ever copied whole.

    Args:
        units (`Sequence[Unit]`): the units, in order.
        samples (`int`): weights per unit.
        seed (`int`, *optional*, defaults to `0`): seed of the positions. The process's random state is not touched.

    Raises:
        ValueError: a unit has no floating-point parameter at all.
    """

    def __init__(self, units: Sequence[Unit], samples: int, seed: int = 0):
        self.samples = samples
        generator = np.random.default_rng(seed)
        self._reads = [self._draw(unit, generator) for unit in units]

    def _draw(self, unit: Unit, generator: np.random.Generator) -> list[tuple[nn.Parameter, tuple[torch.Tensor, ...]]]:
        parameters = [p for p in unit.named_parameters().values() if p.is_floating_point() and p.numel()]
        if not parameters:
            raise ValueError(f"Unit {unit.name!r} has no floating-point weights to record.")
        # Frozen weights (a PEFT base) say nothing about what still moves.
        parameters = [p for p in parameters if p.requires_grad] or parameters
        parameters = [p for p in parameters if p.dim() >= 2] or parameters
        ends = np.cumsum([p.numel() for p in parameters])
        if ends[-1] >= self.samples:
            positions = np.sort(generator.choice(ends[-1], self.samples, replace=False, shuffle=False))
        else:
            positions = np.sort(np.arange(self.samples) % ends[-1])
        reads = []
        for parameter, end in zip(parameters, ends, strict=True):
            inside = positions[(positions >= end - parameter.numel()) & (positions < end)] - (end - parameter.numel())
            if len(inside):
                flat = torch.from_numpy(inside).to(parameter.device)
                # An index per dimension reads strided weights (channels-last kernels) without a copy.
                reads.append((parameter, torch.unravel_index(flat, parameter.shape)))
        return reads

    @torch.no_grad()
    def read(self, unit: int) -> torch.Tensor:
        """
        The unit's weights at its positions, now.

        Args:
            unit (`int`): index of the unit.

        Returns:
            `torch.Tensor` of shape `(samples,)`, `float32`.
        """
        return torch.cat([parameter[index].float() for parameter, index in self._reads[unit]])

    def read_gradient(self, unit: int) -> torch.Tensor:
        """
        The gradient at the unit's positions, now; zero where there is none.

        Args:
            unit (`int`): index of the unit.

        Returns:
            `torch.Tensor` of shape `(samples,)`, `float32`.
        """
        return torch.cat(
            [
                torch.zeros(len(index[0]), device=parameter.device)
                if parameter.grad is None
                else parameter.grad[index].float()
                for parameter, index in self._reads[unit]
            ]
        )


class WeightHistory:
    """
    The last `window` snapshots of each unit in a ring buffer, and the snapshot at the start of the run.

    Args:
        units (`int`): number of units.
        window (`int`): snapshots kept.
        samples (`int`): weights per snapshot.
        device (`torch.device`, *optional*): where the buffer lives. Defaults to the CPU.
    """

    def __init__(self, units: int, window: int, samples: int, device: torch.device | str | None = None):
        self._ring = torch.zeros(units, window, samples, device=device)
        self.start = torch.zeros(units, samples, device=device)
        self.steps: list[int] = []

    @property
    def window(self) -> int:
        """Snapshots kept."""
        return self._ring.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(units, window, samples)`."""
        units, window, samples = self._ring.shape
        return units, window, samples

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
        for unit in range(len(self._ring)) if units is None else units:
            self._ring[unit, slot] = sampler.read(unit).to(self._ring.device)
            if not self.steps:
                self.start[unit] = self._ring[unit, slot]
        self.steps.append(step)

    def snapshots(self) -> torch.Tensor:
        """`torch.Tensor` of shape `(units, window, samples)`, oldest first; the last `filled` snapshots are real."""
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
        units, window, samples = ring.shape
        history = cls(units, window, samples, device)
        history._ring, history.start, history.steps = ring, start, steps
        return history
