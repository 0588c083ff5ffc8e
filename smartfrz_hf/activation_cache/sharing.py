"""One activation store for all ranks of a host."""

import os
import socket
from pathlib import Path

import torch.distributed as dist
from transformers.utils import logging

from ..distributed.consensus import Ranks
from .store import ActivationStore

logger = logging.get_logger(__name__)


def share(ranks: Ranks, memory_bytes: int, disk_bytes: int, folder: str | None, dtype: str) -> ActivationStore | None:
    """
    One store for all ranks of this host. To be called on all ranks of all hosts.

    Args:
        ranks ([`Ranks`]): of the run.
        memory_bytes (`int`): as for [`ActivationStore`], and so are the others. The first rank of a host decides.
        disk_bytes (`int`): most bytes on disk.
        folder (`str`, *optional*): where the file is.
        dtype (`str`): format of the rows.

    Returns:
        [`ActivationStore`], or `None` on all ranks of a host that cannot share.
    """
    about = "the activation cache"
    hosts = ranks.gather(_host(), about)
    here = [rank for rank, host in enumerate(hosts) if host == hosts[dist.get_rank()]]
    store, reason = None, "no process may open the files of another one"
    try:
        if dist.get_rank() == here[0]:
            store = ActivationStore(memory_bytes, disk_bytes, folder, dtype, shared=True)
    except (AttributeError, ImportError, OSError) as error:  # no such memory outside Linux
        reason = " ".join(str(error).split())
    handles = ranks.gather(None if store is None else store.handles, about)[here[0]]
    try:
        if store is None and handles is not None:
            store = ActivationStore.attach(handles, dtype)
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
    if all(ok for rank, ok in enumerate(ranks.gather(store is not None, about)) if rank in here):
        return store
    if store is not None:
        store.close()
    else:
        logger.warning(f"Each rank keeps activations of its own, in its part of the budget: {reason}")
    return None


def _host() -> tuple[str, int]:
    """The same in all processes that can open each other's files, and nowhere else."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(), os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return socket.gethostname(), 0
