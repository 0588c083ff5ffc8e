"""One activation store for all ranks of a host: two arenas and an index that every one of them has open. Linux only."""

import fcntl
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers.utils import logging

from .codec import ALIGNMENT, FORMATS, bytes_needed, from_bytes, pack, to_bytes
from .exactness import ANY_SIZE

logger = logging.get_logger(__name__)

MEMORY, DISK = 0, 1
TIERS = ("shared memory", "disk")
# Where a row lies, and of what it holds: `sizes` are those of the batches in which it was computed, first and last.
RECORD = np.dtype(
    [
        ("key", "V16"),
        ("front", "u8"),
        ("start", "u8"),
        ("room", "u8"),
        ("size", "u8"),
        ("depth", "u4"),
        ("sizes", "u4", 2),
        ("tier", "u2"),
        ("whole", "u2"),
    ]
)
HEADER = np.dtype([("count", "u8"), ("used", "u8", 2), ("broken", "u8", 2), ("room", "V24")])
# The index has no memory but for the records that there are.
MOST_ROWS = 2**22
CHECKSUM_BYTES = 8


@dataclass(frozen=True)
class Handle:
    """
    How another process opens a store that this one has made.

    Attributes:
        process (`int`): id of the one that made it.
        files (`list[tuple[int, tuple[int, int]]`): of the index, memory, and disk if there is one: their descriptors
            there, and device and inode, by which they are known.
        budgets (`tuple[int, int]`): bytes in memory and on disk.
        dtype (`str`): format of the rows.
    """

    process: int
    files: list[tuple[int, tuple[int, int]]]
    budgets: tuple[int, int]
    dtype: str


