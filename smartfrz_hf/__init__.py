"""Adaptive layer freezing for Hugging Face Transformers (SmartFRZ, ICLR 2023)."""

from .callback import SmartFRZCallback
from .config import SmartFRZConfig
from .cost.ledger import Ledger
from .freezing.freezer import Freezer
from .model.units import BlockStack, Unit, find_blocks
from .predictor import SmartFRZPredictor, SmartFRZPredictorConfig, load_predictor, push_predictor
from .trainer import SmartFRZMixin, SmartFRZTrainer

__all__ = [
    "BlockStack",
    "Freezer",
    "Ledger",
    "SmartFRZCallback",
    "SmartFRZConfig",
    "SmartFRZMixin",
    "SmartFRZPredictor",
    "SmartFRZPredictorConfig",
    "SmartFRZTrainer",
    "Unit",
    "find_blocks",
    "load_predictor",
    "push_predictor",
]
__version__ = "0.1.0"
