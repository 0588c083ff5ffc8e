"""Configuration of the predictor."""

from dataclasses import field

from transformers import PreTrainedConfig
from transformers.utils import logging

from ..config import OPERATING_POINTS
from .features import CONTEXT, DYNAMICS, PROBE_FEATURES

logger = logging.get_logger(__name__)

FORMS = ("dynamics", "weights")
DEFAULT_POINTS = {"conservative": 0.9, "balanced": 0.7, "aggressive": 0.5}


class SmartFRZPredictorConfig(PreTrainedConfig):
    """
    Configuration of a [`SmartFRZPredictor`].

    Args:
        form (`str`, *optional*, defaults to `"dynamics"`):
            What a snapshot is to the encoders. `"weights"`: the sampled weights themselves, the paper's form.
            `"dynamics"`: scale-free quantities of how they move, which do not depend on the order or number of
            samples, together with where in the run and in the model the unit stands.
        window (`int`, *optional*, defaults to `20`): snapshots in a history.
        weights_per_unit (`int`, *optional*, defaults to `1024`): sampled weights in a snapshot.
        encoder_size (`int`, *optional*, defaults to `16`): width of the hidden layers of the query, key and value MLPs.
        attention_size (`int`, *optional*, defaults to `8`): size of queries, keys and values.
        unit_size (`int`, *optional*, defaults to `16`): size of the vector that stands for a unit (`"dynamics"` only).
        unit_attention (`bool`, *optional*, defaults to `True`): whether units attend to each other (`"dynamics"` only).
        front_sum (`bool`, *optional*, defaults to `True`): whether the odds against freezing add up over the units of
            the front (`"dynamics"` only).
        front_probe (`bool`, *optional*, defaults to `False`): whether it is told how the front probe probe_features (`"dynamics"`
            only).
        head_size (`int`, *optional*, defaults to `16`): width of the hidden layers of the head.
        operating_points (`dict[str, float]`, *optional*): probability from which a unit counts as converged, for
            `"conservative"`, `"balanced"` and `"aggressive"` freezing.

    Raises:
        ValueError: `form` is unknown, or cannot be told of the front probe, or a size is below 1.
    """

    model_type = "smartfrz_predictor"

    form: str = "dynamics"
    window: int = 20
    weights_per_unit: int = 1024
    encoder_size: int = 16
    attention_size: int = 8
    unit_size: int = 16
    unit_attention: bool = True
    front_sum: bool = True
    front_probe: bool = False
    head_size: int = 16
    operating_points: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_POINTS))

    def __post_init__(self, **kwargs):
        known = {*dir(self), "use_cache"}  # which the Trainer writes into any configuration
        super().__post_init__(**kwargs)
        unknown = sorted(name for name in kwargs if name not in known and not name.startswith("_"))
        if unknown:
            logger.warning(
                f"SmartFRZPredictorConfig does not know {', '.join(unknown)}: was the predictor made with a newer version "
                "of smartfrz_hf? It may not give what it is meant to."
            )
        if self.form not in FORMS:
            raise ValueError(f"`form` is {self.form!r}; it must be one of {', '.join(map(repr, FORMS))}.")
        if self.front_probe and self.form == "weights":
            raise ValueError('`front_probe` is for `form="dynamics"`: the paper\'s form is told of the weights alone.')
        for name in ("window", "weights_per_unit", "encoder_size", "attention_size", "unit_size", "head_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be a whole number from 1 on.")
        points = self.operating_points
        if set(points) != set(OPERATING_POINTS) or not all(0 <= value <= 1 for value in points.values()):
            raise ValueError(
                f"`operating_points` is {points!r}; it must have a probability for each of {', '.join(OPERATING_POINTS)}."
            )

    @property
    def input_size(self) -> int:
        """Numbers per snapshot that enter the encoders."""
        return self.weights_per_unit if self.form == "weights" else DYNAMICS

    @property
    def context_size(self) -> int:
        """Numbers per unit that enter the head beside what attention gives."""
        if self.form == "weights":
            return 0
        return CONTEXT + PROBE_FEATURES if self.front_probe else CONTEXT
