"""Adaptive layer freezing for Hugging Face Transformers (SmartFRZ, ICLR 2023)."""

from .blocks import BlockStack, Unit, find_blocks
from .callback import SmartFRZCallback
from .config import SmartFRZConfig
from .freezing import Freezer
from .ledger import Ledger
from .predictor import SmartFRZPredictor, SmartFRZPredictorConfig, load_predictor
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
]
__version__ = "0.1.0"
