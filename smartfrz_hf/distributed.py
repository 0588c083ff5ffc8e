"""Several processes: one decision for all of them, and under DDP and FSDP2 nothing sent for what is frozen."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments
from transformers.utils import logging

from .config import SmartFRZConfig

logger = logging.get_logger(__name__)

DDP_TYPES = ("MULTI_CPU", "MULTI_GPU", "MULTI_HPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_NPU", "MULTI_SDAA", "MULTI_XPU")


def check_engine(args: TrainingArguments, model: nn.Module, config: SmartFRZConfig, with_mixin: bool) -> None:
    """
    Refuse what freezing cannot serve.

    Args:
        args ([`~transformers.TrainingArguments`]): of the run.
        model (`torch.nn.Module`): what the Trainer trains.
        config ([`SmartFRZConfig`]): of the run.
        with_mixin (`bool`): whether [`SmartFRZMixin`] widens the Trainer: it calls [`rebuild_reducer`] after each freeze, and
            loads checkpoints of FSDP2.

    Raises:
        ValueError: the message says why, and what to do instead.
    """
    kind = args.distributed_state.distributed_type
    if args.deepspeed is not None or kind == DistributedType.DEEPSPEED:
        raise ValueError(
            "SmartFRZ cannot freeze under DeepSpeed ZeRO, which fixes what is trained when it starts; use DDP or "
            "a single process instead."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"SmartFRZ does not work with {args.n_gpu} devices in one process (`DataParallel`); start one process a "
            "device with `accelerate launch` or `torchrun`, or show it one device (`CUDA_VISIBLE_DEVICES=0`)."
        )
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "SmartFRZ does not work with a model that `from_pretrained(distributed_config=...)` has sharded; load it whole, and "
            "have Accelerate shard it (FSDP2)."
        )
    if kind == DistributedType.FSDP:
        _check_fsdp(args, config, with_mixin)
        return
    if args.world_size == 1:
        return
    if kind.value not in DDP_TYPES:
        raise ValueError(
            f"This version of smartfrz_hf serves several processes under DDP and FSDP2, not {kind.value}; leave that out, or "
            "the callback."
        )
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        logger.warning_once("Accelerate shards no model on the CPU: this run asks for FSDP and is one of DDP.")
    if with_mixin:
        return
    unused = args.ddp_find_unused_parameters
    if unused is False or (unused is None and args.activation_checkpointing):
        raise ValueError(
            "DDP stops at the first step after a unit froze unless it looks for unused parameters. Use "
            "`SmartFRZTrainer`, or `SmartFRZMixin` over a Trainer of your own; or set `ddp_find_unused_parameters=True`."
        )
    logger.warning(
        "With the callback alone, DDP goes on sending the gradients of frozen units, which are zero. `SmartFRZTrainer`, or "
        "`SmartFRZMixin` over a Trainer of your own, spares that."
    )


def _check_fsdp(args: TrainingArguments, config: SmartFRZConfig, with_mixin: bool) -> None:
    state = AcceleratorState()
    if state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            "SmartFRZ cannot freeze under FSDP1, which flattens the parameters of a block, frozen or not, into one; use FSDP2 "
            "(`fsdp_version: 2`) or DDP instead."
        )
    parallel = state.parallelism_config
    if parallel is not None and parallel.total_size > parallel.dp_shard_size:
        sizes = {name: getattr(parallel, name) for name in ("dp_replicate_size", "tp_size", "cp_size", "sp_size")}
        others = ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        raise ValueError(
            f"SmartFRZ under FSDP2 serves sharding over all processes only, not {others}; set `dp_shard_size` alone above 1."
        )
    if state.fsdp_plugin.activation_checkpointing:
        raise ValueError(
            "SmartFRZ does not work with the activation checkpointing of FSDP's plugin, which wraps the blocks; use "
            "`TrainingArguments(activation_checkpointing=True)` instead."
        )
    if config.frozen_dtype or config.offload_frozen:
        raise ValueError(
            "`frozen_dtype` and `offload_frozen` do not work under FSDP2, which keeps the weights itself; use its own "
            "`mixed_precision` and `cpu_offload` instead."
        )
    if args.torch_compile:
        raise ValueError("SmartFRZ under FSDP2 does not work with `torch_compile`; leave that out, or use DDP.")
    if not with_mixin and args.save_strategy != "no":
        raise ValueError(
            "A plain Trainer cannot load the optimizer state of a checkpoint of FSDP2 in which something is frozen. Use "
            '`SmartFRZTrainer`, or `SmartFRZMixin` over a Trainer of your own; or write no checkpoints (`save_strategy="no"`).'
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds the model's parameters, or some of them."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """
    Make the parameters shards again where FSDP2 has left gathered ones in their place, as it does after a forward pass without
    a backward pass. Does nothing to another model.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_for_backward(model: nn.Module, frozen: set[nn.Module]) -> None:
    """
    Have FSDP2 gather no weights of frozen modules in the backward pass, which it does ahead of need for the block in front of
    the one that runs. Does nothing to another model.

    Args:
        model (`torch.nn.Module`): all of it.
        frozen (`set[torch.nn.Module]`): the modules that no backward work reaches.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            together = module._get_fsdp_state()._modules  # modules whose weights are gathered at once
            module.set_unshard_in_backward(not frozen.issuperset(together))


class Ranks:
    """
    Brings the ranks of a run to one answer. Does nothing in a run of one process.

    What is agreed on crosses a group of its own on the CPU, so that no accelerator has to wait and a rank that has died is
    an error with its number, whatever backend the gradients take.

    Args:
        timeout (`float`): seconds that ranks wait for each other.
    """

    def __init__(self, timeout: float):
        self._timeout = timedelta(seconds=timeout)
        self.count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self._group: Any = None
        if self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    def agree(self, value: int, about: str) -> int:
        """
        The value of rank 0, on all ranks.

        Args:
            value (`int`): what this rank would say.
            about (`str`): what it is about, for the error.

        Raises:
            RuntimeError: a rank has not answered in time, or has died; the message has its number where it is known.
        """
        if self.count == 1:
            return value
        word = torch.tensor([value])
        with self._answering(about):
            dist.broadcast(word, src=0, group=self._group)
        return int(word)

    def gather(self, value: Any, about: str) -> list[Any]:
        """
        What each rank says, on all ranks.

        Args:
            value (`Any`): what this rank says; can be pickled.
            about (`str`): what it is about, for the error.

        Raises:
            RuntimeError: as for `agree`.
        """
        values = [value] * self.count
        if self.count > 1:
            with self._answering(about):
                dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def _answering(self, about: str) -> Iterator[None]:
        """Wait for all ranks; what goes wrong is said with the number of the rank."""
        try:
            dist.monitored_barrier(self._group, timeout=self._timeout)
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"Rank {dist.get_rank()} of {self.count} had no answer from another rank on {about}: {error}"
            ) from error

    def close(self) -> None:
        """Give the group back."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group, self.count = None, 1


def rebuild_reducer(model: nn.Module) -> bool:
    """
    Have DDP send the gradients of those parameters only that ask for one now. To be called on all ranks, between two steps.

    The wrapper stays the same object, which a training loop holds on to; its own means of coming back from a pickle make
    the new reducer. Communication hooks, and those that a compiler or an optimizer has put on gradients, are kept.

    Args:
        model (`torch.nn.Module`): what the training loop calls; nothing happens unless it is DDP's wrapper.

    Returns:
        `bool`: whether there was a reducer to rebuild.
    """
    ddp = getattr(model, "_orig_mod", model)  # what `torch.compile` wraps
    if not isinstance(ddp, DistributedDataParallel):
        return False
    hooks, ddp._comm_hooks = list(ddp._comm_hooks), []
    ddp._remove_autograd_hooks()
    ddp.__setstate__(ddp.__getstate__())
    ddp._has_rebuilt_buckets = False
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)
    return True
