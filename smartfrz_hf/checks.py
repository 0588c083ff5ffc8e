"""What is refused, each with its remedy."""

from numbers import Integral, Real
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments
from transformers.utils import logging

from ._compat import checkpoints_activations, joins_uneven_inputs, other_parallel_sizes
from .config import SmartFRZConfig
from .model.units import BlockStack

logger = logging.get_logger(__name__)

DDP_TYPES = ("MULTI_CPU", "MULTI_GPU", "MULTI_HPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_NPU", "MULTI_SDAA", "MULTI_XPU")
# What has to be the same in a configuration for a run to go on from a checkpoint.
HISTORY_FIELDS = ("policy", "record_every", "sampling_seed", "blocks", "stem")


def check_stack(stack: BlockStack) -> None:
    """
    Refuse a model in which nothing is left to freeze.

    Raises:
        ValueError: no unit has a trainable parameter.
    """
    if not any(unit.trainable for unit in stack.units):
        raise ValueError(
            f"All {len(stack)} units of {type(stack.model).__name__} are frozen already, so SmartFRZ has nothing to "
            "freeze. Remove the callback, or let some parameters require gradients."
        )


def check_other_run(model: nn.Module, other: Any) -> None:
    """
    Refuse a second run on a model that another one freezes now.

    Args:
        model (`torch.nn.Module`): the unwrapped model.
        other ([`FreezingRun`], *optional*): the run that freezes it.

    Raises:
        ValueError: there is one.
    """
    if other is not None:
        raise ValueError(
            f"SmartFRZ already freezes this {type(model).__name__}. Use one `SmartFRZCallback`, one `SmartFRZTrainer` or "
            "one `FreezingRun` for a model at a time: remove the second one, or close the first one (`run.close()`, "
            "`callback.release()`)."
        )


def check_loop(model: nn.Module, optimizer: Any, total_steps: int, lr_scheduler: Any) -> None:
    """
    Refuse what no training loop can go with. An optimizer without any of the model's parameters is worth a warning.

    Args:
        model (`torch.nn.Module`): the unwrapped model.
        optimizer (`torch.optim.Optimizer`): plain or prepared by Accelerate.
        total_steps (`int`): optimizer steps of the run.
        lr_scheduler (`torch.optim.lr_scheduler.LRScheduler`, *optional*): plain or prepared by Accelerate.

    Raises:
        TypeError: the optimizer or the scheduler is none.
        ValueError: `total_steps` is no whole number from 1 on.
    """
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"`optimizer` is a {type(optimizer).__name__}; it must be a `torch.optim.Optimizer`.")
    if lr_scheduler is not None and not hasattr(lr_scheduler, "step"):
        raise TypeError(
            f"`lr_scheduler` is {lr_scheduler!r}; it must be a `torch.optim.lr_scheduler.LRScheduler`, or left out if the "
            "learning rate is constant."
        )
    if not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(
            f"`total_steps` is {total_steps!r}; it must be the whole number of optimizer steps of the run."
        )
    parameters = set(model.parameters())
    if not any(p in parameters for group in optimizer.param_groups for p in group["params"]):
        logger.warning(
            f"The optimizer holds no parameter of this {type(model).__name__}. Pass the optimizer that trains it: SmartFRZ "
            "counts its steps."
        )


def check_lengths(steps_per_epoch: float | None, batches_per_step: int, timeout: float) -> None:
    """
    Refuse numbers of a loop that cannot be.

    Args:
        steps_per_epoch (`float`, *optional*): optimizer steps in one pass over the data, if known.
        batches_per_step (`int`): of one optimizer step.
        timeout (`float`): seconds.

    Raises:
        ValueError: one of them is no number above 0, or `batches_per_step` is not whole.
    """
    values = {"steps_per_epoch": steps_per_epoch, "batches_per_step": batches_per_step, "timeout": timeout}
    for name, value in values.items():
        whole = name == "batches_per_step"
        if (value is not None or name != "steps_per_epoch") and not (
            isinstance(value, Integral if whole else Real) and value > 0
        ):
            raise ValueError(f"`{name}` is {value!r}; it must be a {'whole ' if whole else ''}number above 0.")


def check_only_callback(count: int) -> None:
    """
    Refuse a second callback in one Trainer.

    Args:
        count (`int`): how many [`SmartFRZCallback`]s it has.

    Raises:
        ValueError: more than one.
    """
    if count > 1:
        raise ValueError(
            "The Trainer has two `SmartFRZCallback`s, which would freeze the model twice. Pass one callback to a plain "
            "Trainer, or none to a `SmartFRZTrainer`, which has its own (`SmartFRZTrainer(..., smartfrz=...)`)."
        )


