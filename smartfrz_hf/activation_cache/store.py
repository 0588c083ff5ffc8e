"""Where activations wait for the next epoch: beside the model first, then in memory, then on disk."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from ..choices import one_of
from .codec import FORMATS, PackedRow, pack, packed_bytes
from .memory_tier import DeviceTier, MemoryTier

if TYPE_CHECKING:
    from .lmdb_tier import LmdbTier

logger = logging.get_logger(__name__)


class ActivationStore:
    """
    Keeps activations of single rows (training examples) by key, on the accelerator, in memory and on disk, each within a
    budget.

    Rows come again once per epoch, so the row that will be wanted last is the one just used, and to evict old rows would help
    nobody: the first that come stay, and a row that finds no room is refused. A disk that cannot be used, from the start or
    from some moment on, costs its share of the room and one warning, never the run.

    Args:
        memory_bytes (`int`): most bytes of rows in memory.
        disk_bytes (`int`, *optional*, defaults to `0`): most bytes of rows on disk, as for [`LmdbTier`].
        folder (`str` or `os.PathLike`, *optional*): where the file is, which has no name. Defaults to that for temporary files.
        dtype (`str`, *optional*, defaults to `"exact"`):
            Format in which floating-point rows are kept: `"exact"` (every bit), `"bfloat16"`, `"float16"` or `"int8"`.
        shared (`bool`, *optional*, defaults to `False`): whether other processes of the host open it, through `handles`.
        device_memory (`float`, *optional*, defaults to `0`):
            Most bytes of rows on the accelerator from which they come; below 1 a fraction of what is free there.

    Attributes:
        trouble (`str`, *optional*): why the disk is out of use, in one line.

    Raises:
        ImportError: `disk_bytes` is above 0, or `shared` is set, and the extra `smartfrz_hf[disk]` is not installed.
        OSError: the memory cannot be shared.
        ValueError: a budget is negative or `dtype` is not known.

    Example:

    ```python
    >>> import torch
    >>> from smartfrz_hf.activation_cache.store import ActivationStore

    >>> store = ActivationStore(memory_bytes=2**20)
    >>> store.put([b"0" * 16, b"1" * 16], front=3, rows=torch.arange(6.0).view(2, 3))
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
        shared: bool = False,
        device_memory: float = 0.0,
    ):
        budgets = {"memory_bytes": memory_bytes, "disk_bytes": disk_bytes, "device_memory": device_memory}
        for name, value in budgets.items():
            if value < 0:
                raise ValueError(f"`{name}` is {value}; it must be at least 0.")
        if dtype not in FORMATS:
            raise ValueError(f"`dtype` is {dtype!r}; it must be {one_of(dtype, FORMATS)}")
        self.dtype = dtype
        self.trouble: str | None = None
        self._device: DeviceTier | None = None
        self._device_memory = device_memory
        self._memory: MemoryTier | LmdbTier = MemoryTier(memory_bytes)
        self._disk: LmdbTier | None = None
        if shared or disk_bytes:  # in memory of its own, neither LMDB nor xxhash need be installed
            from . import lmdb_tier

            if shared:
                self._memory = lmdb_tier.LmdbTier.in_memory(memory_bytes)
            if disk_bytes:
                with self._giving_up_disk():
                    self._disk = lmdb_tier.LmdbTier.on_disk(disk_bytes, folder, shared)

    @classmethod
    def attach(cls, handles: list, dtype: str) -> "ActivationStore":
        """Open the store that another process of this host has made, by its `handles`. Raises `OSError` if it cannot."""
        from .lmdb_tier import LmdbTier

        store = cls(0, dtype=dtype)
        tiers = [LmdbTier.attach(handle) for handle in handles]
        store._memory, store._disk = tiers[0], tiers[1] if len(tiers) > 1 else None
        return store

    @property
    def handles(self) -> list:
        """What other processes of this host attach by, if the store is shared."""
        return [tier.handle for tier in self._tiers if not isinstance(tier, MemoryTier)]

    def place_for(self, batch: torch.Tensor) -> torch.device:
        """The device from which to store a batch: the one that has computed it where it has room there, else the CPU."""
        if batch.device.type != "cpu" and self._device_memory:
            if self._device is None:
                self._device = DeviceTier(batch.device, self._device_memory)
            self._device.look()
            if batch.device == self._device.device and self._device.has_room(batch.nbytes):
                return batch.device
        return torch.device("cpu")

    @property
    def used(self) -> int:
        """Bytes of all rows."""
        return sum(tier.used for tier in self._tiers)

    @property
    def device_used(self) -> int:
        """Bytes of rows on the accelerator."""
        return 0 if self._device is None else self._device.used

    @property
    def memory_used(self) -> int:
        """Bytes of rows in memory, by all processes that share it."""
        return self._memory.used

    @property
    def disk_used(self) -> int:
        """Bytes of rows on disk, each rounded up to whole pages."""
        return 0 if self._disk is None else self._disk.used

    def __len__(self) -> int:
        return sum(map(len, self._tiers))

    def fronts(self, keys: Sequence[bytes]) -> list[int | None]:
        """For each key the front with which `get` would return its row, or `None`, without reading the row."""
        found: list[int | None] = [None] * len(keys)
        for tier in self._tiers:
            if None in found:
                with self._giving_up_disk():
                    found = [a if b is None else b for a, b in zip(tier.fronts(keys), found, strict=True)]
        return found

    def get(self, keys: Sequence[bytes]) -> list[tuple[int, torch.Tensor] | None]:
        """
        For each key the front and the row last put under it, on the CPU or the accelerator in the dtype in which it was put, or
        `None`. The tensors may be the store's own: do not write to them.
        """
        found: list[PackedRow | None] = [None] * len(keys)
        for tier in self._tiers:
            missing = [i for i, row in enumerate(found) if row is None]
            if missing:
                with self._giving_up_disk():
                    for i, row in zip(missing, tier.read([keys[i] for i in missing]), strict=True):
                        found[i] = row
        return [None if row is None else (row.front, row.unpack()) for row in found]

    def put(self, keys: Sequence[bytes], front: int, rows: Sequence[torch.Tensor]) -> int:
        """
        Store copies of rows, each in place of what its key holds, which stays where the new row finds no room.

        Args:
            keys (`Sequence[bytes]`): of 16 bytes each.
            front (`int`): digest of what has computed the rows. A row that is there with the same one is left as it is.
            rows (`Sequence[torch.Tensor]`): one per key; on any device, with any strides.

        Returns:
            `int`: how many rows are there now.
        """
        tiers = [tier for tier in self._tiers if tier is not self._disk or self.trouble is None]
        # Asked before a row is copied, so that a full store costs next to nothing.
        room = any(tier.has_room(packed_bytes(rows[0], self.dtype)) for tier in tiers) if len(keys) else False
        known = dict(zip(keys, self.fronts(keys), strict=True))
        kept = sum(known[key] == front for key in keys)
        wanted = {
            key: pack(row, front, self.dtype)
            for key, row in zip(keys, rows, strict=True)
            if known[key] != front and (room or known[key] is not None)
        }
        for tier in tiers:
            with self._giving_up_disk():
                here = zip(list(wanted), tier.fronts(list(wanted)), strict=True)
                # A row that is replaced stays where it is.
                placed = tier.put({k: wanted[k] for k, held in here if held is not None or known[k] is None})
                kept += len(placed)
                wanted = {key: row for key, row in wanted.items() if key not in placed}
        return kept

    def close(self) -> None:
        """Forget every row; from then on every row is refused. May be called again."""
        for tier in self._tiers:
            tier.close()
        self._memory, self._disk, self._device, self._device_memory = MemoryTier(0), None, None, 0.0

    @property
    def _tiers(self) -> "list[MemoryTier | LmdbTier]":
        return [tier for tier in (self._device, self._memory, self._disk) if tier is not None]

    @contextmanager
    def _giving_up_disk(self) -> Iterator[None]:
        """From the first error on, nothing more is written to disk."""
        try:
            yield
        except OSError as error:
            if self.trouble is None:
                self.trouble = " ".join(str(error).split())
                logger.warning(f"Activations are no longer written to disk: {self.trouble}")
