"""Where activations wait for their next epoch: in memory first, then on disk."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from .codec import FORMATS, PackedRow, pack, packed_bytes

if TYPE_CHECKING:
    from .disk import DiskTier

logger = logging.get_logger(__name__)


class ActivationStore:
    """
    Keeps activations of single rows (training examples) by key, in memory and on disk, each within a budget.

    Rows come round once per epoch, so the one that will be wanted last is the one just used, and evicting old rows
    would help nobody: the first that come stay, and a row that finds no room is refused. A disk that cannot be used,
    from the start or from some moment on, costs its share of the room and one warning, never the run. A store belongs
    to one thread of one process.

    Args:
        memory_bytes (`int`): most bytes of rows in memory.
        disk_bytes (`int`, *optional*, defaults to `0`):
            Most bytes of rows on disk, each rounded up to whole pages. The file may grow a quarter and 64 MiB beyond
            them, as replaced rows leave gaps.
        folder (`str` or `os.PathLike`, *optional*):
            Existing folder in which the store makes one of its own, for as long as it lives. Defaults to the system's
            folder for temporary files.
        dtype (`str`, *optional*, defaults to `"exact"`):
            Format in which floating-point rows are kept: `"exact"` (every bit), `"bfloat16"`, `"float16"` or `"int8"`
            (with one `float32` scale per vector of the last dimension). A row that the format cannot hold, such as
            one with a NaN, is kept exactly.

    Attributes:
        memory_used (`int`): bytes of rows in memory.
        disk_used (`int`): bytes of rows on disk.
        full (`bool`): whether a row was refused for lack of room since the start or the last `clear`.
        trouble (`str`, *optional*): why the disk is out of use, in one line.

    Raises:
        ImportError: `disk_bytes` is above 0 and the extra `smartfrz_hf[disk]` is not installed.
        ValueError: a budget is negative or `dtype` is not known.

    Example:

    ```python
    >>> import torch
    >>> from smartfrz_hf.activation_cache.store import ActivationStore

    >>> store = ActivationStore(memory_bytes=2**20)
    >>> store.put([b"0" * 16, b"1" * 16], depth=3, rows=torch.arange(6.0).view(2, 3))
    2
    >>> store.get([b"1" * 16, b"2" * 16])
    [(3, tensor([3., 4., 5.])), None]
    ```
    """

    def __init__(
        self,
        memory_bytes: int,
        disk_bytes: int = 0,
        folder: str | os.PathLike | None = None,
        dtype: str = "exact",
    ):
        for name, value in (("memory_bytes", memory_bytes), ("disk_bytes", disk_bytes)):
            if value < 0:
                raise ValueError(f"`{name}` is {value}; it must be at least 0.")
        if dtype not in FORMATS:
            raise ValueError(f"`dtype` is {dtype!r}; it must be one of {', '.join(map(repr, FORMATS))}.")
        self.memory_used = 0
        self.full = False
        self.trouble: str | None = None
        self._memory_bytes = memory_bytes
        self._dtype = dtype
        self._memory: dict[bytes, PackedRow] = {}
        self._disk_bytes, self._folder = disk_bytes, folder
        self._disk: DiskTier | None = None
        self._make_disk()

    @property
    def disk_used(self) -> int:
        """Bytes of rows on disk, each rounded up to whole pages."""
        return 0 if self._disk is None else self._disk.used

    def __len__(self) -> int:
        return len(self._memory) + (0 if self._disk is None else len(self._disk))

    def get(self, keys: Sequence[bytes]) -> list[tuple[int, torch.Tensor] | None]:
        """
        ProbeSnapshot rows up.

        Args:
            keys (`Sequence[bytes]`): of 16 bytes each.

        Returns:
            `list[tuple[int, torch.Tensor] | None]`: for each key the depth and the row last put under it, on the CPU
            in the dtype in which it was put, or `None`. The tensors may be the store's own: do not write to them.
        """
        found = [self._memory.get(key) for key in keys]
        if self._disk is not None and (elsewhere := [i for i, key in enumerate(keys) if key in self._disk]):
            with self._giving_up_disk():
                for i, row in zip(elsewhere, self._disk.read([keys[i] for i in elsewhere]), strict=True):
                    found[i] = row
        return [None if row is None else (row.depth, row.unpack()) for row in found]

    def depths(self, keys: Sequence[bytes]) -> list[int | None]:
        """For each key the depth that `get` would give, or `None`, without reading the row."""
        return [self._depth(key) for key in keys]

    def put(self, keys: Sequence[bytes], depth: int, rows: Sequence[torch.Tensor]) -> int:
        """
        Store copies of rows, each in place of what its key holds; that stays where the new row finds no room.

        Args:
            keys (`Sequence[bytes]`): of 16 bytes each.
            depth (`int`): units that the rows have been through; `get` gives it back.
            rows (`Sequence[torch.Tensor]`): one per key, such as a batch; on any device, with any strides.

        Returns:
            `int`: how many found room.
        """
        kept = 0
        for key, row in zip(keys, rows, strict=True):
            # Asked before the row is copied, lest a full store cost as much as one that still takes rows.
            if self._has_room(key, packed_bytes(row, self._dtype)):
                kept += self._put(key, pack(row, depth, self._dtype))
        self.full |= kept < len(keys)
        return kept

    def clear(self) -> None:
        """Forget every row, give the disk space back and try a disk in trouble anew."""
        self._memory.clear()
        self.memory_used = 0
        self.full = False
        self.trouble = None
        if self._disk is not None:
            self._disk.close()
        self._make_disk()

    def close(self) -> None:
        """Forget every row and remove the folder on disk; from then on every row is refused. May be called again."""
        self._memory_bytes = self._disk_bytes = 0
        self.clear()

    def _make_disk(self) -> None:
        self._disk = None
        if self._disk_bytes:
            # Without a disk budget neither LMDB nor xxhash need be installed.
            from . import disk

            with self._giving_up_disk():
                self._disk = disk.DiskTier(self._disk_bytes, self._folder)

    def _depth(self, key: bytes) -> int | None:
        if key in self._memory:
            return self._memory[key].depth
        return None if self._disk is None else self._disk.depth(key)

    def _has_room(self, key: bytes, size: int) -> bool:
        if self._has_memory(key, size):
            return True
        return self._open_disk is not None and self._open_disk.has_room(key, size)

    def _has_memory(self, key: bytes, size: int) -> bool:
        held = self._memory.get(key)
        return self.memory_used - (held.nbytes if held else 0) + size <= self._memory_bytes

    def _put(self, key: bytes, row: PackedRow) -> bool:
        if self._has_memory(key, row.nbytes):
            self._forget_in_memory(key)
            self._memory[key] = row
            self.memory_used += row.nbytes
            if self._disk is not None:
                with self._giving_up_disk():
                    self._disk.forget(key)
            return True
        if self._open_disk is not None:
            with self._giving_up_disk():
                if self._open_disk.put(key, row):
                    self._forget_in_memory(key)
                    return True
        return False

    def _forget_in_memory(self, key: bytes) -> None:
        held = self._memory.pop(key, None)
        if held is not None:
            self.memory_used -= held.nbytes

    @property
    def _open_disk(self) -> "DiskTier | None":
        """The disk, unless it is out of use."""
        return None if self.trouble else self._disk

    @contextmanager
    def _giving_up_disk(self) -> Iterator[None]:
        """From the first error on, nothing more is written to disk."""
        try:
            yield
        except OSError as error:
            if self.trouble is None:
                self.trouble = " ".join(str(error).split())
                logger.warning(f"Activations are no longer written to disk: {self.trouble}")
