"""One tiny forward pass: which modules run when, and which parameters the input of each block depends on."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node
from transformers import PreTrainedModel
from transformers.utils import logging

from .._compat import forget_failed_pass
from ..distributed.fsdp import is_sharded, reshard
from .batches import tiny_batches
from .discovery import base_model
from .forward_patch import ForwardPatch
from .generators import device_of, generators_left_as_found
from .left_as_found import attributes_left_as_found
from .nested import float_tensors

logger = logging.get_logger(__name__)

# Arguments of a model, or a function that makes them where they are needed.
Inputs = Mapping[str, Any] | Callable[[], Mapping[str, Any] | None] | None


@dataclass(frozen=True)
class Trace:
    """
    What a forward pass has shown. All fields but `backbone` are empty where the model could not be run.

    A "reader" below is the number of the first block, in execution order, whose input depends on something; the number of
    blocks stands for the output of the backbone, which comes after all of them.

    Attributes:
        backbone (`torch.nn.Module`): what was run: the smallest model that holds all blocks, or the one around it.
        order (`dict[torch.nn.Module, int]`): modules in the order of their first start.
        runs_once (`set[torch.nn.Module]`): modules that started once.
        readers (`dict[tuple[torch.nn.Module, str], int]`): reader of each parameter that something depends on. A key is a
            module and the parameter's name in it; of tied parameters it is the module that ran first.
        output_readers (`dict[torch.nn.Module, int]`): reader of what a module without parameters returns.
        bypassed (`frozenset[str]`): dotted names of the parameters that the main output does not depend on.
        without_autograd (`frozenset[torch.nn.Module]`): blocks that ran while autograd was off.
        problem (`str`): what the last pass that was tried ended with, if not all blocks ran.
    """

    backbone: nn.Module
    order: dict[nn.Module, int] = field(default_factory=dict)
    runs_once: set[nn.Module] = field(default_factory=set)
    readers: dict[tuple[nn.Module, str], int] = field(default_factory=dict)
    output_readers: dict[nn.Module, int] = field(default_factory=dict)
    bypassed: frozenset[str] = frozenset()
    without_autograd: frozenset[nn.Module] = frozenset()
    problem: str = ""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """
    Run without gradients in evaluation mode, draw no random number, and leave every module with the mode, the attributes and the
    buffers that it had.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), generators_left_as_found(device_of(model)), attributes_left_as_found(model):
            yield
    finally:
        set_modes(modes)


def set_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Put modules in training or evaluation mode, each one by itself."""
    for module, mode in modes.items():
        if type(module).train is not nn.Module.train:  # some forget there what they have kept for evaluation
            type(module).train(module, mode)
    for module, mode in modes.items():
        module.training = mode


def trace(
    model: nn.Module, outermost: nn.Module, names: Sequence[str], inputs: Inputs = None, others: Sequence[str] = ()
) -> Trace:
    """
    Run a model, or the part of it that holds all blocks, on a tiny batch; where not all blocks run on that, on `inputs`.

    Changes no parameter, no mode and no running statistic, and draws no random number. FSDP2 has the whole model run, on all
    ranks.

    Args:
        model (`torch.nn.Module`): the unwrapped model.
        outermost (`torch.nn.Module`): the model as it was given.
        names (`Sequence[str]`): dotted names of the blocks.
        inputs (`Mapping` or `Callable`, *optional*): arguments of the model, or a function that returns them.
        others (`Sequence[str]`, *optional*): dotted names of modules that are no blocks, and should run, too.

    Returns:
        [`Trace`]: of the pass in which most blocks ran.
    """
    blocks = [model.get_submodule(name) for name in names]
    wanted = [*blocks, *(model.get_submodule(name) for name in others)]
    candidates = _backbones(model, wanted)
    best, most = Trace(candidates[0] if candidates else model), 0
    for backbone, batch in _attempts(model, candidates, inputs):
        runs = outermost if is_sharded(outermost) else backbone
        tracer = _Tracer(backbone, blocks)
        try:
            with tracer, _gradients(runs), torch.compiler.set_stance("force_eager"):
                tracer.output = runs(**batch)
            ran = sum(module in tracer.starts for module in wanted)
            if ran > most:
                best, most = tracer.result(model), ran
            if ran == len(wanted):
                break
            reason = f"{len(wanted) - ran} of {len(wanted)} blocks did not run"
        except Exception as error:  # the model's own code, on a batch that it may not expect
            reason = f"{type(error).__name__}: {error}"
        finally:
            forget_failed_pass(runs)
            reshard(runs)
        best = replace(best, problem=f"{type(backbone).__name__} on {', '.join(batch)}: {reason}")
    return best


def _attempts(
    model: nn.Module, candidates: list[PreTrainedModel], inputs: Inputs
) -> Iterator[tuple[nn.Module, Mapping[str, Any]]]:
    for backbone in candidates:
        for batch in tiny_batches(backbone):
            yield backbone, batch
    given = inputs() if callable(inputs) else inputs
    if given is not None:
        yield model, given


def _backbones(model: nn.Module, blocks: list[nn.Module]) -> list[PreTrainedModel]:
    """The models inside the model that hold all blocks: its base model first, and the larger of others before the smaller."""
    holders = [m for m in model.modules() if isinstance(m, PreTrainedModel) and set(blocks) <= set(m.modules())]
    return sorted(holders, key=lambda m: m is not base_model(model))


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in which all floating-point parameters require a gradient, but only here."""
    flags = {p: p.requires_grad for p in model.parameters() if p.is_floating_point()}
    try:
        with evaluation_mode(model), torch.enable_grad():
            for parameter in flags:
                parameter.requires_grad_(True)
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def graph_nodes(tensors: Iterable[torch.Tensor], seen: set[Node]) -> Iterator[Node]:
    """The nodes of the autograd graph below some tensors, without those in `seen`, to which they are added."""
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [below for below, _ in node.next_functions if below is not None]


