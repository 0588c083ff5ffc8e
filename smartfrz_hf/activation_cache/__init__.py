"""The activation cache: what the frozen front of a model returns, kept by the content of each row."""

import os
import shutil
import tempfile

import psutil
from transformers.utils import logging

from ..config import SmartFRZConfig
from ..cost.flops import ComputeMeter
from ..cost.ledger import CacheSavings
from ..distributed.consensus import Ranks
from ..distributed.fsdp import is_sharded
from ..freezing.freezer import Freezer
from .cache import ActivationCache
from .memory_tier import free_bytes
from .sharing import share
from .store import ActivationStore

__all__ = ["ActivationCache", "ActivationStore", "budgets", "make_cache"]

logger = logging.get_logger(__name__)


def make_cache(
    config: SmartFRZConfig,
    freezer: Freezer,
    meter: ComputeMeter | None,
    ranks: Ranks,
    total_steps: int,
    steps_per_epoch: float | None,
    compiled: bool,
    savings: CacheSavings | None = None,
) -> ActivationCache | None:
    """
    The cache that a configuration asks for. To be called on all ranks: those of one host share one store.

    Args:
        config ([`SmartFRZConfig`]): of the run.
        freezer ([`Freezer`]): of the run.
        meter ([`ComputeMeter`], *optional*): told what did not run.
        ranks ([`Ranks`]): of the run.
        total_steps (`int`): optimizer steps of the run.
        steps_per_epoch (`float`, *optional*): optimizer steps in one pass over the data, if known.
        compiled (`bool`): whether the training loop calls a compiled model.
        savings ([`CacheSavings`], *optional*): of an earlier cache of the run, to be added to.

    Returns:
        [`ActivationCache`], or `None` if the configuration asks for none, leaves it no room, or the run cannot have one.
    """
    # Among several processes, rows come again on another accelerator.
    here = ranks.count == 1 and free_bytes(next(freezer.stack.model.parameters()).device)
    beside = float(config.cache_device_memory) if here else 0.0
    if not config.activation_cache or not (beside or config.cache_memory or config.cache_disk):
        return None
    if compiled:
        logger.warning("The activation cache is off: it does not work with `torch.compile`.")
        return None
    if is_sharded(freezer.stack.model):
        logger.warning("The activation cache is off: under FSDP2 all ranks have to run each block together.")
        return None
    if steps_per_epoch is not None and total_steps <= steps_per_epoch:
        logger.info("The activation cache serves evaluation only: no training row comes again in a run of one epoch.")
    memory, disk = budgets(config)
    store: ActivationStore | None = None
    if ranks.count > 1:
        store = share(ranks, memory, disk, config.cache_folder, config.cache_dtype)
        if store is None:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count))
            memory, disk = memory // here, disk // here
    if store is None:
        store = ActivationStore(memory, disk, config.cache_folder, config.cache_dtype, device_memory=beside)
    weights = freezer.weights if config.offload_frozen else None
    return ActivationCache(freezer.stack, store, meter, total_steps, steps_per_epoch, weights, ranks.count, savings)


def budgets(config: SmartFRZConfig) -> tuple[int, int]:
    """
    What the activation cache may use on this machine: bytes of memory, and bytes of disk.

    A folder that cannot be used leaves it no disk, with a warning.

    Args:
        config ([`SmartFRZConfig`]): of the run.
    """
    memory, disk = float(config.cache_memory), float(config.cache_disk)
    if memory < 1:
        memory *= psutil.virtual_memory().available
    if 0 < disk < 1:
        try:
            disk *= shutil.disk_usage(config.cache_folder or tempfile.gettempdir()).free
        except OSError as error:
            logger.warning(f"The activation cache stays in memory, as its folder cannot be used: {error}")
            disk = 0
    return int(memory), int(disk)
