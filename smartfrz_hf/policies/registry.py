"""Policies by name."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from ..choices import closest
from ..config import POLICIES, SmartFRZConfig
from ..predictor import SmartFRZPredictor, load_predictor
from .autofreeze import AutoFreezePolicy
from .base import Policy
from .egeria import EgeriaPolicy
from .freezeout import FreezeOutPolicy
from .grades import GradESPolicy
from .linear import LinearPolicy
from .never import NeverPolicy
from .random import RandomPolicy
from .self_cka import SelfCKAPolicy
from .smartfrz import SmartFRZPolicy
from .static import StaticPolicy

# Rules of other papers. By name they have their published settings; for others, an instance is passed.
PEERS: dict[str, type[Policy]] = {
    "autofreeze": AutoFreezePolicy,
    "egeria": EgeriaPolicy,
    "freezeout": FreezeOutPolicy,
    "grades": GradESPolicy,
    "random": RandomPolicy,
    "self_cka": SelfCKAPolicy,
}
_makers: dict[str, Callable[[SmartFRZConfig], Policy]] = {
    "linear": lambda config: LinearPolicy(config.linear_start, config.linear_depth),
    "never": lambda config: NeverPolicy(),
    "static": lambda config: StaticPolicy(config.static_depth),
}


def register_policy(name: str, make: Callable[[SmartFRZConfig], Policy]) -> None:
    """
    Make a policy of your own available as `SmartFRZConfig(policy=name)`.

    Args:
        name (`str`): must not be taken yet, except by the same `make`.
        make (`Callable[[SmartFRZConfig], Policy]`): makes it from a configuration; a class that takes one will do.

    Raises:
        TypeError: the name is no string, or `make` cannot be called.
        ValueError: the name is taken.

    Example:

    ```python
    >>> from smartfrz_hf import Decision, Policy, SmartFRZConfig, register_policy


    >>> class HalfTime(Policy):
    ...     def __init__(self, config):
    ...         self.depth = config.max_depth or 1
    ...
    ...     def decide(self, observation):
    ...         due = observation.progress >= 0.5
    ...         return Decision(self.depth if due else observation.depth, "half of the run is done")


    >>> register_policy("half_time", HalfTime)
    >>> SmartFRZConfig(policy="half_time").policy
    'half_time'
    ```
    """
    if not isinstance(name, str):
        raise TypeError(f"The name of a policy is {name!r}; it must be a string.")
    if not callable(make):
        raise TypeError(
            f"`make` is {make!r}; it must be a function that takes a `SmartFRZConfig` and returns a `Policy`, such as "
            "`lambda config: MyPolicy()`."
        )
    if name in POLICIES and _makers.get(name) is not make:
        raise ValueError(f"There is a policy {name!r} already; choose another name than {', '.join(POLICIES)}.")
    if name not in POLICIES:
        POLICIES.append(name)
    _makers[name] = make


def make_policy(config: SmartFRZConfig, predictor: SmartFRZPredictor | None = None) -> Policy:
    """
    The policy that a configuration names.

    Args:
        config ([`SmartFRZConfig`]): names it and holds its parameters.
        predictor ([`SmartFRZPredictor`], *optional*): used in place of the one that the configuration names.

    Raises:
        TypeError: the function that was registered for it returned no policy.
        OSError: the predictor's files are missing or damaged, or the Hub cannot be reached.
    """
    if config.policy in PEERS:
        return PEERS[config.policy]()
    if config.policy != "smartfrz":
        policy = _makers[config.policy](config)
        if not isinstance(policy, Policy):
            raise TypeError(
                f"What was registered as {config.policy!r} returned {policy!r}; it must return an instance of a subclass of `Policy`."
            )
        return policy
    if predictor is None:
        predictor = load_predictor(config.predictor, revision=config.predictor_revision)
    threshold, after_start = config.freeze_threshold, None
    if threshold is None:
        points, later = predictor.config.operating_points, predictor.config.operating_points_after_start
        threshold = points[config.operating_point]
        after_start = later[config.operating_point] if config.compensate_rate else points["conservative"]
    return SmartFRZPolicy(
        predictor,
        threshold,
        start=predictor.config.start_limits[config.operating_point] if config.start_stage else None,
        target_saving=config.target_saving,
        threshold_after_start=after_start,
    )


def policy_name(config: SmartFRZConfig, policy: Policy) -> str:
    """What a policy is called: the name by which the configuration asks for it, or the class of an instance that was passed."""
    by_name = config.policy != "smartfrz" or isinstance(policy, SmartFRZPolicy)
    return config.policy if by_name else type(policy).__name__


def resolve(
    config: SmartFRZConfig | dict[str, Any] | None,
    predictor: SmartFRZPredictor | str | None = None,
    policy: Policy | str | None = None,
    **options: Any,
) -> tuple[SmartFRZConfig, Policy]:
    """
    The configuration and the policy, from the forms in which users give them.

    Args:
        config ([`SmartFRZConfig`] or `dict`, *optional*): all options.
        predictor ([`SmartFRZPredictor`] or `str`, *optional*): a predictor, or its name on the Hub or folder.
        policy ([`Policy`] or `str`, *optional*): a policy, or the name of one.
        options: fields of [`SmartFRZConfig`], in place of those of `config`.

    Raises:
        TypeError: something is of the wrong type, or an option is unknown.
        ValueError: an option has a value that cannot work.
        OSError: the predictor cannot be loaded.
    """
    if isinstance(policy, str):
        options["policy"], policy = policy, None
    if predictor is not None and not isinstance(predictor, SmartFRZPredictor):
        options["predictor"], predictor = predictor, None
    if isinstance(config, dict):
        options, config = {**config, **options}, None
    if not isinstance(config, SmartFRZConfig | None):
        raise TypeError(
            f"The configuration is of type {type(config).__name__}; it must be a `SmartFRZConfig`, a `dict` of its fields, or left out. Options "
            'are given by name, such as `operating_point="conservative"`.'
        )
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(
            f"`policy` is {policy!r}; it must be an instance of a subclass of `Policy`, or the name of one."
        )
    known = [f.name for f in fields(SmartFRZConfig)]
    for name in options:
        if name not in known:
            close = closest(name, known)
            hint = f"did you mean `{close}`?" if close else f"the options are {', '.join(known)}."
            raise TypeError(f"There is no option `{name}`; {hint}")
    config = replace(config or SmartFRZConfig(), **options)
    policy = policy or make_policy(config, predictor)
    if config.order == "independent" and not policy.by_unit:
        raise ValueError(
            f'`order` is "independent", but {type(policy).__name__} freezes the front only. Use the policy "smartfrz" or '
            '"grades", one of your own with `by_unit = True`, or `order="front"`.'
        )
    ignores: tuple[type[Policy], ...] = (*PEERS.values(), LinearPolicy, NeverPolicy, StaticPolicy)
    if config.target_saving is not None and isinstance(policy, ignores):
        raise ValueError(f'`target_saving` needs the policy "smartfrz"; `policy` is {type(policy).__name__}.')
    return config, policy
