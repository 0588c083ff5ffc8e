"""One tiny forward pass: which modules run when, and which parameters the input of each block depends on."""

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.utils import logging

from ..distributed.fsdp import is_sharded, reshard
from .nested import float_tensors

logger = logging.get_logger(__name__)

AUDIO_SAMPLES, AUDIO_FRAMES = 4000, 64
FEATURE_SIZES = ("feature_projection_input_dim", "input_feat_per_channel")


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
    """

    backbone: nn.Module
    order: dict[nn.Module, int] = field(default_factory=dict)
    runs_once: set[nn.Module] = field(default_factory=set)
    readers: dict[tuple[nn.Module, str], int] = field(default_factory=dict)
    output_readers: dict[nn.Module, int] = field(default_factory=dict)
    bypassed: frozenset[str] = frozenset()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run without gradients in evaluation mode, draw no random number, and leave every module in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng():
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


def trace(model: nn.Module, outermost: nn.Module, names: Sequence[str]) -> Trace:
    """
    Run a model, or the part of it that holds all blocks, on a tiny batch.

    Changes no parameter, no mode and no running statistic, and draws no random number. FSDP2 has the whole model run, on all
    ranks.

    Args:
        model (`torch.nn.Module`): the unwrapped model.
        outermost (`torch.nn.Module`): the model as it was given.
        names (`Sequence[str]`): dotted names of the blocks.

    Returns:
        [`Trace`]
    """
    blocks = [model.get_submodule(name) for name in names]
    candidates = _backbones(model, blocks)
    for backbone in candidates:
        runs = outermost if is_sharded(outermost) else backbone
        for batch in _tiny_batches(backbone):
            tracer = _Tracer(backbone, blocks)
            try:
                with tracer, _gradients(runs), torch.compiler.set_stance("force_eager"):
                    tracer.output = runs(**batch)
                if all(block in tracer.starts for block in blocks):
                    return tracer.result(model)
                reason = "some blocks did not run"
            except Exception as error:  # the model's own code, on a batch that it may not expect
                reason = f"{type(error).__name__}: {error}"
            finally:
                if isinstance(runs, FSDPModule):
                    runs.reset_iter_state()
                reshard(runs)
            logger.debug(f"{type(backbone).__name__} was not traced with {', '.join(batch)}: {reason}")
    return Trace(candidates[0] if candidates else model)


def _backbones(model: nn.Module, blocks: list[nn.Module]) -> list[PreTrainedModel]:
    """The models inside the model that hold all blocks: its base model first, and the larger of others before the smaller."""
    holders = [m for m in model.modules() if isinstance(m, PreTrainedModel) and set(blocks) <= set(m.modules())]
    base = getattr(model, "base_model", None)
    return sorted(holders, key=lambda m: m is not base)


def _tiny_batches(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Batches to try: the main input alone, then everything that the forward pass takes and that is known here."""
    config, device, main = model.config, model.device, model.main_input_name
    takes = inspect.signature(model.forward).parameters
    text = {name: value.to(device) for name, value in model.dummy_inputs.items()}
    rows = len(text[main]) if main in text else 1
    nested = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]

    def size(*keys: str) -> Any:
        values = (getattr(part, key, None) for key in keys for part in (config, *nested))
        return next((value for value in values if value is not None), None)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros((rows, *shape), device=device, dtype=model.dtype)

    # A network without positions takes any size that its strides do not bring to nothing.
    image = size("image_size") or 64
    height, width = (image, image) if isinstance(image, int) else image
    picture = (size("num_channels") or 3, height, width)
    known = text | {"pixel_values": zeros(*picture), "input_values": zeros(AUDIO_SAMPLES)}
    mels, frames, features = size("num_mel_bins"), size("max_source_positions"), size(*FEATURE_SIZES)
    if mels and frames:  # Whisper
        known["input_features"] = zeros(mels, 2 * frames)
    elif features:
        known["input_features"] = zeros(AUDIO_FRAMES, features)
    if mels and (frames := size("max_length")):  # AST
        known["input_values"] = zeros(frames, mels)
    if main in known:
        yield text if main in text else {main: known[main]}
    known["decoder_input_ids"] = torch.ones(rows, 2, dtype=torch.long, device=device)
    yield {name: value for name, value in known.items() if name in takes}
    if frames := size("num_frames"):
        known["pixel_values"] = zeros(frames, *picture)
        yield {name: value for name, value in known.items() if name in takes}


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
        self._owners: dict[torch.Tensor, tuple[nn.Module, str]] = {}
        self._outputs: dict[nn.Module, list[Node]] = {}
        self._started_blocks: set[nn.Module] = set()
        self._seen: set[Node] = set()
        self._node_readers: dict[Node, int] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "_Tracer":
        for module in self.backbone.modules():
            self._hooks.append(module.register_forward_pre_hook(self._start, with_kwargs=True))
            if next(module.parameters(), None) is None:
                self._hooks.append(module.register_forward_hook(self._end))
        return self

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()

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
        return Trace(self.backbone, order, once, readers, output_readers, frozenset(bypassed))