def check_even_inputs(model: nn.Module) -> None:
    """
    Refuse a loop in which some processes have fewer batches than others.

    Args:
        model (`torch.nn.Module`): what the training loop calls.

    Raises:
        ValueError: it is within `join()`.
    """
    if joins_uneven_inputs(model):
        raise ValueError(
            "SmartFRZ does not work within `join()` (`join_uneven_inputs`): all processes decide together, and one that has no "
            "more batches would not answer. Give all of them equally many (`drop_last=True`, or `even_batches=True` in Accelerate)."
        )


def check_wrapper(model: nn.Module) -> None:
    """
    Refuse a wrapper that freezing cannot work with.

    Args:
        model (`torch.nn.Module`): what the training loop calls.

    Raises:
        ValueError: it is `DataParallel`, DDP with a static graph, or a model that `from_pretrained` has sharded.
    """
    if isinstance(model, nn.DataParallel):
        _refuse_data_parallel(len(model.device_ids))
    if isinstance(model, DistributedDataParallel) and model.static_graph:
        raise ValueError(
            "SmartFRZ does not work with DDP's static graph, which fixes what is trained in the first step: ranks would "
            "drift apart after a freeze. Leave out `ddp_static_graph=True` (`static_graph=True`)."
        )
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "SmartFRZ does not work with a model that `from_pretrained(distributed_config=...)` has sharded. Load it "
            "whole, and let Accelerate shard it (FSDP2)."
        )


def _refuse_data_parallel(devices: int) -> None:
    raise ValueError(
        f"SmartFRZ does not work with {devices} devices in one process (`DataParallel`). Start one process per device "
        "with `accelerate launch` or `torchrun`, or show it one device (`CUDA_VISIBLE_DEVICES=0`)."
    )


def check_trainer(args: TrainingArguments, model: nn.Module, config: SmartFRZConfig, with_mixin: bool) -> None:
    """
    Refuse what freezing cannot work with in a Trainer.

    Args:
        args ([`~transformers.TrainingArguments`]): of the run.
        model (`torch.nn.Module`): what the Trainer trains.
        config ([`SmartFRZConfig`]): of the run.
        with_mixin (`bool`): whether the Trainer has [`SmartFRZMixin`], which knows the DDP wrapper and loads checkpoints
            of FSDP2.

    Raises:
        ValueError: the message says why, and what to do instead.
    """
    kind = args.distributed_state.distributed_type
    if args.deepspeed is not None or kind == DistributedType.DEEPSPEED:
        raise ValueError(
            "SmartFRZ cannot freeze under DeepSpeed ZeRO, which fixes the trained parameters when it starts. Use DDP, "
            "FSDP2 or a single process."
        )
    if args.n_gpu > 1:
        _refuse_data_parallel(args.n_gpu)
    check_wrapper(model)
    if getattr(args, "enable_jit_checkpoint", False) and not with_mixin:  # not in every version of Transformers
        raise ValueError(
            "`enable_jit_checkpoint=True` saves checkpoints of which no callback is told, so the state of SmartFRZ would not be in "
            "them. Use `SmartFRZTrainer`, or add `SmartFRZMixin` to your own Trainer class; or leave it out."
        )
    if kind == DistributedType.FSDP:
        _check_fsdp(args, config, with_mixin)
    elif args.world_size > 1:
        _check_ddp(args, kind, with_mixin)


