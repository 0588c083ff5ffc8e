"""The start predictor: what freezing the front from the first step on would cost."""

import torch
from torch import nn

from ..signals.pilot_signals import PilotSignals

PARAMETERS = 5e6  # a front that leaves so many to train costs `scale` times a power of its share
MOST_POINTS = 100.0


class StartPredictor(nn.Module):
    r"""
    Predicts the points that a run loses if the stem and some blocks are frozen from its first step on.

    These are

    $$ a \, c_u^{\,b} \left(n_u / 5 \cdot 10^6\right)^{-d} $$

    with \\(c_u\\) the share of the units up to \\(u\\) in the [`~PilotSignals.contributions`] of all units, and \\(n_u\\) the
    parameters that still train. The three numbers were fitted to real runs. Networks with more inputs did better on new tasks of
    models that they knew, and worse on new models; `benchmarks/predictor/method_card.md` has the figures.

    Attributes:
        log_scale, log_share_power, log_size_power (`torch.nn.Parameter`): logarithms of \\(a\\), \\(b\\) and \\(d\\).
    """

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.log_share_power = nn.Parameter(torch.zeros(()))
        self.log_size_power = nn.Parameter(torch.zeros(()))

    def forward(self, shares: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """
        Args:
            shares (`torch.Tensor` of shape `(units,)`): [`~PilotSignals.front_shares`].
            left (`torch.Tensor` of shape `(units,)`): [`~PilotSignals.parameters_left`].

        Returns:
            `torch.Tensor` of shape `(units,)`: points lost if the front up to each unit is frozen; a deeper front never
            costs less.
        """
        logarithm = (
            self.log_scale
            + self.log_share_power.exp() * shares.clamp(min=1e-3).log()
            - self.log_size_power.exp() * (left.clamp(min=1.0) / PARAMETERS).log()
        )
        return logarithm.exp().clamp(max=MOST_POINTS)

    def predict(self, signals: PilotSignals) -> torch.Tensor:
        """Points lost, `(units,)`, from what a pilot has shown."""
        device = self.log_scale.device
        return self(signals.front_shares.float().to(device), signals.parameters_left.float().to(device))
