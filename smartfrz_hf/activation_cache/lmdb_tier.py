"""Rows in an LMDB file without a name, on disk or in memory, which all processes of a host can share."""

import mmap
import os
import struct
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from transformers.utils import logging

from .codec import PackedRow, from_bytes, front_of, to_bytes

try:
    import fcntl

    import lmdb
    import xxhash
except ImportError as error:
    raise ImportError(
        f"Activations on disk, or shared by several processes, need the module {error.name!r}: pip install 'smartfrz_hf[disk]' "
        "(Unix only). Or leave `cache_disk` at 0."
    ) from error

logger = logging.get_logger(__name__)

# The checksum of all that follows, and the key.
HEADER = struct.Struct("<Q16s")
CHECKSUM_BYTES = 8
PAGE_HEADER = 16


@dataclass(frozen=True)
class Handle:
    """
    How another process of the same host opens a tier.

    Attributes:
        path (`str`): of the file, through the process that has made it.
        identity (`tuple[int, int]`): its device and inode, so that no other file is taken for it.
        budget (`int`): most bytes of rows.
    """

    path: str
    identity: tuple[int, int]
    budget: int


class LmdbTier:
    """
    Rows in one LMDB file, each with a checksum; a batch is one transaction.

    The file has no name, so nothing is left of it when the last process has ended, however it ended. It is never synced to the
    device. LMDB's own locks need a file with a name; a lock of the operating system stands in for them, which many readers or
    one writer hold, and which ends with its holder. A writer that is killed leaves what was there before its transaction.

    Args:
        file (`int`): descriptor of the file, which belongs to the tier from now on.
        budget (`int`): most bytes of rows, each rounded up to whole pages. As replaced rows leave gaps, the file may grow a
            quarter and 64 MiB beyond.
        shared (`bool`, *optional*, defaults to `False`): whether other processes open it.

    Raises:
        OSError: the file cannot be used.
    """

    def __init__(self, file: int, budget: int, shared: bool = False):
        self.budget = budget
        self._file, self._shared, self._owner = file, shared, os.getpid()
        self._close_file = weakref.finalize(self, os.close, file)
        with _as_os_error():
            self._database: lmdb.Environment | None = lmdb.open(
                f"/dev/fd/{file}",
                map_size=budget + budget // 4 + 2**26,
                subdir=False,
                lock=False,
                sync=False,
                metasync=False,
                meminit=False,
            )

    @classmethod
    def in_memory(cls, budget: int) -> "LmdbTier":
        """In memory that other processes can open. Linux only."""
        return cls(os.memfd_create("smartfrz-activations"), budget, shared=True)

    @classmethod
    def on_disk(cls, budget: int, folder: str | os.PathLike | None = None, shared: bool = False) -> "LmdbTier":
        """In `folder`, by default that for temporary files."""
        with tempfile.TemporaryFile(dir=None if folder is None else os.fspath(folder)) as file:
            return cls(os.dup(file.fileno()), budget, shared)

    @classmethod
    def attach(cls, handle: Handle) -> "LmdbTier":
        """
        Open what another process of this host has made.

        Raises:
            OSError: it cannot be opened from here.
        """
        file = os.open(handle.path, os.O_RDWR | os.O_CLOEXEC)
        if _identity(file) != handle.identity:
            os.close(file)
            raise OSError(f"{handle.path} is another file by now")
        return cls(file, handle.budget, shared=True)

    @property
    def handle(self) -> Handle:
        """What another process of this host attaches by."""
        return Handle(f"/proc/{os.getpid()}/fd/{self._file}", _identity(self._file), self.budget)

    @property
    def used(self) -> int:
        """Bytes of rows, in whole pages, by all processes together."""
        if self._database is None:
            return 0
        with self._reading() as transaction:
            return _pages(transaction) * mmap.PAGESIZE

    def __len__(self) -> int:
        if self._database is None:
            return 0
        with self._reading() as transaction:
            return int(transaction.stat()["entries"])

    def has_room(self, size: int) -> bool:
        """Whether a new row of `size` bytes fits."""
        return self.used + _charge(size) <= self.budget

    def fronts(self, keys: Sequence[bytes]) -> list[int | None]:
        """For each key the front of its row, or `None`, without reading the row."""
        if self._database is None:
            return [None] * len(keys)
        with self._reading() as transaction:
            views = [transaction.get(key) for key in keys]
            return [None if view is None else front_of(view, HEADER.size) for view in views]

    def put(self, rows: Mapping[bytes, PackedRow]) -> set[bytes]:
        """
        Store rows, each in place of what its key holds. What is there stays where the new row finds no room.

        Returns:
            `set[bytes]`: keys of the rows that found room.

        Raises:
            OSError: the disk is full or broken.
        """
        blobs = {key: _to_blob(key, row) for key, row in rows.items()}
        kept: set[bytes] = set()
        try:
            with self._locked(fcntl.LOCK_EX), _as_os_error(), self._open.begin(write=True) as transaction:
                used = _pages(transaction) * mmap.PAGESIZE
                for key, blob in blobs.items():
                    before = transaction.get(key)
                    size = _charge(len(blob)) - (0 if before is None else _charge(len(before)))
                    if size <= 0 or used + size <= self.budget:
                        transaction.put(key, blob)
                        used += size
                        kept.add(key)
        except lmdb.MapFullError:
            # What is free lies in pieces too small. The whole transaction is undone.
            return set()
        return kept

    def read(self, keys: Sequence[bytes]) -> list[PackedRow | None]:
        """
        The rows under `keys`, or `None`. A row that fails its checksum is forgotten, with one warning.

        Raises:
            OSError: the file cannot be read.
        """
        if self._database is None:
            return [None] * len(keys)
        with self._reading() as transaction:
            # Copied before they are checked, so that no later change to the file reaches the caller.
            blobs = [None if view is None else bytearray(view) for view in map(transaction.get, keys)]
        rows = [None if blob is None else _from_blob(key, blob) for key, blob in zip(keys, blobs, strict=True)]
        damaged = [key for key, blob, row in zip(keys, blobs, rows, strict=True) if blob is not None and row is None]
        if damaged:
            logger.warning_once("Activations were damaged on disk; they are dropped and computed anew.")
            with self._locked(fcntl.LOCK_EX), _as_os_error(), self._open.begin(write=True) as transaction:
                for key in damaged:
                    transaction.delete(key)
        return rows

    def close(self) -> None:
        """Give up this process's part; the file goes with the last one. May be called again."""
        if self._database is not None:
            # A forked child has inherited the object, but not the file.
            if os.getpid() == self._owner:
                self._database.close()
                self._close_file()
            self._database = None

    @property
    def _open(self) -> "lmdb.Environment":
        if self._database is None:
            raise OSError("it is closed")
        return self._database

    @contextmanager
    def _reading(self) -> "Iterator[lmdb.Transaction]":
        with self._locked(fcntl.LOCK_SH), _as_os_error(), self._open.begin(buffers=True) as transaction:
            yield transaction

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        if not self._shared:
            yield
            return
        # Not `flock`, which a data loader's worker would inherit and hold on to when this process is killed.
        fcntl.lockf(self._file, how)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)


