"""
Every private name of torch, Transformers and Accelerate that this package uses, and every name that differs by version.

No other module of the package may use one; `tests/test_compat.py` checks it. One small function each, which says why no public
name serves.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import ParallelismConfig
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

# Only the type checker has to know which methods a mixin over the Trainer can rely on.
if TYPE_CHECKING:
    _TrainerBase = Trainer
else:
    _TrainerBase = object

# torch: modules and tensors


def tensor_tables(module: nn.Module) -> tuple[dict[str, nn.Parameter | None], dict[str, torch.Tensor | None]]:
    """
    The parameters and buffers of one module, without its children, as the live dictionaries that the module itself uses.

    `named_parameters` and `named_buffers` walk the module again at each call. The activation cache looks at all frozen tensors
    in each step, and has to see a tensor that was replaced.
    """
    return module._parameters, module._buffers


def tensor_version(tensor: torch.Tensor) -> int:
    """How often the tensor was changed in place. There is no public name for it."""
    return tensor._version


def has_gradient_hook(tensor: torch.Tensor) -> bool:
    """Whether `register_hook` was called on the tensor. There is no public name for it."""
    return bool(tensor._backward_hooks)


def written_arguments(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes to, tensors or lists of them. torch tells only in the operation's schema."""
    schema = function._schema
    return [
        args[position] if position < len(args) else kwargs.get(argument.name)
        for position, argument in enumerate(schema.arguments if schema.is_mutable else ())
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def forward_hooks(module: nn.Module) -> list[Callable]:
    """Forward hooks and pre-hooks of one module, in the order of their registration. torch has no name to list them."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def has_global_forward_hooks() -> bool:
    """Whether somebody has registered forward hooks or pre-hooks for all modules. torch has no name to list them."""
    everywhere = torch.nn.modules.module
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)


def without_torch_function() -> AbstractContextManager[None]:
    """Run operations on subclasses of `torch.Tensor` without their `__torch_function__`. Its documentation has no other name for it."""
    return torch._C.DisableTorchFunctionSubclass()


# torch.compile


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` has wrapped, or `model` itself. There is no public way from the wrapper to it."""
    return getattr(model, "_orig_mod", model)


def is_compiled(module: nn.Module) -> bool:
    """Whether this very module is compiled, by `torch.compile(module)` or by `module.compile()`. torch does not tell."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def compile_settings() -> Any:
    """
    What holds `recompile_limit` and `accumulated_recompile_limit`, the graphs that `torch.compile` makes of one function before it
    gives up. `torch.compiler` has no name for them.
    """
    return torch._dynamo.config


# torch: several processes


def rebuild_reducer(ddp: DistributedDataParallel) -> None:
    """
    Have DDP find out again which parameters require a gradient.

    DDP does so only when it is made, and a training loop holds on to the wrapper. What DDP does when it comes back from a pickle
    makes a new reducer in the same wrapper. That loses the communication hooks, which are registered again.
    """
    hooks, ddp._comm_hooks = list(ddp._comm_hooks), []
    ddp._remove_autograd_hooks()
    ddp.__setstate__(ddp.__getstate__())
    ddp._has_rebuilt_buckets = False
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)


def joins_uneven_inputs(model: nn.Module) -> bool:
    """Whether a module is within `join()`, where processes that have no more rows only answer the others. It does not tell."""
    return getattr(getattr(model, "_join_config", None), "enable", False)


def gathered_modules(module: FSDPModule) -> tuple[nn.Module, ...]:
    """The modules whose parameters FSDP2 gathers together, in one group with those of `module`. `FSDPModule` does not tell."""
    return module._get_fsdp_state()._modules


def forget_failed_pass(model: nn.Module) -> None:
    """Have FSDP2 forget a pass that ended with an exception. Later versions of torch have a public name for it, earlier ones none."""
    if isinstance(model, FSDPModule) and hasattr(model, "reset_iter_state"):
        model.reset_iter_state()


# Accelerate


def other_parallel_sizes(config: ParallelismConfig) -> dict[str, int]:
    """Number of processes in each form of parallelism but sharding. Sequence parallelism came after Accelerate 1.10."""
    names = ("dp_replicate_size", "tp_size", "cp_size", "sp_size")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def forward_without_autocast(model: nn.Module, default: Callable[..., Any]) -> Callable[..., Any]:
    """
    The forward pass of a model as it was before Accelerate put autocast around it, or `default` where it has not.

    `extract_model_from_parallel` gives a forward pass back too, but takes the autocast off the model.
    """
    return getattr(model, "_original_forward", default)


# Transformers: activation checkpointing. Transformers 5.23 has renamed gradient checkpointing.


# Field of a module with the function that checkpoints it. It does not change what the module returns.
CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"


def checkpoints_activations(args: TrainingArguments) -> bool:
    """Whether the Trainer turns on activation checkpointing (`gradient_checkpointing` before Transformers 5.23)."""
    name = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    return bool(getattr(args, name))


def uses_reentrant_checkpointing(block: nn.Module) -> bool:
    """
    Whether the block runs under reentrant activation checkpointing. Transformers keeps the checkpointing function, with its
    options, in the block alone, under a private name.
    """
    checkpoint = getattr(block, CHECKPOINT_FUNCTION, None)
    if not getattr(block, "gradient_checkpointing", False) or not isinstance(checkpoint, partial):
        return False
    return checkpoint.keywords.get("use_reentrant") is not False  # torch's own default is reentrant, which PEFT leaves


class _Checkpoint(partial):
    """A checkpointing function with its options, which does more for one block. Copies and pickles are without that."""

    block: nn.Module

    def __reduce__(self) -> tuple:
        return partial, (self.func,), (self.func, self.args, self.keywords, {})


class _CheckpointWithGrads(_Checkpoint):
    """Makes inputs require a gradient."""

    def __call__(self, function: Callable[..., Any], /, *args: Any) -> Any:
        if torch.is_grad_enabled() and not any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            args = tuple(
                arg.detach().requires_grad_() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
                for arg in args
            )
        return super().__call__(function, *args)


class _CheckpointInEvaluation(_Checkpoint):
    """Computes in evaluation mode."""

    def __call__(self, function: Callable[..., Any], /, *args: Any) -> Any:
        def evaluate(*inputs: Any) -> Any:
            before, self.block.training = self.block.training, False
            try:
                return function(*inputs)
            finally:
                self.block.training = before

        return super().__call__(evaluate, *args)


def _replace_checkpoint(block: nn.Module, kind: type[_Checkpoint]) -> Callable[[], None] | None:
    """Give a block another checkpointing function. Returns what undoes it, or `None` if the block has it already."""
    before = getattr(block, CHECKPOINT_FUNCTION)
    if isinstance(before, kind):
        return None
    patch = kind(before.func, *before.args, **before.keywords) if isinstance(before, partial) else kind(before)
    patch.block = block

    def undo() -> None:
        if getattr(block, CHECKPOINT_FUNCTION) is patch:
            setattr(block, CHECKPOINT_FUNCTION, before)

    setattr(block, CHECKPOINT_FUNCTION, patch)
    return undo


def require_checkpoint_grads(block: nn.Module) -> Callable[[], None] | None:
    """
    Have a block under reentrant activation checkpointing compute its gradients although none of its inputs requires one.

    Reentrant checkpointing drops the gradients of such a block (transformers#21381). A forward pre-hook cannot help before
    Transformers 5.23, where hooks run inside the checkpointed function.

    Returns:
        `Callable[[], None]`: undoes it. `None` where nothing is to be changed: without reentrant checkpointing, or when it was
        done before.
    """
    return _replace_checkpoint(block, _CheckpointWithGrads) if uses_reentrant_checkpointing(block) else None


def checkpoint_in_evaluation(layer: nn.Module) -> Callable[[], None] | None:
    """
    Have a layer in training mode compute in evaluation mode, under activation checkpointing.

    Transformers checkpoints a layer in training mode only, and asks for the mode inside the layer's forward pass, before 5.23
    outside of it, so no hook can change the mode between the two.

    Returns:
        `Callable[[], None]`: undoes it. `None` where nothing is to be changed: without checkpointing, or when it was done before.
    """
    checkpoints = getattr(layer, "gradient_checkpointing", False)
    return _replace_checkpoint(layer, _CheckpointInEvaluation) if checkpoints else None


def has_input_grads(model: nn.Module) -> bool:
    """Whether `enable_input_require_grads` is in force. Transformers has a method to turn it on and one to turn it off only."""
    return bool(getattr(model, "_require_grads_hooks", None))


def disable_input_grads(model: PreTrainedModel) -> None:
    """
    Undo `enable_input_require_grads`, however often it was called: PEFT and the Trainer both call it, and
    `disable_input_require_grads` removes the hooks of the last call only.
    """
    model.disable_input_require_grads()
    name = "enable_input_require_grads.<locals>.make_inputs_require_grads"
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__qualname__", "").endswith(name):
                del module._forward_hooks[key]


# Set on a model when Transformers has put in the hooks that [`records_outputs`] knows.
OUTPUTS_RECORDED = "_output_capturing_hooks_installed"


def records_outputs(hook: Callable) -> bool:
    """Whether it is the hook by which Transformers collects hidden states and attentions, which does nothing unless asked."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


# Transformers: the Trainer and its callbacks


def calling_handler() -> CallbackHandler | None:
    """
    The handler of the Trainer that is calling a callback now, if one is.

    Trackers are callbacks, too, and come before those of the user. A callback that adds to what they log has to stand in
    front of them; the handler has their order, and no event passes it on.
    """
    return _calling(CallbackHandler)


class TrainerHooks(_TrainerBase):
    """
    A mixin over [`~transformers.Trainer`] with three hooks that no callback and no public method gives. Subclasses override
    the hooks, not the private methods of the Trainer that call them.
    """

    def around_training(self) -> AbstractContextManager[None]:
        """
        Entered around the training loop, and again for each smaller batch that `auto_find_batch_size` tries.

        A callback is not told of an exception that ends training.
        """
        return nullcontext()

    def around_loading(self, checkpoint: str | None) -> AbstractContextManager[None]:
        """
        Entered while the Trainer loads the optimizer's state, which is after the weights and after the model is wrapped.

        Args:
            checkpoint (`str`, *optional*): folder to resume from; `None` in a run that starts anew.
        """
        return nullcontext()

    def before_checkpoint(self, folder: Path) -> None:
        """
        Called in all processes, before the Trainer writes the first file of a checkpoint. A callback's `on_save` comes after the
        push to the Hub.

        Args:
            folder (`Path`): of the checkpoint; it may not exist yet.
        """

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self.around_training():
            return super()._inner_training_loop(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self.around_loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.before_checkpoint(
            Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        )
        super()._save_checkpoint(model, trial)


def calling_trainer() -> Trainer | None:
    """The Trainer that is calling a callback now, if one is. No event passes it on."""
    return _calling(Trainer)


def resumed_checkpoint() -> str | None:
    """The checkpoint from which the Trainer that is calling a callback now resumes. No event passes it on."""
    folders = (known.get("resume_from_checkpoint") for known in _variables_of_callers(Trainer))
    return next((folder for folder in folders if isinstance(folder, str)), None)


def _calling(kind: type) -> Any:
    return next((known["self"] for known in _variables_of_callers(kind)), None)


def _variables_of_callers(kind: type) -> Iterator[dict[str, Any]]:
    """The local variables of the methods of a kind of object that are being called now, the innermost one first."""
    frame: FrameType | None = sys._getframe(0)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), kind):
            yield frame.f_locals
        frame = frame.f_back


def after_model_card(trainer: Trainer, add: Callable[[Path], None]) -> None:
    """
    Have `add` called with the model card after each `create_model_card` of this Trainer, which `push_to_hub` calls, too.

    There is no event for a callback then, so the method of this one Trainer is wrapped. Called again, it replaces the first
    `add`.
    """
    create = getattr(trainer.create_model_card, "without_smartfrz", trainer.create_model_card)

    @wraps(create)
    def create_model_card(*args: Any, **kwargs: Any) -> None:
        create(*args, **kwargs)
        card = Path(str(trainer.args.output_dir)) / "README.md"
        if trainer.is_world_process_zero() and card.is_file():
            add(card)

    create_model_card.without_smartfrz = create  # type: ignore[attr-defined]
    trainer.create_model_card = create_model_card  # type: ignore[method-assign]


# Accelerate and Transformers: what `estimate` uses


def prepared_objects(accelerator: Any) -> list[list]:
    """
    The lists of what an accelerator has prepared. There is no public way to have it forget one data loader or optimizer:
    `free_memory` forgets all.
    """
    return [accelerator._dataloaders, accelerator._models, accelerator._optimizers, accelerator._schedulers]


@contextmanager
def training_checkpointing(trainer: Trainer) -> Iterator[None]:
    """
    Turn activation checkpointing on meanwhile if the Trainer will do so when training begins. The methods and options have
    other names before Transformers 5.23.
    """
    model: Any = trainer.model
    name = "activation" if hasattr(trainer.args, "activation_checkpointing") else "gradient"
    options = getattr(trainer.args, f"{name}_checkpointing_kwargs", None)
    wanted = checkpoints_activations(trainer.args) and not getattr(model, f"is_{name}_checkpointing", False)
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and not has_input_grads(part)]
    if wanted:
        getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": options})
    try:
        yield
    finally:
        if wanted:
            getattr(model, f"{name}_checkpointing_disable")()
            for part in parts:
                if has_input_grads(part):
                    disable_input_grads(part)