class SharedStore:
    """
    What [`ActivationStore`] is to one process, to all processes of a host that are given its [`Handle`].

    Rows lie one after the other in memory that has no name and in a file that has none, so that nothing is left when the
    last process has gone, however it went. A lock of the operating system, which falls with its holder, lets many
    read or one write; a row counts once it is whole. A row of some key takes the place of the one before, and new room if
    it is bigger; one that is there already is not written again, whoever comes with it.

    What another rank has put is as good as one's own if it comes from the same front and from a batch of a size from
    which bits are the same. Of each, the index tells, and other rows pass for missing.

    Args:
        memory_bytes (`int`): most bytes of rows in memory, all processes together.
        disk_bytes (`int`, *optional*, defaults to `0`): most bytes of rows on disk, all processes together.
        folder (`str` or `os.PathLike`, *optional*): where the file lies. Defaults to that for temporary files.
        dtype (`str`, *optional*, defaults to `"exact"`): format of the rows, as for [`ActivationStore`].

    Attributes:
        fronts (`dict[int, int]`): for each depth whose rows are of use, a number that names what has computed them.
        sizes (`range`): of the batches in which rows may have been computed to be of use.
        made_in (`range`): sizes of the batches in which the rows that are put next were computed.
        found_in (`range`): sizes of the batches in which the rows that `get` found last were computed.
        full (`bool`): whether a row was refused for lack of room.
        trouble (`str`, *optional*): why memory or disk is out of use, in one line, on the rank that saw it.

    Raises:
        ImportError: `disk_bytes` is above 0 and the extra `smartfrz_hf[disk]` is not installed.
        OSError: the system gives no such memory.
    """

    def __init__(
        self, memory_bytes: int, disk_bytes: int = 0, folder: str | os.PathLike | None = None, dtype: str = "exact"
    ):
        if dtype not in FORMATS:
            raise ValueError(f"`dtype` is {dtype!r}; it must be one of {', '.join(map(repr, FORMATS))}.")
        files = [os.memfd_create("smartfrz-index"), os.memfd_create("smartfrz-rows")]
        os.truncate(files[0], HEADER.itemsize + MOST_ROWS * RECORD.itemsize)
        trouble = None
        if disk_bytes:
            try:
                with tempfile.TemporaryFile(dir=None if folder is None else os.fspath(folder)) as file:
                    files.append(os.dup(file.fileno()))
            except OSError as error:
                disk_bytes, trouble = 0, one_line(error)
                logger.warning(f"Activations are not written to disk: {trouble}")
        self._open(files, (memory_bytes, disk_bytes), dtype, trouble)

    @classmethod
    def attach(cls, handle: Handle) -> "SharedStore":
        """
        Open a store that another process of this host has made.

        Raises:
            OSError: it cannot be opened from here.
        """
        files: list[int] = []
        try:
            for descriptor, identity in handle.files:
                files.append(os.open(f"/proc/{handle.process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC))
                if _identity(files[-1]) != identity:
                    raise OSError(f"process {handle.process} has another file there")
        except OSError:
            _close(files)
            raise
        store = cls.__new__(cls)
        store._open(files, handle.budgets, handle.dtype, trouble=None)
        return store

    def _open(self, files: list[int], budgets: tuple[int, int], dtype: str, trouble: str | None) -> None:
        self.fronts: dict[int, int] = {}
        self.sizes, self.made_in, self.found_in = ANY_SIZE, range(1), range(0)
        self.full = False
        self.trouble = trouble
        if budgets[DISK]:
            # Without a disk budget xxhash need not be installed.
            from .disk import checksum

            self._checksum = checksum
        self._files, self._budgets, self._dtype = files, budgets, dtype
        self._numbers: dict[bytes, int] = {}
        self._closed = False
        self._close_files = weakref.finalize(self, _close, files)
        index = mmap.mmap(files[0], 0)
        self._header = np.frombuffer(index, HEADER, 1)
        self._records = np.frombuffer(index, RECORD, offset=HEADER.itemsize)

    @property
    def handle(self) -> Handle:
        """What another process of this host attaches by."""
        files = [(file, _identity(file)) for file in self._files]
        return Handle(os.getpid(), files, self._budgets, self._dtype)

    @property
    def memory_used(self) -> int:
        """Bytes of rows in memory, all processes together. The index takes 64 more a row."""
        return 0 if self._closed else int(self._header["used"][0, MEMORY])

    @property
    def disk_used(self) -> int:
        """Bytes of rows on disk, all processes together."""
        return 0 if self._closed else int(self._header["used"][0, DISK])

    def __len__(self) -> int:
        return 0 if self._closed else int(self._header["count"][0])

    def get(self, keys: Sequence[bytes]) -> list[tuple[int, torch.Tensor] | None]:
        """As [`ActivationStore.get`], of what is of use here."""
        if self._closed:
            return [None] * len(keys)
        with self._locked(fcntl.LOCK_SH):
            records = self._find(keys)
            blobs = [None if record is None else self._read(record) for record in records]
            sizes = [int(size) for record in records if record is not None for size in record["sizes"]]
        self.found_in = range(min(sizes), max(sizes) + 1) if sizes else range(0)
        rows = [None if blob is None else from_bytes(blob, CHECKSUM_BYTES) for blob in blobs]
        return [None if row is None else (row.depth, row.unpack()) for row in rows]

    def depths(self, keys: Sequence[bytes]) -> list[int | None]:
        """As [`ActivationStore.depths`], of what is of use here."""
        if self._closed:
            return [None] * len(keys)
        with self._locked(fcntl.LOCK_SH):
            return [None if record is None else int(record["depth"]) for record in self._find(keys)]

    def put(self, keys: Sequence[bytes], depth: int, rows: Sequence[torch.Tensor]) -> int:
        """As [`ActivationStore.put`]. A row that is there already, of use here and as deep, counts and is left as it is."""
        kept = 0
        if not self._closed:
            blobs: dict[int, bytearray] = {}
            # Made before others have to wait, and only of rows that there is room for.
            for i, (found, key, row) in enumerate(zip(self.depths(keys), keys, rows, strict=True)):
                if found == depth:
                    kept += 1
                elif self._tier_for(key, bytes_needed(row, self._dtype, CHECKSUM_BYTES)) is not None:
                    blobs[i] = to_bytes(pack(row, depth, self._dtype), CHECKSUM_BYTES)
            with self._locked(fcntl.LOCK_EX):
                for i, blob in blobs.items():
                    # Another rank may have put it meanwhile.
                    [record] = self._find([keys[i]])
                    kept += (record is not None and record["depth"] == depth) or self._write(keys[i], depth, blob)
        self.full |= kept < len(keys)
        return kept

    def close(self) -> None:
        """Give this process's part up; from then on every row is refused here. May be called again."""
        if not self._closed:
            self._closed = True
            self._numbers.clear()
            del self._header, self._records
            self._close_files()

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        # Not `flock`, which a data loader's worker would inherit and hold on to when this process is killed.
        fcntl.lockf(self._files[0], how)
        try:
            count = len(self)
            for number in range(len(self._numbers), count):
                self._numbers[self._records["key"][number].tobytes()] = number
            yield
        finally:
            fcntl.lockf(self._files[0], fcntl.LOCK_UN)

    def _find(self, keys: Sequence[bytes]) -> list[np.void | None]:
        """For each key the record of its row, if that is of use here."""
        numbers = [self._numbers.get(key) for key in keys]
        return [None if number is None or not self._is_of_use(number) else self._records[number] for number in numbers]

    def _is_of_use(self, number: int) -> bool:
        record = self._records[number]
        return bool(
            record["whole"]
            and self.fronts.get(int(record["depth"])) == int(record["front"])
            and self.sizes.start <= record["sizes"][0]
            and record["sizes"][1] < self.sizes.stop
        )

    def _read(self, record: np.void) -> bytearray | None:
        """What was written, or `None`, with one warning, if it is damaged."""
        blob = bytearray(int(record["size"]))
        tier = int(record["tier"])
        read = os.preadv(self._files[1 + tier], [blob], int(record["start"]))
        if tier == MEMORY or (read == len(blob) and blob[:CHECKSUM_BYTES] == self._checksum(blob)):
            return blob
        record["whole"] = 0
        logger.warning_once("Activations were damaged on disk; they are dropped and computed anew.")
        return None

    def _tier_for(self, key: bytes, size: int) -> int | None:
        """Where `size` bytes under `key` find room."""
        header, number = self._header[0], self._numbers.get(key)
        if number is not None and size <= self._records[number]["room"]:
            tier = int(self._records[number]["tier"])
            return None if header["broken"][tier] else tier
        if number is None and len(self) == MOST_ROWS:
            return None
        for tier, budget in enumerate(self._budgets):
            if not header["broken"][tier] and header["used"][tier] + _aligned(size) <= budget:
                return tier
        return None

    def _write(self, key: bytes, depth: int, blob: bytearray) -> bool:
        """
        Write a row where it finds room.

        In an order such that a process may be killed between any two lines: nothing but room is lost, and that of one row.
        """
        tier = self._tier_for(key, len(blob))
        if tier is None:
            return False
        count = len(self)
        number = self._numbers.get(key, count)
        record, header = self._records[number], self._header[0]
        if number == count:
            record["key"] = np.void(key)
            record["room"] = 0
        record["whole"] = 0
        if len(blob) > record["room"]:
            record["room"] = 0
            record["tier"], record["start"] = tier, header["used"][tier]
            header["used"][tier] += _aligned(len(blob))
            record["room"] = _aligned(len(blob))
        if tier == DISK:
            blob[:CHECKSUM_BYTES] = self._checksum(blob)
        try:
            _write_all(self._files[1 + tier], blob, int(record["start"]))
        except OSError as error:
            header["broken"][tier] = 1
            self.trouble = one_line(error)
            logger.warning(f"Activations are no longer written to {TIERS[tier]}: {self.trouble}")
            return False
        record["front"], record["depth"], record["size"] = self.fronts[depth], depth, len(blob)
        record["sizes"] = self.made_in[0], self.made_in[-1]
        record["whole"] = 1
        if number == count:
            header["count"] += 1
            self._numbers[key] = number
        return True


def _identity(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_dev, status.st_ino


def _close(files: list[int]) -> None:
    while files:
        os.close(files.pop())


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _write_all(file: int, blob: bytearray, start: int) -> None:
    rest = memoryview(blob)
    while rest:
        written = os.pwrite(file, rest, start)
        rest, start = rest[written:], start + written


def one_line(error: OSError) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())
