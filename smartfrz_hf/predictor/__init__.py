"""The predictor of the probability that a unit's output is already what it will be at the end of the run."""

from .configuration import SmartFRZPredictorConfig
from .features import PredictorInputs, build_inputs
from .hub import FILES, default_predictor_path, load_predictor, push_predictor
from .modeling import SmartFRZPredictor, SmartFRZPredictorOutput
from .start import StartPredictor, start_features

__all__ = [
    "FILES",
    "PredictorInputs",
    "SmartFRZPredictor",
    "SmartFRZPredictorConfig",
    "SmartFRZPredictorOutput",
    "StartPredictor",
    "build_inputs",
    "default_predictor_path",
    "load_predictor",
    "push_predictor",
    "start_features",
]
