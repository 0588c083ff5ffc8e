"""What is done around each optimizer step: a policy looks at gradients, and sets the learning rates of units."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..model.units import BlockStack
from ..policies import Policy
from ..signals.steps import BeforeUpdate


def follow_steps(
    policy: Policy, stack: BlockStack, optimizer: Optimizer, now: Callable[[], tuple[int, int, int]]
) -> list[Any]:
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
        `list`: hooks on the optimizer, each with a `remove` to be called at the end.
    """
    handles: list[Any] = []
    if type(policy).before_update is not Policy.before_update:
        handles += around_steps(optimizer, lambda: policy.before_update(BeforeUpdate(*now(), stack)))
    if type(policy).rate_factors is not Policy.rate_factors:
        rates = _UnitRates(policy, stack, optimizer, now)
        handles += [*around_steps(optimizer, rates.split, rates.join), rates]
    return handles


def around_steps(
    optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None] = lambda: None
) -> list[RemovableHandle]:
    """
    Call something before and after each optimizer step that changes weights.

    A loss scaler of fp16 that has found gradients that are not finite does not call `step`, but for a fused optimizer, which then
    leaves the weights as they are. So such steps are left out here, too.
    """

    def unless_skipped(call: Callable[[], None]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            found = getattr(optimizer, "found_inf", None)
            if found is None or not bool(found):
                call()

        return hook

    return [
        optimizer.register_step_pre_hook(unless_skipped(before)),
        optimizer.register_step_post_hook(unless_skipped(after)),
    ]


class _UnitRates:
    """Splits the groups of an optimizer by unit for the time of a step."""

    def __init__(
        self, policy: Policy, stack: BlockStack, optimizer: Optimizer, now: Callable[[], tuple[int, int, int]]
    ):
        self._policy, self._optimizer, self._now, self._units = policy, optimizer, now, len(stack)
        self._unit_of = {p: unit for unit, part in enumerate(stack) for p in part.named_parameters().values()}
        self._whole: list[dict[str, Any]] = []
        self._parts: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def split(self) -> None:
        """To be called before a step."""
        self.join()  # after a step that was interrupted
        self._whole = self._optimizer.param_groups
        step, max_steps = self._now()[:2]
        factors = [*self._policy.rate_factors(step / max_steps, self._units), 1.0]
        self._parts = [(group, part) for group in self._whole for part in _by_unit(group, self._unit_of, factors)]
        self._optimizer.param_groups = [part for _, part in self._parts]

    def join(self) -> None:
        """To be called after a step."""
        for group, part in self._parts:  # some optimizers keep numbers of their own in the groups
            group.update({key: value for key, value in part.items() if key not in ("params", "lr")})
        if self._parts:
            self._optimizer.param_groups = self._whole
        self._parts = []

    remove = join  # as the hooks are removed: the last step may have been interrupted


def _by_unit(group: dict[str, Any], unit_of: dict[Any, int], factors: list[float]) -> list[dict[str, Any]]:
    """A group split by unit, with the learning rate times the unit's factor. The last factor is the head's."""
    parts: dict[int, list[Any]] = {}
    for parameter in group["params"]:
        parts.setdefault(unit_of.get(parameter, len(factors) - 1), []).append(parameter)
    return [group | {"params": part, "lr": group["lr"] * factors[unit]} for unit, part in parts.items()]
