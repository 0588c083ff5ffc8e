"""Rows in an LMDB file without a name, on disk or in memory, which all processes of a host can share."""

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from transformers.utils import logging

from .codec import CHECKSUM_BYTES, HEADER, PackedRow, from_bytes, to_bytes

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

PAGE_HEADER = 16


class Handle(NamedTuple):
    """How another process of the host opens a tier: path of its file, device and inode, and the budget in bytes."""

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
        OSError: the file cannot be used. All methods that read or write raise it, too, where the disk is full or broken.
    """

    def __init__(self, file: int, budget: int, shared: bool = False):
        self.budget = budget
        self._file, self._shared, self._owner = file, shared, os.getpid()
        self._close_file = weakref.finalize(self, os.close, file)
        size = budget + budget // 4 + 2**26
        options = {"subdir": False, "lock": False, "sync": False, "metasync": False, "meminit": False}
        with _as_os_error():
            self._database: lmdb.Environment | None = lmdb.open(f"/dev/fd/{file}", map_size=size, **options)

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
        """Open what another process of this host has made."""
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
        with self._transaction() as transaction:
            return _used(transaction)

    def __len__(self) -> int:
        with self._transaction() as transaction:
            return int(transaction.stat()["entries"])

    def has_room(self, size: int) -> bool:
        """Whether a new row of `size` bytes fits."""
        return self.used + _charge(size) + mmap.PAGESIZE <= self.budget  # the index may need one page more

    def fronts(self, keys: Sequence[bytes]) -> list[int | None]:
        """For each key the front of its row, or `None`, without reading the row."""
        with self._transaction() as transaction:
            views = map(transaction.get, keys)
            return [None if view is None else HEADER.unpack_from(view)[2] for view in views]

    def put(self, rows: Mapping[bytes, PackedRow]) -> set[bytes]:
        """
        Store rows, each in place of what its key holds, which stays where the new row finds no room. Returns the keys of those
        that found room.
        """
        blobs = {key: bytearray(to_bytes(row.to("cpu"), key)) for key, row in rows.items()}
        for blob in blobs.values():
            blob[:CHECKSUM_BYTES] = _checksum(blob)
        kept: set[bytes] = set()
        try:
            with self._transaction(write=True) as transaction:
                for key, blob in blobs.items():
                    before = transaction.get(key)
                    smaller = before is not None and len(blob) <= len(before)
                    size = max(0, _charge(len(blob)) - (0 if before is None else _charge(len(before))))
                    if smaller or _used(transaction) + size + mmap.PAGESIZE <= self.budget:
                        transaction.put(key, blob)
                        kept.add(key)
        except lmdb.MapFullError:  # what is free lies in pieces too small; the whole transaction is undone
            return set()
        return kept

    def read(self, keys: Sequence[bytes]) -> list[PackedRow | None]:
        """The rows under `keys`, or `None`. A row that fails its checksum is forgotten, with one warning."""
        with self._transaction() as transaction:
            # Copied before they are checked, so that no later change to the file reaches the caller.
            views = [transaction.get(key) for key in keys]
            blobs = [None if view is None else bytes(view) for view in views]
        found = list(zip(keys, blobs, strict=True))
        damaged = [
            key for key, blob in found if blob is not None and HEADER.unpack_from(blob)[:2] != (_checksum(blob), key)
        ]
        if damaged:
            logger.warning_once("Activations were damaged on disk; they are dropped and computed anew.")
            with self._transaction(write=True) as transaction:
                for key in damaged:
                    transaction.delete(key)
        return [None if blob is None or key in damaged else from_bytes(blob) for key, blob in found]

    def close(self) -> None:
        """Give up this process's part; the file goes with the last one."""
        # A forked child has inherited the object, but not the file.
        if self._database is not None and os.getpid() == self._owner:
            self._database.close()
            self._close_file()
        self._database = None

    @contextmanager
    def _transaction(self, write: bool = False) -> "Iterator[lmdb.Transaction]":
        if self._database is None:
            raise OSError("it is closed")
        if self._shared:
            # Not `flock`, which a data loader's worker would inherit and hold when this process is killed.
            fcntl.lockf(self._file, fcntl.LOCK_EX if write else fcntl.LOCK_SH)
        try:
            with _as_os_error(), self._database.begin(write=write, buffers=True) as transaction:
                yield transaction
        finally:
            if self._shared:
                fcntl.lockf(self._file, fcntl.LOCK_UN)


def _used(transaction: "lmdb.Transaction") -> int:
    counts = transaction.stat()
    return int(counts["overflow_pages"] + counts["leaf_pages"] + counts["branch_pages"]) * mmap.PAGESIZE


def _charge(size: int) -> int:
    """Bytes of the whole pages that `size` bytes take."""
    return -(-(size + PAGE_HEADER) // mmap.PAGESIZE) * mmap.PAGESIZE


def _identity(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_dev, status.st_ino


def _checksum(blob: bytes | bytearray) -> bytes:
    """Of all that follows the place for it."""
    return xxhash.xxh3_64_digest(memoryview(blob)[CHECKSUM_BYTES:])


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What LMDB calls an error is one of the operating system's to the caller, who need not import LMDB."""
    try:
        yield
    except lmdb.MapFullError:
        raise
    except lmdb.Error as error:
        raise OSError(str(error)) from error
