"""GradES (Wen et al., 2025, arXiv 2509.01842): what changes little by one step freezes. By unit."""

import torch

from ..config import share_of
from ..signals.steps import BeforeUpdate, l1_norm
from .base import Decision, Observation, Policy, require


class GradESPolicy(Policy):
    r"""
    Freezes the blocks at the front in which every matrix changes by less than a threshold in one step.

    The paper freezes each matrix $W$ of a block on its own: after the fraction $\alpha$ of the run, when
    $\|W_t - W_{t-1}\|_1 < \tau$. (The paper writes gradients, but its package `grades`, for which the thresholds are
    published, compares weights.) A frozen matrix behind one that trains saves only its own weight gradient. Here a block
    freezes once all its matrices fulfil the rule and all blocks in front of it are frozen, so that the backward pass ends
    there. The stem freezes together with the first block; the paper's code does not look at embeddings. With
    `order="independent"`, a block freezes wherever it is.

    The paper's code applies the rule after every step: `SmartFRZConfig(first_decision=1, decide_every=1)`. With a longer
    time between freezing stages, the last step before each stage counts.

    From $\alpha$ on, it keeps a copy of the active blocks' matrices. Nothing has to be saved in a checkpoint.

    Args:
        tau (`float`, *optional*, defaults to `2.404167`): the README's value for full fine-tuning. It is a sum over the
            matrix, so it depends on the size of the model.
        alpha (`float`, *optional*, defaults to `0.55`): fraction of the run in which nothing freezes; the README's value.
    """

    by_unit = True

    def __init__(self, tau: float = 2.404167, alpha: float = 0.55):
        require("tau", tau, tau > 0, "above 0")
        require("alpha", alpha, 0 <= alpha <= 1, "from 0 to 1")
        self.tau, self.alpha = tau, alpha
        self.reset()

    def reset(self) -> None:
        """Forget the copies."""
        self._before: dict[int, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}

    def before_update(self, now: BeforeUpdate) -> None:
        """Copy the matrices of the active blocks."""
        self._before = {}
        if now.step + 1 >= share_of(self.alpha, now.max_steps):
            for unit in range(max(1, now.depth), now.units):
                matrices = (p for p in now.weights(unit).values() if p.dim() >= 2)
                self._before[unit] = [(p, p.detach().clone()) for p in matrices]

    def decide(self, observation: Observation) -> Decision:
        """
        Freeze the front up to the first block with a matrix that changes more than the threshold allows, or all blocks without
        such a matrix.
        """
        reached, largest, apart = max(1, observation.depth), 0.0, set()
        for unit, matrices in self._before.items():
            change = max((l1_norm(p.detach() - before) for p, before in matrices), default=0.0)
            if reached == unit:
                largest = change
            if change < self.tau:
                apart.add(unit)
                reached += reached == unit
            elif observation.order == "front":
                break
        self._before = {}
        depth = reached if reached > 1 else 0
        reason = f"largest change of a matrix {largest:.3g}, threshold {self.tau:g}"
        return Decision(max(depth, observation.depth), reason, apart=apart)
