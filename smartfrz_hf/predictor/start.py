"""The start predictor: what freezing the front from the first step on would cost."""

import math

import torch
from torch import nn

from ..signals.pilot import PilotSignals

START_FEATURES = 9
TINY = 1e-12
CLIP = 3.0  # standard deviations at which features are clipped, so that none lies far outside of what was trained on


def start_features(signals: PilotSignals, total_steps: int, spent: float) -> torch.Tensor:
    r"""
    The inputs of [`StartPredictor`], in use and in training.

    Of the unit \\(u\\), with all that is in front of it:

    1. its place, as a fraction of the units;
    2. \\(\log_{10}\\) of its share in the [`~PilotSignals.contributions`] of all units;
    3. the share of all units up to it, \\(c_u\\), as \\(\log_{10} (c_u + 0.001)\\);
    4. \\(\log_{10}\\) of the signal to noise ratio of its gradients;
    5. \\(\log_{10}\\) of the parameters that still train if the front up to it is frozen;
    6. \\(\log_{10}\\) of their share;
    7. \\(\log_{10}\\) of the optimizer steps of the run;
    8. \\(\log_{10}\\) of all contributions over the share of the summed learning rate that the pilot has spent: how much the
       whole run would change the loss at this pace;
    9. the [`~PilotSignals.agreement`].

    Args:
        signals ([`PilotSignals`]): what the pilot has shown.
        total_steps (`int`): optimizer steps of the run.
        spent (`float`): share of the run's summed learning rate that the pilot has spent.

    Returns:
        `torch.Tensor` of shape `(units, 9)`.
    """
    parameters = signals.parameters.double()
    units = len(parameters) - 1
    contributions = signals.contributions
    share = contributions / contributions.sum().clamp(min=TINY)
    left = parameters.flip(0).cumsum(0).flip(0)[1:]  # behind each unit, with the head
    pace = contributions.sum() / max(spent, 1e-6)
    columns = [
        torch.arange(1, units + 1, dtype=torch.float64) / units,
        (share + 1e-4).log10(),
        (share.cumsum(0) + 1e-3).log10(),
        (signals.signal_to_noise[:-1].double() + 1e-3).log10(),
        (left + 1).log10(),
        (left / parameters.sum()).clamp(min=1e-6).log10(),
        torch.full((units,), math.log10(total_steps), dtype=torch.float64),
        (pace + 1e-3).log10().expand(units),
        torch.full((units,), signals.agreement, dtype=torch.float64),
    ]
    return torch.stack(columns, dim=1).float()


class StartPredictor(nn.Module):
    r"""
    Predicts the points that a run loses if the stem and some blocks are frozen from its first step on.

    An MLP encodes each unit, the units attend to each other, and an MLP gives what freezing each unit adds. What freezing the
    front costs is the sum over its units, so a deeper front never costs less.

    Args:
        size (`int`): width of all layers.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(START_FEATURES))
        self.register_buffer("std", torch.ones(START_FEATURES))
        self.encode = nn.Sequential(nn.Linear(START_FEATURES, size), nn.ReLU(), nn.Linear(size, size))
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        last = nn.Linear(size, 1)
        nn.init.constant_(last.bias, -2.0)  # begin with little that is lost
        self.head = nn.Sequential(nn.Linear(size, size), nn.ReLU(), last)

    def forward(self, features: torch.Tensor, active: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(..., units, 9)`): as [`start_features`] gives them.
            active (`torch.Tensor` of shape `(..., units)`, `bool`, *optional*): units that exist. Defaults to all.

        Returns:
            `torch.Tensor` of shape `(..., units)`: points lost if the front up to each unit is frozen.
        """
        encoded = self.encode(((features - self.mean) / self.std).clamp(-CLIP, CLIP))
        scores = self.query(encoded) @ self.key(encoded).transpose(-1, -2) / encoded.shape[-1] ** 0.5
        if active is not None:
            scores = scores.masked_fill(~active.unsqueeze(-2), torch.finfo(scores.dtype).min)
        encoded = encoded + scores.softmax(-1) @ self.value(encoded)
        return nn.functional.softplus(self.head(encoded).squeeze(-1)).cumsum(-1)
