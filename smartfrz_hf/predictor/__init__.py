"""The predictor: has a unit's representation become what it will be at the end of the run?"""

from .configuration import SmartFRZPredictorConfig
from .loading import default_predictor_path, load_predictor
from .modeling import SmartFRZPredictor, SmartFRZPredictorOutput

__all__ = [
    "SmartFRZPredictor",
    "SmartFRZPredictorConfig",
    "SmartFRZPredictorOutput",
    "default_predictor_path",
    "load_predictor",
]
