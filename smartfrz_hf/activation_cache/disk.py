"""The part of an activation store that lies on disk: one LMDB file in a folder that goes away with its process."""

import os
import re
import secrets
import shutil
import struct
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from transformers.utils import logging

from .codec import PackedRow, from_bytes, to_bytes

try:
    import fcntl

    import lmdb
    import xxhash
except ImportError as error:
    raise ImportError(
        f"Keeping activations on disk needs the module {error.name!r}: pip install 'smartfrz_hf[disk]' (Unix only), or "
        "leave `disk_bytes` at 0."
    ) from error

logger = logging.get_logger(__name__)

LOCK = "lock"
FILES = ("data.mdb", LOCK)
FOLDER = re.compile(r"smartfrz-cache-\d+-[0-9a-f]{16}")
# The checksum of all that follows, and the key.
HEADER = struct.Struct("<Q16s")
CHECKSUM_BYTES = 8
LMDB_PAGE_HEADER = 16


class DiskTier:
    """
    Rows on disk, each with a checksum.

    The folder is readable by its owner only. It is removed by `close`, when the interpreter exits, or, after a crash,
    by the next one that is made beside it: a live owner holds a lock on a file in it. Nothing is ever synced to the
    device, as a cache need not outlive its machine. In a forked child neither the rows nor the folder may be touched.

    Args:
        budget (`int`): most bytes of rows, each rounded up to whole pages.
        folder (`str` or `os.PathLike`, *optional*): where to make the folder. Defaults to that for temporary files.

    Raises:
        OSError: the folder cannot be made or used.
    """

    def __init__(self, budget: int, folder: str | os.PathLike | None = None):
        self.budget = budget
        self.used = 0
        self._index: dict[bytes, tuple[int, int]] = {}  # depth and charged bytes
        parent = os.fspath(tempfile.gettempdir() if folder is None else folder)
        _sweep(parent)
        self.folder, lock = _claim(parent)
        try:
            with self._lmdb_as_os_error():
                self._database = lmdb.open(
                    self.folder,
                    # Freed pages serve again two transactions later, and rows of many sizes leave gaps.
                    map_size=budget + budget // 4 + 2**26,
                    mode=0o600,
                    # There is one process, and a memory-mapped lock file would kill it on a full disk (SIGBUS).
                    lock=False,
                    sync=False,
                    metasync=False,
                    meminit=False,
                )
                self._page = self._database.stat()["psize"]
        except OSError:
            _dispose(os.getpid(), self.folder, lock)
            raise
        self._dispose = weakref.finalize(self, _dispose, os.getpid(), self.folder, lock, self._database)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def depth(self, key: bytes) -> int | None:
        """The depth of the row under `key`, or `None`. Reads nothing."""
        return self._index[key][0] if key in self else None

    def has_room(self, key: bytes, size: int) -> bool:
        """Whether `size` bytes fit under `key`, in place of what it holds."""
        return self.used - self._charged(key) + self._charge(size) <= self.budget

    def put(self, key: bytes, row: PackedRow) -> bool:
        """
        Store a row in place of what `key` holds, which stays where the row finds no room.

        Returns:
            `bool`: whether it found room.

        Raises:
            OSError: the disk is full or broken.
        """
        blob = _to_blob(key, row)
        if not self.has_room(key, len(blob)):
            return False
        with self._lmdb_as_os_error():
            try:
                with self._database.begin(write=True) as transaction:
                    transaction.put(key, blob)
            except lmdb.MapFullError:
                # What is free lies in pieces too small.
                return False
        self._drop(key)
        charge = self._charge(len(blob))
        self._index[key] = row.depth, charge
        self.used += charge
        return True

    def read(self, keys: Sequence[bytes]) -> list[PackedRow | None]:
        """
        The rows under `keys`, or `None`. A row that fails its checksum is forgotten, with one warning.

        Raises:
            OSError: the file cannot be read.
        """
        rows = []
        with self._lmdb_as_os_error(), self._database.begin(buffers=True) as transaction:
            for key in keys:
                view = transaction.get(key) if key in self else None
                # Copied before it is checked: no later change to the file reaches the caller. The size itself may be
                # damaged, and lead out of the file.
                blob = bytearray() if view is None or len(view) > self._charged(key) else bytearray(view)
                rows.append(_from_blob(key, blob))
        for key, row in zip(keys, rows, strict=True):
            if row is None and key in self:
                logger.warning_once(
                    f"Activations in {self.folder} were damaged on disk; they are dropped and computed anew."
                )
                self.forget(key)
        return rows

    def forget(self, key: bytes) -> None:
        """
        Give up what is under `key`, if anything.

        Raises:
            OSError: the disk is full or broken; it is given up all the same.
        """
        if key in self:
            self._drop(key)
            with self._lmdb_as_os_error(), self._database.begin(write=True) as transaction:
                transaction.delete(key)

    def close(self) -> None:
        """Give up everything and remove the folder. May be called again."""
        self.used = 0
        self._index.clear()
        self._dispose()

    def _charge(self, size: int) -> int:
        """Bytes of the whole pages that `size` bytes take."""
        return -(-(size + LMDB_PAGE_HEADER) // self._page) * self._page

    def _charged(self, key: bytes) -> int:
        return self._index[key][1] if key in self else 0

    def _drop(self, key: bytes) -> None:
        self.used -= self._charged(key)
        self._index.pop(key, None)

    @contextmanager
    def _lmdb_as_os_error(self) -> Iterator[None]:
        """What LMDB calls an error is one of the operating system's to the caller, who need not import LMDB."""
        try:
            yield
        except lmdb.Error as error:
            # What a full disk gives is "Input/output error".
            free = shutil.disk_usage(self.folder).free // 2**20
            raise OSError(f"{str(error).removeprefix(f'{self.folder}: ')} ({self.folder}, {free} MiB free)") from error


def _to_blob(key: bytes, row: PackedRow) -> bytearray:
    """The checksum of all that follows, the key and the row."""
    blob = to_bytes(row, HEADER.size)
    HEADER.pack_into(blob, 0, 0, key)
    blob[:CHECKSUM_BYTES] = checksum(blob)
    return blob


def _from_blob(key: bytes, blob: bytearray) -> PackedRow | None:
    """The row that was written under `key`, sharing the memory of `blob`, or `None` where a bit of it changed."""
    if len(blob) < HEADER.size or blob[:CHECKSUM_BYTES] != checksum(blob) or HEADER.unpack_from(blob)[1] != key:
        return None
    return from_bytes(blob, HEADER.size)


def checksum(blob: bytearray) -> bytes:
    """Of all that follows the place for it."""
    return xxhash.xxh3_64_digest(memoryview(blob)[CHECKSUM_BYTES:])


def _claim(parent: str) -> tuple[str, int]:
    """Make a folder in `parent`. Returns its path and the open lock."""
    name = f"smartfrz-cache-{os.getpid()}-{secrets.token_hex(8)}"
    # Under another name until it is locked, lest a `_sweep` at this moment take it for a dead one's.
    hidden, path = os.path.join(parent, f".{name}"), os.path.join(parent, name)
    os.mkdir(hidden, 0o700)
    try:
        lock = os.open(os.path.join(hidden, LOCK), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(hidden, path)
        except OSError:
            os.close(lock)
            raise
    except OSError:
        _remove(hidden)
        raise
    return path, lock


def _sweep(parent: str) -> None:
    """Remove the folders that dead processes of this user left in `parent`."""
    for name in os.listdir(parent):
        if not FOLDER.fullmatch(name):
            continue
        # Another's, in use, a symbolic link, or just removed: not for us to remove.
        with suppress(OSError), _opened(os.path.join(parent, name), os.O_DIRECTORY) as folder:
            if os.fstat(folder).st_uid != os.geteuid() or not set(os.listdir(folder)) <= set(FILES):
                continue
            with _opened(LOCK, os.O_RDWR, folder) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(os.path.join(parent, name))


@contextmanager
def _opened(path: str, flags: int, folder: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_NOFOLLOW, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove(path: str) -> None:
    """Remove a folder with the files of ours in it; one that holds anything else is left."""
    with suppress(OSError), _opened(path, os.O_DIRECTORY) as folder:
        for name in FILES:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
        os.rmdir(path)


def _dispose(owner: int, path: str, lock: int, database: "lmdb.Environment | None" = None) -> None:
    # A forked child inherits the exit handlers, but not the folder.
    if os.getpid() != owner:
        return
    if database is not None:
        database.close()
    _remove(path)
    os.close(lock)
