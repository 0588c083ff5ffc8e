"""FSDP2: what is gathered, and what is not."""

from torch import nn
from torch.distributed.fsdp import FSDPModule


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
