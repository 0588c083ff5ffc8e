"""Adaptive layer freezing for Hugging Face Transformers (SmartFRZ, ICLR 2023)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

# Imported when they are first used: what needs no torch, such as `smartfrz --help`, does not wait for it.
_PLACES = {
    "BlockStack": ".model.units",
    "Decision": ".policies",
    "Estimate": ".estimation",
    "Freezer": ".freezing.freezer",
    "FreezingRun": ".run",
    "Ledger": ".cost.ledger",
    "Observation": ".policies",
    "Policy": ".policies",
    "SmartFRZArguments": ".arguments",
    "SmartFRZCallback": ".callback",
    "SmartFRZConfig": ".config",
    "SmartFRZMixin": ".trainer",
    "SmartFRZPredictor": ".predictor",
    "SmartFRZPredictorConfig": ".predictor",
    "SmartFRZTrainer": ".trainer",
    "Unit": ".model.units",
    "estimate": ".estimation",
    "find_blocks": ".model.units",
    "load_predictor": ".predictor",
    "push_predictor": ".predictor",
    "register_policy": ".policies",
}

if not TYPE_CHECKING:  # type checkers know all names, and see misspelt ones

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in _PLACES:
            globals()[name] = value = getattr(import_module(_PLACES[name], __name__), name)
            return value
        try:
            return import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
