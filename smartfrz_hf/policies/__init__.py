"""The policies: who decides which units freeze."""

from .autofreeze import AutoFreezePolicy
from .base import Decision, Observation, Policy
from .egeria import EgeriaPolicy
from .freezeout import FreezeOutPolicy
from .grades import GradESPolicy
from .linear import LinearPolicy
from .never import NeverPolicy
from .random import RandomPolicy
from .registry import PEERS, make_policy, policy_name, register_policy, resolve
from .self_cka import SelfCKAPolicy
from .smartfrz import SmartFRZPolicy
from .static import StaticPolicy

__all__ = [
    "PEERS",
    "AutoFreezePolicy",
    "Decision",
    "EgeriaPolicy",
    "FreezeOutPolicy",
    "GradESPolicy",
    "LinearPolicy",
    "NeverPolicy",
    "Observation",
    "Policy",
    "RandomPolicy",
    "SelfCKAPolicy",
    "SmartFRZPolicy",
    "StaticPolicy",
    "make_policy",
    "policy_name",
    "register_policy",
    "resolve",
]
