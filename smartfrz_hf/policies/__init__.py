"""The policies: who decides which units freeze."""

from ..config import SmartFRZConfig
from ..predictor import SmartFRZPredictor, load_predictor
from ..signals.schedule import LearningRates
from .base import Decision, Observation, Policy
from .linear import LinearPolicy
from .never import NeverPolicy
from .smartfrz import SmartFRZPolicy
from .static import StaticPolicy

__all__ = [
    "Decision",
    "LearningRates",
    "LinearPolicy",
    "NeverPolicy",
    "Observation",
    "Policy",
    "SmartFRZPolicy",
    "StaticPolicy",
    "make_policy",
]


def make_policy(config: SmartFRZConfig, predictor: SmartFRZPredictor | None = None) -> Policy:
    """
    The policy that a configuration names.

    Args:
        config ([`SmartFRZConfig`]): names it and holds its parameters.
        predictor ([`SmartFRZPredictor`], *optional*): used instead of the one that the configuration names.

    Raises:
        ValueError: `window` or `weights_per_unit` is not what the predictor was made for.
        OSError: the predictor's files are missing or damaged.
    """
    if config.policy == "static":
        return StaticPolicy(config.static_depth)
    if config.policy == "linear":
        return LinearPolicy(config.linear_start, config.linear_depth)
    if config.policy == "never":
        return NeverPolicy()
    if predictor is None:
        predictor = load_predictor(config.predictor, revision=config.predictor_revision)
    for name in ("window", "weights_per_unit"):
        wanted, made_for = getattr(config, name), getattr(predictor.config, name)
        if wanted is not None and wanted != made_for:
            raise ValueError(
                f"`{name}` is {wanted}, but the predictor was made for {made_for}; leave `{name}` out, or fit a "
                "predictor for it with `smartfrz fit`."
            )
    threshold = config.freeze_threshold
    if threshold is None:
        threshold = predictor.config.operating_points[config.operating_point]
    return SmartFRZPolicy(predictor, threshold)
