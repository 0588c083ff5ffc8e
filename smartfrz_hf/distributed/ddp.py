"""DDP: nothing is sent for what is frozen."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel


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
