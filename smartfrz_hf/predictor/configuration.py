"""Configuration of the predictor."""

from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

FORMS = ("dynamics", "weights")
DYNAMICS = 8
CONTEXT = 4


class SmartFRZPredictorConfig(PreTrainedConfig):
    """
    Configuration of a [`SmartFRZPredictor`].

    Args:
        form (`str`, *optional*, defaults to `"dynamics"`):
            What a snapshot is to the encoders. `"weights"`: the sampled weights themselves, the paper's form.
            `"dynamics"`: scale-free quantities of how they move, which do not depend on the order or number of
            samples, together with where in the run and in the model the unit stands.
        window (`int`, *optional*, defaults to `20`): snapshots in a history.
        samples (`int`, *optional*, defaults to `1024`): sampled weights in a snapshot.
        encoder_size (`int`, *optional*, defaults to `8`): width of the hidden layers of the query, key and value MLPs.
        attention_size (`int`, *optional*, defaults to `4`): size of queries, keys and values.
        head_size (`int`, *optional*, defaults to `8`): width of the hidden layers of the head.

    Raises:
        ValueError: `form` is unknown, or a size is below 1.
    """

    model_type = "smartfrz_predictor"

    form: str = "dynamics"
    window: int = 20
    samples: int = 1024
    encoder_size: int = 8
    attention_size: int = 4
    head_size: int = 8

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
        for name in ("window", "samples", "encoder_size", "attention_size", "head_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be a whole number from 1 on.")

    @property
    def input_size(self) -> int:
        """Numbers per snapshot that enter the encoders."""
        return self.samples if self.form == "weights" else DYNAMICS

    @property
    def context_size(self) -> int:
        """Numbers per unit that enter the head beside what attention gives."""
        return 0 if self.form == "weights" else CONTEXT
