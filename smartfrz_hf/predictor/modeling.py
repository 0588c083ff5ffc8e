"""The attention-based predictor of SmartFRZ (ICLR 2023, arXiv 2401.16720) as a `PreTrainedModel`."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, initialization
from transformers.utils import ModelOutput

from .configuration import SmartFRZPredictorConfig
from .features import DYNAMICS, dynamics

# Standard deviations. What lies further out than anything seen in training is told as far out, and no further.
CLIP = 2.0
MIN_LOG_ODDS = -1e4  # log of the odds against freezing of a unit that is not there


@dataclass
class SmartFRZPredictorOutput(ModelOutput):
    """
    Output of [`SmartFRZPredictor`]; all shapes may have further dimensions in front.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): binary cross-entropy, when labels are given.
        logits (`torch.Tensor` of shape `(units,)`): log-odds that the unit has converged.
        probabilities (`torch.Tensor` of shape `(units,)`): their sigmoid.
        attentions (`torch.Tensor` of shape `(units, window)`): weight of each snapshot; sums to 1.
        unit_attentions (`torch.Tensor` of shape `(units, units)`, *optional*): weight of each unit to each; sums to 1.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None
    attentions: torch.Tensor | None = None
    unit_attentions: torch.Tensor | None = None


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes with a ReLU between each two."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Scaled dot-product attention.

    Args:
        query (`torch.Tensor` of shape `(..., queries, size)`): what asks.
        keys (`torch.Tensor` of shape `(..., places, size)`): what is compared with it.
        values (`torch.Tensor` of shape `(..., places, features)`): what is found.
        mask (`torch.Tensor` of shape `(..., places)`, `bool`): where to look.

    Returns:
        `tuple`: what is found, `(..., queries, features)`, and the weights, `(..., queries, places)`.
    """
    scores = query @ keys.transpose(-1, -2) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask.unsqueeze(-2), torch.finfo(scores.dtype).min).softmax(-1)
    return weights @ values, weights


class SmartFRZPredictor(PreTrainedModel):
    r"""
    Says how likely it is that each unit has converged, so that the front of the model may freeze up to it.

    Three MLPs turn each snapshot of a unit into a query, a key and a value. The query of the last snapshot alone
    attends over the window, so that a decision costs time linear in it (SmartFRZ, section 3.2). With `form="weights"`, a
    small MLP makes the log-odds of what attention gives, each unit for itself, as in the paper. With
    `form="dynamics"`, what attention gives and where in the run and in the model the unit stands become one vector a
    unit; the units of a model attend to each other, since none can settle before what feeds it; and an MLP makes the
    log-odds of each unit. What freezing the front costs is the sum of what its units still had to do, and so are the
    odds against freezing: those of the front up to unit \\(u\\) are \\(\sum_{k \le u} e^{-z_k}\\), with
    \\(z_k\\) the log-odds of the units alone.

    Args:
        config ([`SmartFRZPredictorConfig`]): form and sizes.

    Example:

    ```python
    >>> from smartfrz_hf import load_predictor

    >>> predictor = load_predictor()  # from the package; a Hub id or a folder loads another one
    >>> predictor.config.window
    20
    ```
    """

    config_class = SmartFRZPredictorConfig
    base_model_prefix = "predictor"
    main_input_name = "features"
    config: SmartFRZPredictorConfig
    feature_mean: torch.Tensor
    feature_std: torch.Tensor
    offset: torch.Tensor
    temperature: torch.Tensor

    def __init__(self, config: SmartFRZPredictorConfig):
        super().__init__(config)
        sizes = (config.input_size, config.encoder_size, config.encoder_size, config.attention_size)
        self.query, self.key, self.value = mlp(*sizes), mlp(*sizes), mlp(*sizes)
        found = config.attention_size + config.context_size
        if config.form == "dynamics":
            self.register_buffer("feature_mean", torch.zeros(DYNAMICS))
            self.register_buffer("feature_std", torch.ones(DYNAMICS))
            self.join = mlp(found, config.unit_size, config.unit_size)
            found = config.unit_size
            if config.unit_attention:
                self.unit_query, self.unit_key, self.unit_value = (nn.Linear(found, found) for _ in range(3))
        self.head = mlp(found, config.head_size, config.head_size, 1)
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("temperature", torch.ones(()))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # The usual standard deviation of 0.02 would start these narrow MLPs with no signal at all.
        if isinstance(module, nn.Linear):
            initialization.kaiming_uniform_(module.weight, nonlinearity="relu")
            initialization.zeros_(module.bias)

    @classmethod
    def from_default(cls) -> "SmartFRZPredictor":
        """The predictor inside the package, loaded with no network."""
        from .hub import load_predictor

        return load_predictor()

    def read(
        self, snapshots: torch.Tensor, start: torch.Tensor, mask: torch.Tensor, spent: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What a history is to the network.

        Args:
            snapshots (`torch.Tensor` of shape `(units, window, weights_per_unit)`): oldest first.
            start (`torch.Tensor` of shape `(units, weights_per_unit)`): the snapshot at the start of the run.
            mask (`torch.Tensor` of shape `(window,)`, `bool`): which snapshots are real; the last two must be.
            spent (`torch.Tensor` of shape `(window,)`): share of the summed learning rate spent before each snapshot.

        Returns:
            `tuple`: `features` `(units, window, input_size)`, and `usable` `(units, window)`, where there are any: for
            dynamics, at snapshots with a real one before them.
        """
        if self.config.form == "weights":
            return snapshots * mask.unsqueeze(-1), mask.expand(len(snapshots), -1)
        usable = mask & torch.cat([torch.zeros_like(mask[:1]), mask[:-1]])
        return dynamics(snapshots, start, usable, spent), usable.expand(len(snapshots), -1)

    def forward(
        self,
        features: torch.Tensor,
        usable: torch.Tensor,
        context: torch.Tensor,
        active: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SmartFRZPredictorOutput:
        """
        Score the units of one freezing stage, or, with one more dimension in front, of many.

        Args:
            features (`torch.Tensor` of shape `(units, window, input_size)`): histories, as `read` gives them.
            usable (`torch.Tensor` of shape `(units, window)`, `bool`): which snapshots attention may look at.
            context (`torch.Tensor` of shape `(units, context_size)`): relative depth, progress, learning rate relative to
                its peak, and the share of the summed learning rate still to come; and how the front probe probe_features.
            active (`torch.Tensor` of shape `(units,)`, `bool`, *optional*): which units there are. All when not given.
            labels (`torch.Tensor` of shape `(units,)`, *optional*): 1 for converged, 0 for not, or between.

        Returns:
            [`SmartFRZPredictorOutput`]
        """
        active = torch.ones_like(context[..., 0], dtype=torch.bool) if active is None else active
        unit_attentions = None
        if self.config.form == "dynamics":
            features = ((features - self.feature_mean) / self.feature_std).clamp(-CLIP, CLIP) * usable.unsqueeze(-1)
        query, keys, values = self.query(features[..., -1:, :]), self.key(features), self.value(features)
        found, attentions = attend(query, keys, values, usable)
        found = found.squeeze(-2)
        if self.config.form == "dynamics":
            found = self.join(torch.cat([found, context], dim=-1))
            if self.config.unit_attention:
                shared, unit_attentions = attend(
                    self.unit_query(found), self.unit_key(found), self.unit_value(found), active
                )
                found = found + shared
        logits = self.head(found).squeeze(-1)
        if self.config.form == "dynamics" and self.config.front_sum:
            logits = -(-logits).masked_fill(~active, MIN_LOG_ODDS).logcumsumexp(-1)
        logits = (logits - self.offset) / self.temperature
        loss = None
        if labels is not None:
            wanted = labels.to(logits.dtype)
            loss = nn.functional.binary_cross_entropy_with_logits(logits[active], wanted[active])
        return SmartFRZPredictorOutput(loss, logits, logits.sigmoid(), attentions.squeeze(-2), unit_attentions)
