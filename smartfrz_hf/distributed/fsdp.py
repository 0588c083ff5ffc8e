"""FSDP2: which weights are gathered."""

from torch import nn
from torch.distributed.fsdp import FSDPModule

from .._compat import gathered_modules


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the parameters of a model, or some of them."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """
    Put shards back in the place of gathered parameters, which FSDP2 leaves there after a forward pass without a backward pass.
    Does nothing to another model.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_for_backward(model: nn.Module, frozen: set[nn.Module]) -> None:
    """
    Let FSDP2 gather no weights of frozen modules for the backward pass. Otherwise it does so ahead of time, for the block in
    front of the one that runs. Does nothing to another model.

    Args:
        model (`torch.nn.Module`): the whole model.
        frozen (`set[torch.nn.Module]`): the modules that the backward pass does not reach.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_unshard_in_backward(not frozen.issuperset(gathered_modules(module)))
