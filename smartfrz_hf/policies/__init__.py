"""The policies: who decides which units freeze."""

from .base import Decision, Observation, Policy
from .linear import LinearPolicy
from .never import NeverPolicy
from .registry import make_policy, register_policy, resolve
from .smartfrz import SmartFRZPolicy
from .static import StaticPolicy

__all__ = [
    "Decision",
    "LinearPolicy",
    "NeverPolicy",
    "Observation",
    "Policy",
    "SmartFRZPolicy",
    "StaticPolicy",
    "make_policy",
    "register_policy",
    "resolve",
]
