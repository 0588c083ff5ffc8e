"""A policy that freezes units apart, and the same by hand: what tests of `order="independent"` share."""

from smartfrz_hf import Decision, Policy

# Which units are frozen from which step on. The gap opens behind the third unit, grows, and closes.
PLAN = {4: {3}, 7: {0, 3}, 10: {0, 2, 3}, 14: {0, 1, 2, 3}}


class Told(Policy):
    """Freezes what it is told."""

    by_unit = True

    def __init__(self, plan=PLAN):
        self.plan = plan

    def decide(self, observation):
        due = [units for step, units in self.plan.items() if step <= observation.step]
        return Decision(0, "told", apart=due[-1] if due else ())


def freeze_by_hand(stack, units):
    """What a user would write, to be called after `model.train()` in each step."""
    for index in units:
        for module in stack[index].modules.values():
            module.eval()
        for parameter in stack[index].named_parameters().values():
            parameter.requires_grad_(False)
            parameter.grad = None
