"""Configuration of the predictor."""

import copy
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from ..choices import one_of
from ..config import OPERATING_POINTS

logger = logging.get_logger(__name__)

FORMS = ("dynamics", "weights")
DEFAULT_POINTS = {"conservative": 0.9, "balanced": 0.7, "aggressive": 0.5}
DEFAULT_POINTS_AFTER_START = {"conservative": 0.9, "balanced": 0.6, "aggressive": 0.4}
START_LIMITS = ("points", "share", "blocks")
DEFAULT_LIMITS = {
    "conservative": {"points": 0.1, "share": 0.3, "blocks": 0.34},
    "balanced": {"points": 0.3, "share": 0.4, "blocks": 0.34},
    "aggressive": {"points": 1.0, "share": 0.6, "blocks": 0.5},
}
SIZES = ("window", "weights_per_unit", "encoder_size", "attention_size", "unit_size", "head_size")

# Numbers per snapshot that describe how the weights move, per unit that say where it stands, and of the front probe.
DYNAMICS_SIZE, CONTEXT_SIZE, PROBE_SIZE = 10, 4, 7


class SmartFRZPredictorConfig(PreTrainedConfig):
    """
    Configuration of a [`SmartFRZPredictor`].

    Args:
        form (`str`, *optional*, defaults to `"dynamics"`):
            How a snapshot enters the encoders. `"weights"`: as the sampled weights themselves, as in the paper.
            `"dynamics"`: as scale-free quantities of how the weights move, which do not depend on the order or number
            of the weights, together with the position of the unit in the model and in the run.
        window (`int`, *optional*, defaults to `20`): number of snapshots in a history.
        weights_per_unit (`int`, *optional*, defaults to `1024`):
            Number of sampled weights in a snapshot.
        encoder_size (`int`, *optional*, defaults to `16`):
            Width of the hidden layers of the query, key and value MLPs.
        attention_size (`int`, *optional*, defaults to `8`): size of queries, keys and values.
        unit_size (`int`, *optional*, defaults to `16`): size of the vector that represents a unit (`"dynamics"` only).
        unit_attention (`bool`, *optional*, defaults to `True`):
            Whether units attend to each other (`"dynamics"` only).
        front_sum (`bool`, *optional*, defaults to `True`):
            Whether the odds against freezing a unit include those of all units in front of it (`"dynamics"` only).
        front_probe (`bool`, *optional*, defaults to `False`):
            Whether the inputs include how the outputs on the front probe move (`"dynamics"` only).
        head_size (`int`, *optional*, defaults to `16`): width of the hidden layers of the head.
        operating_points (`dict[str, float]`, *optional*):
            Probability from which a unit counts as converged, for `"conservative"`, `"balanced"` and `"aggressive"`
            freezing.
        operating_points_after_start (`dict[str, float]`, *optional*):
            The same for the units behind a front that has frozen from the first step on. They train at a higher learning rate,
            and lose less by freezing early. Not fitted: chosen by runs of the shipped predictor.
        start_stage (`bool`, *optional*, defaults to `False`):
            Whether there is a [`StartPredictor`], which decides what freezes from the first step on.
        start_limits (`dict[str, dict[str, float]]`, *optional*):
            What limits a front that freezes from the first step on, for each of the three: the `points` that it may cost by the
            prediction, its `share` in the contributions of all units, and its fraction of the `blocks`.

    Raises:
        ValueError: `form` is unknown or has no front probe, a size is below 1, an operating point is no
            probability or missing, or a limit is no number or missing.

    Example:

    ```python
    >>> from smartfrz_hf import SmartFRZPredictorConfig

    >>> config = SmartFRZPredictorConfig(window=10, front_probe=True)
    >>> config.input_size, config.context_size
    (10, 11)
    ```
    """

    model_type = "smartfrz_predictor"

    def __init__(
        self,
        form: str = "dynamics",
        window: int = 20,
        weights_per_unit: int = 1024,
        encoder_size: int = 16,
        attention_size: int = 8,
        unit_size: int = 16,
        unit_attention: bool = True,
        front_sum: bool = True,
        front_probe: bool = False,
        head_size: int = 16,
        operating_points: dict[str, float] | None = None,
        operating_points_after_start: dict[str, float] | None = None,
        start_stage: bool = False,
        start_limits: dict[str, dict[str, float]] | None = None,
        **kwargs: Any,
    ):
        # Written out: Transformers makes no arguments of annotated fields before version 5.4.
        self.form, self.window, self.weights_per_unit = form, window, weights_per_unit
        self.encoder_size, self.attention_size, self.unit_size = encoder_size, attention_size, unit_size
        self.unit_attention, self.front_sum, self.front_probe = unit_attention, front_sum, front_probe
        self.head_size = head_size
        self.operating_points = dict(DEFAULT_POINTS if operating_points is None else operating_points)
        self.operating_points_after_start = dict(
            DEFAULT_POINTS_AFTER_START if operating_points_after_start is None else operating_points_after_start
        )
        self.start_stage = start_stage
        self.start_limits = copy.deepcopy(DEFAULT_LIMITS if start_limits is None else start_limits)
        # Keys that any configuration has, or that `from_pretrained` adds. The Trainer writes `use_cache` into any.
        known = {*dir(PreTrainedConfig()), "attn_implementation", "experts_implementation", "use_cache"}
        super().__init__(**kwargs)
        unknown = sorted(name for name in kwargs if name not in known and not name.startswith("_"))
        if unknown:
            logger.warning(
                f"SmartFRZPredictorConfig ignores the unknown keys {', '.join(unknown)}. The predictor may need a "
                "newer version of smartfrz_hf: pip install --upgrade smartfrz_hf"
            )
        if self.form not in FORMS:
            raise ValueError(f"`form` is {self.form!r}; it must be {one_of(self.form, FORMS)}")
        if self.front_probe and self.form == "weights":
            raise ValueError('`front_probe=True` needs `form="dynamics"`; set it to False for `form="weights"`.')
        for name in SIZES:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be a whole number of at least 1.")
        for name in ("operating_points", "operating_points_after_start"):
            points = getattr(self, name)
            probabilities = all(isinstance(value, int | float) and 0 <= value <= 1 for value in points.values())
            if set(points) != set(OPERATING_POINTS) or not probabilities:
                raise ValueError(
                    f"`{name}` is {points!r}; it must have a probability for each of {', '.join(OPERATING_POINTS)}."
                )
        limits = self.start_limits
        numbers = all(isinstance(value, int | float) for limit in limits.values() for value in limit.values())
        complete = all(set(limit) == set(START_LIMITS) for limit in limits.values())
        if set(limits) != set(OPERATING_POINTS) or not complete or not numbers:
            raise ValueError(
                f"`start_limits` is {limits!r}; it must have the numbers {', '.join(START_LIMITS)} for each of "
                f"{', '.join(OPERATING_POINTS)}."
            )

    @property
    def input_size(self) -> int:
        """Numbers per snapshot that enter the encoders."""
        return self.weights_per_unit if self.form == "weights" else DYNAMICS_SIZE

    @property
    def context_size(self) -> int:
        """Numbers per unit that describe its position, and its outputs on the front probe if these are used."""
        if self.form == "weights":
            return 0
        return CONTEXT_SIZE + PROBE_SIZE if self.front_probe else CONTEXT_SIZE
