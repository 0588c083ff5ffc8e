"""What SmartFRZ would save in a training, before it is run."""

from dataclasses import replace
from typing import Any

from transformers import Trainer

from ..activation_cache import budgets
from ..callback import SmartFRZCallback
from ..config import OPERATING_POINTS, SmartFRZConfig
from ..policies import Policy, SmartFRZPolicy, resolve
from ..policies.registry import make_policy
from ..predictor import SmartFRZPredictor, load_predictor
from .forecast import DepthForecast, Estimate, PointForecast, forecast
from .measured import DepthCost, Profile
from .profile import profile

__all__ = ["DepthCost", "DepthForecast", "Estimate", "PointForecast", "Profile", "estimate", "profile"]


def estimate(
    trainer: Trainer,
    config: SmartFRZConfig | dict[str, Any] | None = None,
    predictor: SmartFRZPredictor | str | None = None,
    *,
    seconds: float = 30.0,
    rows: int | None = None,
) -> Estimate:
    """
    What SmartFRZ is expected to save in a training, and what that costs.

    Takes a few training steps on this machine: the pilot, whose signals the predictor is asked about, and then steps at several
    depths. Weights, optimizer, random numbers and the Trainer are afterwards as they were; the weights are copied to host memory
    meanwhile. No callback of the Trainer is called.

    The estimate holds for what freezes from the start of the run. What freezes later is left out, and so are evaluations. Memory
    is counted, not measured: temporary tensors and what the allocator holds back are left out. A compiled model is measured
    without `torch.compile`.

    Args:
        trainer ([`~transformers.Trainer`]): ready to train, in a single process.
        config ([`SmartFRZConfig`] or `dict`, *optional*): all options. By default those of the Trainer's callback, if it has one.
        predictor ([`SmartFRZPredictor`] or `str`, *optional*): a predictor, or its name on the Hub or folder.
        seconds (`float`, *optional*, defaults to `30.0`):
            About how long to measure. At least four steps and two depths are measured, however long they take.
        rows (`int`, *optional*): training rows of the run, if the Trainer has only a part of them.

    Returns:
        [`Estimate`]

    Raises:
        TypeError: `trainer` is no Trainer.
        ValueError: the training cannot be measured, or SmartFRZ does not work with it; the message says why.
        OSError: the predictor's files are missing or damaged.

    Example:

    ```python
    from smartfrz_hf import estimate

    print(estimate(trainer))
    trainer.train()
    ```
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"`trainer` is a {type(trainer).__name__}; it must be a `transformers.Trainer`.")
    policy: Policy | None = None
    if config is None and predictor is None:
        callbacks = (c for c in trainer.callback_handler.callbacks if isinstance(c, SmartFRZCallback))
        if (callback := next(callbacks, None)) is not None:
            config, policy = callback.config, callback.policy
    if policy is None:
        config, policy = resolve(config, predictor)
    assert isinstance(config, SmartFRZConfig)
    asked = policy.predictor if isinstance(policy, SmartFRZPolicy) else load_predictor(None)
    # A threshold of one's own holds to the end, and so does the usual one where units freeze one by one.
    later = config.freeze_threshold is None and config.order == "front"
    config = replace(config, policy="smartfrz", order="front")  # what freezes from the start is a front in any case
    policies, chosen = _policies(config, asked)
    measured = profile(trainer, config, policies, seconds, rows)
    pilot = None if measured.observation is None else measured.observation.pilot
    lost = None
    if asked.start is not None and pilot is not None and pilot.finite:
        lost = asked.start.predict(pilot).tolist()
    cap = measured.deepest if config.max_depth is None else config.max_depth
    return forecast(measured, lost, _room(config), chosen, cap, config.compensate_rate, later)


def _policies(config: SmartFRZConfig, predictor: SmartFRZPredictor) -> tuple[dict[str, Policy], str]:
    """The policies to ask, by name, and the name of the one that the configuration stands for."""
    names = {name: replace(config, operating_point=name, target_saving=None) for name in OPERATING_POINTS}
    chosen = config.operating_point
    if config.target_saving is not None:
        chosen = f"{config.target_saving:.0%}"
        names[chosen] = config
    policies = {name: make_policy(option, predictor) for name, option in names.items()}
    return {name: policy for name, policy in policies.items() if policy.pilot}, chosen


def _room(config: SmartFRZConfig) -> int:
    """Bytes that the activation cache may use."""
    return sum(budgets(config)) if config.activation_cache else 0
