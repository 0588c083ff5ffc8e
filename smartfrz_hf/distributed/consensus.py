"""One decision for all processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """
    Brings the ranks of a run to one answer. Does nothing in a run of one process.

    What is agreed on crosses a group of its own on the CPU, so that no accelerator has to wait and a rank that has died is
    an error with its number, whatever backend the gradients take.

    Args:
        timeout (`float`): seconds that ranks wait for each other.
    """

    def __init__(self, timeout: float):
        self._timeout = timedelta(seconds=timeout)
        self.count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self._group: Any = None
        if self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    def broadcast(self, value: int, about: str) -> int:
        """
        The value of rank 0, on all ranks.

        Args:
            value (`int`): what this rank would say.
            about (`str`): what it is about, for the error.

        Raises:
            RuntimeError: a rank has not answered in time, or has died; the message has its number where it is known.
        """
        if self.count == 1:
            return value
        word = torch.tensor([value])
        with self._answering(about):
            dist.broadcast(word, src=0, group=self._group)
        return int(word)

    def gather(self, value: Any, about: str) -> list[Any]:
        """
        What each rank says, on all ranks.

        Args:
            value (`Any`): what this rank says; can be pickled.
            about (`str`): what it is about, for the error.

        Raises:
            RuntimeError: as for `broadcast`.
        """
        values = [value] * self.count
        if self.count > 1:
            with self._answering(about):
                dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def _answering(self, about: str) -> Iterator[None]:
        """Wait for all ranks; what goes wrong is said with the number of the rank."""
        try:
            dist.monitored_barrier(self._group, timeout=self._timeout)
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"Rank {dist.get_rank()} of {self.count} had no answer from another rank on {about}: {error}"
            ) from error

    def close(self) -> None:
        """Give the group back."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group, self.count = None, 1
