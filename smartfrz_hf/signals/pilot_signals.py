"""What the pilot has shown: what each unit has brought, and how far the rate of the rest may rise."""

from dataclasses import dataclass

import torch

MAX_RATE_FACTOR = 4.0
REACH_SHARE = 0.1
# How far a step may move the weights, relative to them, at a rate that is raised because fewer units train. Where a step moves them
# by 0.0003 to 0.0005 (SmolLM2, MiniLM), a rate 1.6 to 1.75 times as high is as good or better; at 0.0008 to 0.0011 (BERT) full training
# at 1.5 times its rate loses accuracy, and one of eight runs at 1.6 times stalled.
MOST_MOTION = 0.001
LEAST_AGREEMENT = -0.1  # over four steps, runs that learn have had -0.05 by chance
EPSILON = 1e-30


@dataclass(frozen=True)
class PilotSignals:
    r"""
    What the first steps of a run show of each unit, at its sampled weights.

    With \\(g_t\\) the gradient before step \\(t\\) and \\(w_t\\) the weights then, for each unit and, last, the head (zeros where it
    has nothing to train):

    Attributes:
        steps (`int`): optimizer steps.
        parameters (`torch.Tensor` of shape `(units + 1,)`): trainable parameters.
        gradient (`torch.Tensor` of shape `(units + 1,)`): root mean square of the gradient of one weight.
        loss_change (`torch.Tensor` of shape `(units + 1,)`):
            \\(\sum_t g_{t+1} \cdot (w_{t+1} - w_t)\\), the change of the loss that the unit's motion has brought, for one
            weight ("loss change allocation", Lan et al., NeurIPS 2019).
        displacement (`torch.Tensor` of shape `(units + 1,)`): root mean square of \\(w_T - w_0\\).
        motion (`torch.Tensor` of shape `(units + 1,)`):
            What a step at the peak of the learning rate moves a weight by, relative to the weights of its unit: root mean squares of
            \\(w_{t+1} - w_t\\) over those of \\(w_0\\) and of the learning rates relative to the peak.
        pretrained (`int`): units in front of the first block whose weights are as a library initializes them.
        regression (`bool`): whether the model has a single output. Its pilot shows how the mean of the labels is learned.
        language (`bool`): whether the model predicts tokens. All its blocks go on learning.
        positions (`bool`): whether the model has an output for each token or frame. Its front goes on learning for long.
    """

    steps: int
    parameters: torch.Tensor
    gradient: torch.Tensor
    loss_change: torch.Tensor
    displacement: torch.Tensor
    motion: torch.Tensor
    pretrained: int
    regression: bool = False
    language: bool = False
    positions: bool = False

    @property
    def reach(self) -> torch.Tensor:
        """
        By how much each unit's motion could have changed the loss at most, `(units,)`: the root mean squares of its gradient and
        of its motion, times its parameters.
        """
        return (self.gradient.double() * self.displacement * self.parameters)[:-1]

    @property
    def contributions(self) -> torch.Tensor:
        """
        By how much each unit's motion has lowered the loss, `(units,)`. A tenth of its reach is added, since a few steps show
        little, and no unit is worth nothing.
        """
        lowered = (-self.loss_change.double() * self.parameters)[:-1].clamp(min=0)
        return lowered + REACH_SHARE * self.reach

    @property
    def front_shares(self) -> torch.Tensor:
        """The share of each unit and all in front of it in the contributions of all units, `(units,)`."""
        return self.contributions.cumsum(0) / self.contributions.sum().clamp(min=EPSILON)

    @property
    def parameters_left(self) -> torch.Tensor:
        """The parameters that still train if the front up to each unit is frozen, with the head, `(units,)`."""
        return self.parameters.double().flip(0).cumsum(0).flip(0)[1:]

    @property
    def agreement(self) -> float:
        """Change of the loss that the motion of all units has brought, over their reach; positive where the loss falls."""
        lowered = -float((self.loss_change.double() * self.parameters)[:-1].sum())
        return lowered / max(float(self.reach.sum()), EPSILON)

    @property
    def finite(self) -> bool:
        """Whether a step with finite gradients was recorded, and all weights were finite after the last step."""
        return self.steps > 0 and bool(self.displacement.isfinite().all())

    @property
    def problem(self) -> str | None:
        """What is wrong with the pilot or the weights that it began with, if anything is."""
        if not self.pretrained:
            return "the blocks are as a library initializes them"
        if not self.finite:
            return "the weights or gradients are not finite in the pilot"
        if not self.reach.sum() > 0:
            return "no weight moves in the pilot"
        if not self.agreement > LEAST_AGREEMENT:  # also where it is not a number
            return "the loss rises in the pilot"
        return None

    @property
    def objection(self) -> str | None:
        """Why nothing should freeze from the start, if there is a reason."""
        if self.problem is None and self.regression:
            return "the pilot of a regression shows little but the mean of its labels"
        if self.problem is None and self.language:
            return "a language model needs its whole depth to learn a text"
        if self.problem is None and self.positions:
            return "with an output for each token, a frozen front costs more than it is expected to"
        return self.problem

    def rate_factor(self, depth: int) -> float:
        r"""
        What the learning rate of the rest is multiplied with if the front is frozen.

        That is the larger of two factors, and at most 4:

        - \\(U / (U - d)\\) with \\(d\\) of \\(U\\) units frozen, as fewer units train best at a higher rate, but no more than lets a
          step move a unit that trains by 0.001 of its weights. Units that have nothing to train do not count.
        - \\(1 / (1 - c)\\), with \\(c\\) the share of the front in the contributions of all units: so the loss falls as fast as it
          would with everything training. The head is left out: it brings much in the pilot, and soon no longer.

        It is 1 where the contributions are not finite.

        Args:
            depth (`int`): frozen units.
        """
        total, rest = float(self.contributions.sum()), float(self.contributions[depth:].sum())
        if not 0 < total < float("inf"):
            return 1.0
        trains = self.parameters[:-1] > 0
        motion = max(self.motion[:-1][depth:].tolist(), default=float("inf"))
        fewer = min(int(trains.sum()) / max(int(trains[depth:].sum()), EPSILON), MOST_MOTION / max(motion, EPSILON))
        return min(MAX_RATE_FACTOR, max(fewer, total / max(rest, EPSILON)))