def _check_ddp(args: TrainingArguments, kind: DistributedType, with_mixin: bool) -> None:
    if kind.value not in DDP_TYPES:
        raise ValueError(
            f"SmartFRZ works with several processes under DDP and FSDP2, not {kind.value}. Use one of those, or remove "
            "the callback."
        )
    if getattr(args, "ddp_static_graph", False):  # not in every version of Transformers
        raise ValueError(
            "SmartFRZ does not work with `ddp_static_graph=True`, which fixes what is trained in the first step: ranks "
            "would drift apart after a freeze. Leave it out."
        )
    if args.should_log and (args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")):
        logger.warning_once("Accelerate does not shard models on the CPU: this run asks for FSDP and uses DDP.")
    if with_mixin:
        return
    unused = args.ddp_find_unused_parameters
    if unused is False or (unused is None and checkpoints_activations(args)):
        raise ValueError(
            "DDP stops at the first step after a freeze unless it looks for unused parameters. Use `SmartFRZTrainer`, or "
            "add `SmartFRZMixin` to your own Trainer class; or set `ddp_find_unused_parameters=True`."
        )
    if args.should_log:  # once a machine
        logger.warning(
            "With the callback alone, DDP keeps sending the gradients of frozen units, which are zero. `SmartFRZTrainer`, or "
            "`SmartFRZMixin` in your own Trainer class, avoids that."
        )


def _check_fsdp(args: TrainingArguments, config: SmartFRZConfig, with_mixin: bool) -> None:
    state = AcceleratorState()
    if state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            "SmartFRZ cannot freeze under FSDP1, which flattens the parameters of a block into one, frozen or not. Use "
            "FSDP2 (`fsdp_version: 2`) or DDP."
        )
    parallel = state.parallelism_config
    if parallel is not None and parallel.total_size > parallel.dp_shard_size:
        others = ", ".join(f"{name}={size}" for name, size in other_parallel_sizes(parallel).items() if size > 1)
        raise ValueError(
            f"Under FSDP2, SmartFRZ works with sharding over all processes only, not {others}. Set `dp_shard_size` alone "
            "above 1."
        )
    if state.fsdp_plugin.activation_checkpointing:
        raise ValueError(
            "SmartFRZ does not work with the activation checkpointing of FSDP's plugin, which wraps the blocks. Use "
            "`TrainingArguments(activation_checkpointing=True)`."
        )
    if config.frozen_dtype or config.offload_frozen:
        raise ValueError(
            "`frozen_dtype` and `offload_frozen` do not work under FSDP2, which manages the weights itself. Use its own "
            "`mixed_precision` and `cpu_offload`."
        )
    if args.torch_compile:
        raise ValueError("Under FSDP2, SmartFRZ does not work with `torch_compile`. Leave it out, or use DDP.")
    if not with_mixin and args.save_strategy != "no":
        raise ValueError(
            "A plain Trainer cannot load the optimizer state of an FSDP2 checkpoint in which something is frozen. Use "
            '`SmartFRZTrainer`, or add `SmartFRZMixin` to your own Trainer class; or set `save_strategy="no"`.'
        )


def check_restart(args: TrainingArguments, frozen: int) -> None:
    """
    Refuse to start again with a smaller batch after units froze, without the mixin under DDP.

    Raises:
        RuntimeError: DDP was told to leave out what had frozen, and cannot be told otherwise.
    """
    if frozen and args.auto_find_batch_size and args.world_size > 1:
        raise RuntimeError(
            "The Trainer starts again with a smaller batch, but DDP was told to leave out what had frozen. Use "
            "`SmartFRZTrainer`, or add `SmartFRZMixin` to your own Trainer class; or set `auto_find_batch_size=False`."
        )


def check_state(
    state: dict[str, Any], units: list[str], history_shape: tuple[int, ...] | None, config: dict[str, Any]
) -> None:
    """
    Refuse a state that a run cannot go on from. Differences in the configuration that do no harm are logged.

    Args:
        state (`dict`): as [`FreezingRun.state_dict`] gives it.
        units (`list[str]`): names of the model's units.
        history_shape (`tuple[int, ...]`, *optional*): of the weight history that the policy needs, if it needs one.
        config (`dict`): of the run, as [`SmartFRZConfig.to_dict`] gives it.

    Raises:
        ValueError: the message says what differs, and what helps.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(
            f"This run cannot go on from the saved SmartFRZ state: {what}. Resume with the model and the configuration "
            "that the run was started with, or delete smartfrz_state.json from the checkpoint to go on with nothing frozen."
        )

    if state is None:
        raise ValueError(
            "There is no saved SmartFRZ state to go on from: `load_state` gives None for a folder without smartfrz_state.json. "
            "Check the folder, or leave out `load_state_dict` to begin with nothing frozen."
        )
    if not isinstance(state, dict) or "units" not in state:
        raise refuse(f"it is {state!r}, which `FreezingRun.state_dict` never gives")
    if state["units"] != units or not 0 <= state["depth"] <= len(units):
        raise refuse(
            f"its model has the units {state['units']}, of which {state['depth']} are frozen; this one has {units}"
        )
    other = {key: value for key, value in state["config"].items() if config.get(key, value) != value}
    for key in HISTORY_FIELDS:
        if key in other:
            raise refuse(f"`{key}` was {other[key]!r} and is {config[key]!r} now")
    history = state["weight_history"]
    shape = None if history is None else tuple(history["snapshots"].shape)
    if shape != history_shape:
        raise refuse(f"its weight history has the shape {shape}, but the policy needs {history_shape}")
    if other:
        changed = ", ".join(f"`{key}` was {value!r} and is {config[key]!r}" for key, value in other.items())
        logger.warning(f"The run goes on with a different configuration than it was started with: {changed}.")
