"""One decision for all processes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

SAMPLED = 4096  # elements of each tensor in a checksum


class Ranks:
    """
    Lets the processes of a run agree. Does nothing in a run of one process.

    Messages go through a CPU process group of their own, so that no accelerator waits for them, and a process that has died
    is an error with its number, whatever backend the gradients use.

    Args:
        timeout (`float`): seconds that processes wait for each other.

    Attributes:
        count (`int`): number of processes.
    """

    def __init__(self, timeout: float):
        self._timeout = timedelta(seconds=timeout)
        self.count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self._group: Any = None
        if self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    def gather(self, value: Any, about: str) -> list[Any]:
        """
        The values of all processes, in all processes.

        Args:
            value (`Any`): the value of this process. It must be picklable.
            about (`str`): what the value is for. Part of the error message.

        Raises:
            RuntimeError: a process has not answered in time, or has died. The message has its number where it is known.
        """
        values = [value] * self.count
        if self.count > 1:
            with self._together(about):
                dist.all_gather_object(values, value, group=self._group)
        return values

    def check_equal(self, value: Any, about: str) -> None:
        """
        See that all processes have the same value.

        Args:
            value (`Any`): the value of this process. It must be picklable.
            about (`str`): what the value is. Part of the error message.

        Raises:
            RuntimeError: two processes have different values, or as for `gather`.
        """
        values = self.gather(value, about)
        other = next((rank for rank, theirs in enumerate(values) if theirs != values[0]), None)
        if other is not None:
            raise RuntimeError(
                f"The processes of this run have drifted apart: {about} is {values[0]!r} in process 0 and {values[other]!r} "
                f"in process {other}. All must train the same model: look for gradients that are not exchanged, random "
                "numbers that differ, or code that runs in some processes only."
            )

    @contextmanager
    def _together(self, about: str) -> Iterator[None]:
        """Wait for all processes, and name the one that is missing in an error."""
        try:
            dist.monitored_barrier(self._group, timeout=self._timeout)
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"Process {dist.get_rank()} of {self.count} got no answer from another process about {about}: {error}. "
                "See in the output of the others which one has ended, or waits elsewhere; one that only takes long needs a larger "
                "`ddp_timeout` (`timeout` of `FreezingRun`)."
            ) from error

    def close(self) -> None:
        """Give the process group back."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group, self.count = None, 1


@torch.no_grad()
def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """
    A number that differs, with all likelihood, where a tensor differs in any way that training makes it differ.

    The sum of the bits of at most 4,096 evenly spread elements of each tensor, taken as 32-bit integers and weighted by the
    tensor's place, so that neither the device nor the order of a sum plays a part.
    """
    total = 0
    for place, tensor in enumerate(tensors, start=1):
        sample = tensor.detach().reshape(-1)[:: max(1, -(-tensor.numel() // SAMPLED))]
        if sample.is_floating_point():
            sample = sample.float().view(torch.int32)
        total += place * int(sample.long().sum())
    return total