def leaves(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensors that require a gradient and that others depend on, or are."""
    tensors = list(tensors)
    yield from (tensor for tensor in tensors if tensor.requires_grad and tensor.is_leaf)
    yield from (node.variable for node in graph_nodes(tensors, set()) if hasattr(node, "variable"))


class _Tracer:
    """Hooks on all modules of a backbone, which follow a forward pass."""

    def __init__(self, backbone: nn.Module, blocks: list[nn.Module]):
        self.backbone, self.blocks = backbone, set(blocks)
        self.starts: list[nn.Module] = []
        self.output: Any = None
        self.without_autograd: set[nn.Module] = set()
        self._owners: dict[torch.Tensor, tuple[nn.Module, str]] = {}
        self._outputs: dict[nn.Module, list[Node]] = {}
        self._started_blocks: set[nn.Module] = set()
        self._seen: set[Node] = set()
        self._node_readers: dict[Node, int] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle | ForwardPatch] = []

    def __enter__(self) -> "_Tracer":
        for module in self.backbone.modules():
            if module in self.blocks:  # SqueezeBERT calls the forward pass of its blocks without their hooks
                self._hooks.append(ForwardPatch(module, partial(self._run_block, module)))
            else:
                self._hooks.append(module.register_forward_pre_hook(self._start, with_kwargs=True))
            if next(module.parameters(), None) is None:
                self._hooks.append(module.register_forward_hook(self._end))
        return self

    def __exit__(self, *exception: Any) -> None:
        while self._hooks:  # which refer to this tracer, and it to the graph of the pass
            self._hooks.pop().remove()

    def _run_block(self, module: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self._start(module, args, kwargs)
        if not torch.is_grad_enabled():
            self.without_autograd.add(module)
        return forward(*args, **kwargs)

    def _start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.starts.append(module)
        if module in self.blocks and module not in self._started_blocks:
            self._read((args, kwargs))
            self._started_blocks.add(module)
        # Now, since FSDP2 replaces the parameters of a module while it runs.
        for name, parameter in module.named_parameters(recurse=False):
            self._owners.setdefault(parameter, (module, name))

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._outputs.setdefault(module, []).extend(t.grad_fn for t in float_tensors(output) if t.grad_fn is not None)

    def _read(self, value: Any) -> None:
        """Note what a value depends on and no earlier one did."""
        for node in graph_nodes(float_tensors(value), self._seen):
            self._node_readers[node] = len(self._started_blocks)

    def result(self, model: nn.Module) -> Trace:
        self._read(self.output)
        for module in self.backbone.modules():  # parameters that are read while their module does not run
            for name, parameter in module.named_parameters(recurse=False):
                self._owners.setdefault(parameter, (module, name))
        readers: dict[tuple[nn.Module, str], int] = {}
        for node, reader in self._node_readers.items():
            if hasattr(node, "variable") and node.variable in self._owners:
                readers[self._owners[node.variable]] = reader
        last = len(self.blocks)
        output_readers = {
            module: min(self._node_readers.get(node, last) for node in nodes)
            for module, nodes in self._outputs.items()
            if nodes
        }
        main = {leaf for tensor in float_tensors(self.output)[:1] for leaf in leaves([tensor])}
        read = {self._owners[leaf] for leaf in main if leaf in self._owners}
        names = {module: name for name, module in model.named_modules()}
        bypassed = {
            f"{names[module]}.{name}".lstrip(".")
            for module in self.backbone.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if (module, name) not in read and parameter not in main
        }
        counts = Counter(self.starts)
        order = {module: rank for rank, module in enumerate(counts)}
        once = {module for module, count in counts.items() if count == 1}
        hidden = frozenset(self.without_autograd)
        return Trace(self.backbone, order, once, readers, output_readers, frozenset(bypassed), hidden)
