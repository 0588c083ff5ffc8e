"""What is refused, each with its remedy."""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import nn
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