def _pages(transaction: "lmdb.Transaction") -> int:
    counts = transaction.stat()
    return int(counts["overflow_pages"] + counts["leaf_pages"] + counts["branch_pages"])


def _charge(size: int) -> int:
    """Bytes of the whole pages that `size` bytes take."""
    return -(-(size + PAGE_HEADER) // mmap.PAGESIZE) * mmap.PAGESIZE


def _identity(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_dev, status.st_ino


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What LMDB calls an error is one of the operating system's to the caller, who need not import LMDB."""
    try:
        yield
    except lmdb.MapFullError:
        raise
    except lmdb.Error as error:
        raise OSError(str(error)) from error


def _to_blob(key: bytes, row: PackedRow) -> bytearray:
    """The checksum of all that follows, the key and the row."""
    blob = to_bytes(row, HEADER.size)
    HEADER.pack_into(blob, 0, 0, key)
    blob[:CHECKSUM_BYTES] = _checksum(blob)
    return blob


def _from_blob(key: bytes, blob: bytearray) -> PackedRow | None:
    """The row that was written under `key`, sharing the memory of `blob`, or `None` where a bit of it changed."""
    if len(blob) < HEADER.size or blob[:CHECKSUM_BYTES] != _checksum(blob) or HEADER.unpack_from(blob)[1] != key:
        return None
    return from_bytes(blob, HEADER.size)


def _checksum(blob: bytearray) -> bytes:
    return xxhash.xxh3_64_digest(memoryview(blob)[CHECKSUM_BYTES:])
