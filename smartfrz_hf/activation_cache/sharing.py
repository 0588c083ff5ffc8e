"""Which ranks share an activation store, and how they come to it."""

import os
import socket
from pathlib import Path

import torch.distributed as dist
from transformers.utils import logging

from ..distributed.consensus import Ranks
from .shared import SharedStore, one_line

logger = logging.get_logger(__name__)


def share(ranks: Ranks, memory_bytes: int, disk_bytes: int, folder: str | None, dtype: str) -> SharedStore | None:
    """
    One store for all ranks of this host. To be called on all ranks of all hosts.

    Args:
        ranks ([`Ranks`]): of the run.
        memory_bytes (`int`): as for [`SharedStore`], and so are the others; the first rank of a host decides.
        disk_bytes (`int`): most bytes on disk.
        folder (`str`, *optional*): where the file lies.
        dtype (`str`): format of the rows.

    Returns:
        [`SharedStore`], or `None` on all ranks of a host where they cannot share.

    Raises:
        ImportError: `disk_bytes` is above 0 and the extra `smartfrz_hf[disk]` is not installed.
    """
    if disk_bytes:
        from . import disk  # noqa: F401  (what is missing is missed on all ranks, before any waits for another)
    about = "the activation cache"
    hosts = ranks.gather(_host(), about)
    here = [rank for rank, host in enumerate(hosts) if host == hosts[dist.get_rank()]]
    store, error = None, "the system lets no process into another's memory"
    if dist.get_rank() == here[0]:
        try:
            store = SharedStore(memory_bytes, disk_bytes, folder, dtype)
        except OSError as reason:
            error = one_line(reason)
    handle = ranks.gather(None if store is None else store.handle, about)[here[0]]
    if store is None and handle is not None:
        try:
            store = SharedStore.attach(handle)
        except OSError as reason:
            error = one_line(reason)
    shared = ranks.gather(store is not None, about)
    if all(shared[rank] for rank in here):
        return store
    if store is not None:
        store.close()
    else:
        logger.warning(f"Each rank keeps activations of its own, in its part of the budget: {error}.")
    return None


def _host() -> tuple[str, int]:
    """What is the same in all processes that can open each other's files, and nowhere else."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(), os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return socket.gethostname(), 0
