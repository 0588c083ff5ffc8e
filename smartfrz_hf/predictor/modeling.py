"""The attention-based predictor of SmartFRZ (ICLR 2023, arXiv 2401.16720) as a `PreTrainedModel`."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, initialization
from transformers.utils import ModelOutput

from .configuration import DYNAMICS_SIZE, SmartFRZPredictorConfig
from .start import StartPredictor

CLIP = 2.0  # standard deviations at which features are clipped, so that none lies far outside of what was trained on
MIN_LOG_ODDS = -1e4  # of an inactive unit, so that it adds nothing to the odds against freezing


@dataclass
class SmartFRZPredictorOutput(ModelOutput):
    """
    Output of [`SmartFRZPredictor`]; all shapes may have leading batch dimensions.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): binary cross-entropy, if labels are given.
        logits (`torch.Tensor` of shape `(units,)`): log-odds that the unit has converged.
        probabilities (`torch.Tensor` of shape `(units,)`): sigmoid of the logits.
        attentions (`torch.Tensor` of shape `(units, window)`): attention to each snapshot; sums to 1 over the window.
        unit_attentions (`torch.Tensor` of shape `(units, units)`, *optional*):
            Attention of each unit to each unit; sums to 1 over the last dimension.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None
    attentions: torch.Tensor | None = None
    unit_attentions: torch.Tensor | None = None


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes with a ReLU after each but the last."""
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
        query (`torch.Tensor` of shape `(..., queries, size)`): the queries.
        keys (`torch.Tensor` of shape `(..., positions, size)`): the keys.
        values (`torch.Tensor` of shape `(..., positions, features)`): the values.
        mask (`torch.Tensor` of shape `(..., positions)`, `bool`): positions that may be attended to.

    Returns:
        `tuple`: the attended values, `(..., queries, features)`, and the weights, `(..., queries, positions)`.
    """
    scores = query @ keys.transpose(-1, -2) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask.unsqueeze(-2), torch.finfo(scores.dtype).min).softmax(-1)
    return weights @ values, weights


class SmartFRZPredictor(PreTrainedModel):
    r"""
    Predicts the probability that each unit has converged, so that the front of the model up to it can be frozen.

    Three MLPs encode each snapshot of a unit as a query, a key and a value. Only the query of the last snapshot
    attends to the window, so the time of a decision is linear in the window (SmartFRZ, arXiv 2401.16720, section 3.2).

    With `form="weights"`, the form of the paper, an MLP maps the attended value to log-odds, for each unit on its own.

    With `form="dynamics"`, an MLP joins the attended value and the unit's context into one vector per unit, the units
    attend to each other, and an MLP gives the log-odds \\(z_k\\) of each unit. The cost of freezing the front is the
    sum of what its units still had to learn, and the odds against freezing are summed likewise: those of the front up
    to unit \\(u\\) are \\(\sum_{k \le u} e^{-z_k}\\).

    Args:
        config ([`SmartFRZPredictorConfig`]): form and sizes.

    Example:

    ```python
    >>> from smartfrz_hf import load_predictor

    >>> predictor = load_predictor()  # the one that comes with the package
    >>> predictor.config.window, predictor.num_parameters()
    (20, 3724)
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
        unit_size = config.attention_size
        if config.form == "dynamics":
            self.register_buffer("feature_mean", torch.zeros(DYNAMICS_SIZE))
            self.register_buffer("feature_std", torch.ones(DYNAMICS_SIZE))
            unit_size = config.unit_size
            self.join = mlp(config.attention_size + config.context_size, unit_size, unit_size)
            if config.unit_attention:
                self.unit_query, self.unit_key, self.unit_value = (nn.Linear(unit_size, unit_size) for _ in range(3))
        self.head = mlp(unit_size, config.head_size, config.head_size, 1)
        self.start = StartPredictor() if config.start_stage else None
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("temperature", torch.ones(()))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # With the usual standard deviation of 0.02, hardly any signal would pass these narrow MLPs.
        if isinstance(module, nn.Linear):
            initialization.kaiming_uniform_(module.weight, nonlinearity="relu")
            initialization.zeros_(module.bias)

    @classmethod
    def from_default(cls) -> "SmartFRZPredictor":
        """Load the predictor that comes with the package, without network access."""
        from .hub import load_predictor

        return load_predictor()

    def forward(
        self,
        features: torch.Tensor,
        usable: torch.Tensor,
        context: torch.Tensor,
        active: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        by_unit: bool = False,
    ) -> SmartFRZPredictorOutput:
        """
        Score the units of one freezing stage, or of a batch of stages with one more leading dimension.

        Args:
            features (`torch.Tensor` of shape `(units, window, input_size)`):
                Histories, as [`build_inputs`] gives them.
            usable (`torch.Tensor` of shape `(units, window)`, `bool`): snapshots that may be attended to.
            context (`torch.Tensor` of shape `(units, 4)`, or `(units, 11)` with a front probe):
                Where each unit stands, as [`build_inputs`] gives it.
            active (`torch.Tensor` of shape `(units,)`, `bool`, *optional*):
                Units that exist and are not frozen. Defaults to all.
            labels (`torch.Tensor` of shape `(units,)`, *optional*): target probabilities, from 0 to 1.
            by_unit (`bool`, *optional*, defaults to `False`):
                Whether to score each unit on its own, without the odds of the units in front of it.

        Returns:
            [`SmartFRZPredictorOutput`]
        """
        active = torch.ones_like(context[..., 0], dtype=torch.bool) if active is None else active
        unit_attentions = None
        if self.config.form == "dynamics":
            features = ((features - self.feature_mean) / self.feature_std).clamp(-CLIP, CLIP) * usable.unsqueeze(-1)
        query, keys, values = self.query(features[..., -1:, :]), self.key(features), self.value(features)
        units, attentions = attend(query, keys, values, usable)
        units = units.squeeze(-2)
        if self.config.form == "dynamics":
            units = self.join(torch.cat([units, context], dim=-1))
            if self.config.unit_attention:
                attended, unit_attentions = attend(
                    self.unit_query(units), self.unit_key(units), self.unit_value(units), active
                )
                units = units + attended
        logits = self.head(units).squeeze(-1)
        if self.config.form == "dynamics" and self.config.front_sum and not by_unit:
            logits = -(-logits).masked_fill(~active, MIN_LOG_ODDS).logcumsumexp(-1)
        logits = (logits - self.offset) / self.temperature
        loss = None
        if labels is not None:
            loss = nn.functional.binary_cross_entropy_with_logits(logits[active], labels.to(logits.dtype)[active])
        return SmartFRZPredictorOutput(loss, logits, logits.sigmoid(), attentions.squeeze(-2), unit_attentions)
