"""Rows in the memory of one process: that of the host, or that of the accelerator."""

from collections.abc import Mapping, Sequence

import torch

from .codec import PackedRow


class MemoryTier:
    """
    Rows in the memory of one process.

    Args:
        budget (`int`): most bytes of rows.
        device (`torch.device`, *optional*): where the rows are. Defaults to the CPU.
    """

    def __init__(self, budget: int, device: torch.device | None = None):
        self.budget, self.used = budget, 0
        self.device = torch.device("cpu") if device is None else device
        self._rows: dict[bytes, PackedRow] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def has_room(self, size: int) -> bool:
        """Whether a new row of `size` bytes fits."""
        return self.used + size <= self.budget

    def fronts(self, keys: Sequence[bytes]) -> list[int | None]:
        """For each key the front of its row, or `None`."""
        rows = [self._rows.get(key) for key in keys]
        return [None if row is None else row.front for row in rows]

    def put(self, rows: Mapping[bytes, PackedRow]) -> set[bytes]:
        """Store rows, each in place of what its key holds; returns the keys of those that found room."""
        kept = set()
        for key, row in rows.items():
            size = row.nbytes - (self._rows[key].nbytes if key in self._rows else 0)
            if size <= 0 or self.has_room(size):
                self._rows[key] = row.to(self.device)
                self.used += size
                kept.add(key)
        return kept

    def read(self, keys: Sequence[bytes]) -> list[PackedRow | None]:
        """The rows under `keys`, or `None`."""
        return [self._rows.get(key) for key in keys]

    def close(self) -> None:
        """Forget all rows."""
        self._rows.clear()
        self.used = self.budget = 0


class DeviceTier(MemoryTier):
    """
    Rows in the memory of the accelerator, where looking them up takes next to no time.

    What is free there changes, as training takes what it needs, so the budget is found anew for each batch. Rows that are
    there stay.

    Args:
        device (`torch.device`): of the model.
        share (`float`): most bytes; below 1 a fraction of what would be free without the rows.
    """

    def __init__(self, device: torch.device, share: float):
        super().__init__(0, device)
        self._share = share

    def look(self) -> None:
        """Find the budget."""
        free = free_bytes(self.device) + self.used
        self.budget = int(min(free, self._share) if self._share >= 1 else self._share * free)


def free_bytes(device: torch.device) -> int:
    """Bytes of an accelerator that no process has taken; `0` where it does not tell."""
    ask = getattr(getattr(torch, device.type, None), "mem_get_info", None)
    return 0 if ask is None else ask(device)[0]
