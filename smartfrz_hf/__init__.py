"""Adaptive layer freezing for Hugging Face Transformers (SmartFRZ, ICLR 2023)."""

from .arguments import SmartFRZArguments
from .callback import SmartFRZCallback
from .config import SmartFRZConfig
from .cost.ledger import Ledger
from .estimation import Estimate, estimate
from .freezing.freezer import Freezer
from .model.units import BlockStack, Unit, find_blocks
from .policies import Decision, Observation, Policy, register_policy
from .predictor import SmartFRZPredictor, SmartFRZPredictorConfig, load_predictor, push_predictor
from .run import FreezingRun
from .trainer import SmartFRZMixin, SmartFRZTrainer

__all__ = [
    "BlockStack",
    "Decision",
    "Estimate",
    "Freezer",
    "FreezingRun",
    "Ledger",
    "Observation",
    "Policy",
    "SmartFRZArguments",
    "SmartFRZCallback",
    "SmartFRZConfig",
    "SmartFRZMixin",
    "SmartFRZPredictor",
    "SmartFRZPredictorConfig",
    "SmartFRZTrainer",
    "Unit",
    "estimate",
    "find_blocks",
    "load_predictor",
    "push_predictor",
    "register_policy",
]
__version__ = "0.1.0"
