"""What a policy does around each optimizer step: look at gradients, and set the learning rates of units."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..model.units import BlockStack
from ..policies import Policy
from ..signals.steps import BeforeUpdate


def follow_steps(
    policy: Policy, stack: BlockStack, optimizer: Optimizer, now: Callable[[], tuple[int, int, int]]
) -> list[RemovableHandle]:
    """
    Have a policy see each optimizer step, as far as it implements `before_update` or `rate_factors`.

    Learning rates of units are set for the time of the step only: the optimizer's groups are split by unit before it and
    are as they were after it, so schedulers, logs and checkpoints see nothing of it.

    Args:
        policy ([`Policy`]): what decides.
        stack ([`BlockStack`]): the units.
        optimizer (`torch.optim.Optimizer`): the plain one.
        now (`Callable[[], tuple[int, int, int]]`): gives the optimizer steps done, those of the whole run, and the depth.

    Returns:
        `list[RemovableHandle]`: hooks on the optimizer, to be removed at the end.
    """
    handles: list[RemovableHandle] = []
    if type(policy).before_update is not Policy.before_update:

        def look(*_: Any) -> None:
            policy.before_update(BeforeUpdate(*now(), stack))

        handles.append(optimizer.register_step_pre_hook(look))
    if type(policy).rate_factors is not Policy.rate_factors:
        unit_of = {p: unit for unit, part in enumerate(stack) for p in part.named_parameters().values()}
        whole: list[dict[str, Any]] = []
        parts: list[tuple[dict[str, Any], dict[str, Any]]] = []

        def split(*_: Any) -> None:
            whole[:] = optimizer.param_groups
            step, max_steps = now()[:2]
            factors = [*policy.rate_factors(step / max_steps, len(stack)), 1.0]
            parts[:] = [(group, part) for group in whole for part in _by_unit(group, unit_of, factors)]
            optimizer.param_groups = [part for _, part in parts]

        def join(*_: Any) -> None:
            for group, part in parts:  # some optimizers keep numbers of their own in the groups
                group.update({key: value for key, value in part.items() if key not in ("params", "lr")})
            optimizer.param_groups = list(whole)

        handles += [optimizer.register_step_pre_hook(split), optimizer.register_step_post_hook(join)]
    return handles


def _by_unit(group: dict[str, Any], unit_of: dict[Any, int], factors: list[float]) -> list[dict[str, Any]]:
    """A group split by unit, with the learning rate times the unit's factor. The last factor is the head's."""
    parts: dict[int, list[Any]] = {}
    for parameter in group["params"]:
        parts.setdefault(unit_of.get(parameter, len(factors) - 1), []).append(parameter)
    return [group | {"params": part, "lr": group["lr"] * factors[unit]} for unit, part in parts.items()]
