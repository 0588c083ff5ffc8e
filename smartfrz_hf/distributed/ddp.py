"""DDP: no gradient of a frozen parameter is sent."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import _compat


def rebuild_reducer(model: nn.Module) -> bool:
    """
    Let DDP send the gradients of those parameters only that require one now. To be called in all processes, between two steps.

    The wrapper stays the same object, which a training loop holds on to. Communication hooks, and those that a compiler or an
    optimizer has put on gradients, are kept.

    Args:
        model (`torch.nn.Module`): what the training loop calls. Nothing happens unless it is wrapped by DDP.

    Returns:
        `bool`: whether there was a reducer to rebuild.
    """
    ddp = _compat.unwrap_compiled(model)
    if not isinstance(ddp, DistributedDataParallel):
        return False
    if not any(parameter.requires_grad for parameter in ddp.module.parameters()):
        return False  # DDP refuses a model with nothing to train, and there is nothing to send
    _compat.rebuild_reducer(ddp)
    return True
