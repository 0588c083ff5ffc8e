"""What crosses the frozen front of a model, kept by the content of each row."""

import os
import shutil
import sys
import tempfile
from typing import TYPE_CHECKING

import psutil
from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from ..config import SmartFRZConfig
from ..cost.flops import ComputeMeter
from ..distributed.consensus import Ranks
from ..distributed.fsdp import is_sharded
from ..freezing.compile import is_compiled
from ..freezing.freezer import Freezer
from .cache import ActivationCache
from .store import ActivationStore

__all__ = ["ActivationCache", "ActivationStore", "make_cache"]

if TYPE_CHECKING:
    from .shared import SharedStore

logger = logging.get_logger(__name__)


def make_cache(
    config: SmartFRZConfig,
    freezer: Freezer,
    meter: ComputeMeter,
    args: TrainingArguments,
    state: TrainerState,
    ranks: Ranks,
) -> ActivationCache | None:
    """
    The cache that a configuration asks for, or `None` if it asks for none or leaves it no room. To be called on all ranks:
    those of one host share one store.
    """
    if not config.activation_cache or not (config.cache_memory or config.cache_disk):
        return None
    if is_compiled(freezer.stack.model, args):
        logger.warning("The activation cache is off: it does not work with `torch.compile`.")
        return None
    if is_sharded(freezer.stack.model):
        logger.warning("The activation cache is off: under FSDP2 all ranks have to run each block together.")
        return None
    memory, disk = config.cache_memory, config.cache_disk
    if memory < 1:
        memory *= psutil.virtual_memory().available
    if 0 < disk < 1:
        try:
            disk *= shutil.disk_usage(config.cache_folder or tempfile.gettempdir()).free
        except OSError as error:
            logger.warning(f"The activation cache stays in memory, as its folder cannot be used: {error}")
            disk = 0
    store: ActivationStore | SharedStore | None = None
    if ranks.count > 1:
        if sys.platform == "linux":
            from .sharing import share

            store = share(ranks, int(memory), int(disk), config.cache_folder, config.cache_dtype)
        if store is None:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count))
            memory, disk = memory / here, disk / here
    if store is None:
        store = ActivationStore(int(memory), int(disk), config.cache_folder, config.cache_dtype)
    rows = state.max_steps * args.gradient_accumulation_steps * args.train_batch_size
    # How long a pass over an iterable dataset is, nobody knows; a quarter of the run is time enough for rows to return.
    passes = state.num_train_epochs if 0 < state.num_train_epochs <= state.max_steps else 4
    weights = freezer.weights if config.offload_frozen else None
    return ActivationCache(freezer.stack, store, meter, config.cache_exact, round(rows / passes), weights, ranks.count)
