"""The rules of other papers, with settings by which they freeze within a few steps."""

from smartfrz_hf.policies import (
    AutoFreezePolicy,
    EgeriaPolicy,
    FreezeOutPolicy,
    GradESPolicy,
    RandomPolicy,
    SelfCKAPolicy,
)

QUICK = {
    "autofreeze": lambda: AutoFreezePolicy(percentile=80),
    "egeria": lambda: EgeriaPolicy(window=2, tolerance=0.9, renew_every=3),
    "freezeout": lambda: FreezeOutPolicy(start=0.3, power=1),
    "grades": lambda: GradESPolicy(tau=1.0, alpha=0.3),
    "random": lambda: RandomPolicy(0.6, seed=2),
    "self_cka": lambda: SelfCKAPolicy(0.01),
}
