"""The predictor: has a unit's representation become what it will be at the end of the run?"""

from .configuration import SmartFRZPredictorConfig
from .hub import FILES, default_predictor_path, load_predictor, push_predictor
from .modeling import SmartFRZPredictor, SmartFRZPredictorOutput

__all__ = [
    "FILES",
    "SmartFRZPredictor",
    "SmartFRZPredictorConfig",
    "SmartFRZPredictorOutput",
    "default_predictor_path",
    "load_predictor",
    "push_predictor",
]
