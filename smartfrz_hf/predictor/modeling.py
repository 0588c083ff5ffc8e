"""The attention-based predictor of SmartFRZ (ICLR 2023, arXiv 2401.16720) as a `PreTrainedModel`."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, initialization
from transformers.utils import ModelOutput

from .configuration import DYNAMICS, SmartFRZPredictorConfig

EPSILON = 1e-12
FLOOR = 1e-9


@dataclass
class SmartFRZPredictorOutput(ModelOutput):
    """
    Output of [`SmartFRZPredictor`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): binary cross-entropy, when labels are given.
        logits (`torch.Tensor` of shape `(units,)`): log-odds that the unit has converged.
        probabilities (`torch.Tensor` of shape `(units,)`): their sigmoid.
        attentions (`torch.Tensor` of shape `(units, window)`): weight of each snapshot; sums to 1.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None
    attentions: torch.Tensor | None = None


def dynamics(snapshots: torch.Tensor, start: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    How the sampled weights move, in quantities that know neither their scale, their order nor their number.

    With \\(w_t\\) the snapshot, \\(w_0\\) the one at the start of the run, \\(w_T\\) the last one and
    \\(u_t = w_t - w_{t-1}\\), the eight quantities of a snapshot are

    1. \\(\log_{10} \|u_t\| / \|w_T\|\\), the relative size of the update;
    2. \\(\cos(u_t, u_{t-1})\\), whether updates agree;
    3. \\(\log_{10} \|w_T - w_t\| / \|w_T\|\\), the way since then;
    4. \\(\log_{10} \|w_t - w_0\| / \|w_T\|\\), the displacement from the start;
    5. \\(\cos(u_t, w_T - w_0)\\), whether the update goes the way of the whole run;
    6. \\(\|w_T - w_t\| / \sum_{s>t} \|u_s\|\\), the straightness of the path since then;
    7. \\(\log_{10} \|u_t\| / \overline{\|u\|}\\), the update against the window's mean;
    8. the snapshot's age, as a fraction of the window.

    Args:
        snapshots (`torch.Tensor` of shape `(units, window, samples)`): oldest first.
        start (`torch.Tensor` of shape `(units, samples)`): the snapshot at the start of the run.
        mask (`torch.Tensor` of shape `(units, window)`, `bool`): which snapshots have a real one before them.

    Returns:
        `torch.Tensor` of shape `(units, window, 8)`; zero where the mask is off.
    """
    real = mask.to(snapshots.dtype)
    last = snapshots[:, -1:]
    update = (snapshots - snapshots.roll(1, 1)) * real.unsqueeze(-1)
    size = update.norm(dim=-1)
    norm = last.norm(dim=-1).clamp(min=EPSILON)
    since, displaced, whole = last - snapshots, snapshots - start.unsqueeze(1), last - start.unsqueeze(1)
    path = size.flip(1).cumsum(1).flip(1) - size  # what was walked after each snapshot
    mean = (size * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)

    def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=EPSILON)

    window = snapshots.shape[1]
    age = torch.arange(window - 1, -1, -1, device=snapshots.device, dtype=snapshots.dtype) / window
    features = torch.stack(
        [
            (size / norm).clamp(min=FLOOR).log10(),
            cosine(update, update.roll(1, 1) * real.roll(1, 1).unsqueeze(-1)),
            (since.norm(dim=-1) / norm).clamp(min=FLOOR).log10(),
            (displaced.norm(dim=-1) / norm).clamp(min=FLOOR).log10(),
            cosine(update, whole),
            since.norm(dim=-1) / path.clamp(min=EPSILON),
            (size / mean.clamp(min=EPSILON)).clamp(min=FLOOR).log10(),
            age.expand_as(size),
        ],
        dim=-1,
    )
    return features * real.unsqueeze(-1)


def _mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class SmartFRZPredictor(PreTrainedModel):
    """
    Says how likely it is that each unit's representation already is what it will be at the end of the run.

    Three MLPs turn each snapshot of a unit into a query, a key and a value. The query of the last snapshot alone
    attends over the window, so that a decision costs time linear in it; a small MLP makes the log-odds of what
    attention gives. Units are scored independently of each other.

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
    main_input_name = "snapshots"
    config: SmartFRZPredictorConfig
    feature_mean: torch.Tensor
    feature_std: torch.Tensor

    def __init__(self, config: SmartFRZPredictorConfig):
        super().__init__(config)
        sizes = (config.input_size, config.encoder_size, config.encoder_size, config.attention_size)
        self.query, self.key, self.value = _mlp(*sizes), _mlp(*sizes), _mlp(*sizes)
        self.head = _mlp(config.attention_size + config.context_size, config.head_size, config.head_size, 1)
        if config.form == "dynamics":
            self.register_buffer("feature_mean", torch.zeros(DYNAMICS))
            self.register_buffer("feature_std", torch.ones(DYNAMICS))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # The usual standard deviation of 0.02 would start these narrow MLPs with no signal at all.
        if isinstance(module, nn.Linear):
            initialization.kaiming_uniform_(module.weight, nonlinearity="relu")
            initialization.zeros_(module.bias)

    @classmethod
    def from_default(cls) -> "SmartFRZPredictor":
        """The predictor inside the package, loaded with no network."""
        from .loading import load_predictor

        return load_predictor()

    def encode(self, snapshots: torch.Tensor, start: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What enters the query, key and value MLPs: `torch.Tensor` of shape `(units, window, input_size)`."""
        if self.config.form == "weights":
            return snapshots
        return (dynamics(snapshots, start, mask) - self.feature_mean) / self.feature_std

    def usable(self, mask: torch.Tensor) -> torch.Tensor:
        """The snapshots that attention may look at: for dynamics, those with a real one before them."""
        if self.config.form == "weights":
            return mask
        return mask & torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)

    def forward(
        self,
        snapshots: torch.Tensor,
        start: torch.Tensor,
        mask: torch.Tensor,
        context: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> SmartFRZPredictorOutput:
        """
        Score units.

        Args:
            snapshots (`torch.Tensor` of shape `(units, window, samples)`): histories, oldest snapshot first.
            start (`torch.Tensor` of shape `(units, samples)`): the snapshot at the start of the run.
            mask (`torch.Tensor` of shape `(units, window)`, `bool`): which snapshots are real; the last must be.
            context (`torch.Tensor` of shape `(units, 4)`): relative depth, progress, learning rate relative to its
                peak, and the share of the summed learning rate still to come.
            labels (`torch.Tensor` of shape `(units,)`, *optional*): 1 for converged, 0 for not.

        Returns:
            [`SmartFRZPredictorOutput`]
        """
        usable = self.usable(mask)
        encoded = self.encode(snapshots, start, usable)
        query, keys, values = self.query(encoded[:, -1]), self.key(encoded), self.value(encoded)
        scores = (keys * query.unsqueeze(1)).sum(-1) / self.config.attention_size**0.5
        attentions = scores.masked_fill(~usable, float("-inf")).softmax(-1)
        attended = (attentions.unsqueeze(-1) * values).sum(1)
        if self.config.context_size:
            attended = torch.cat([attended, context], dim=-1)
        logits = self.head(attended).squeeze(-1)
        loss = None
        if labels is not None:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return SmartFRZPredictorOutput(loss, logits, logits.sigmoid(), attentions)
