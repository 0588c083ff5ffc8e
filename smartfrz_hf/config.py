"""Every knob of a SmartFRZ run. Imports no torch, so that command lines stay quick."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

OPERATING_POINTS = ("conservative", "balanced", "aggressive")
POLICIES = ("linear", "never", "smartfrz", "static")
FROZEN_DTYPES = ("float16", "bfloat16")
CACHE_DTYPES = ("exact", "float16", "bfloat16", "int8")
CONFIG_NAME = "smartfrz_config.json"


@dataclass
class SmartFRZConfig:
    r"""
    Configuration of [`SmartFRZCallback`] and [`SmartFRZTrainer`]. Every field is an option of
    [`~transformers.HfArgumentParser`].

    Lengths of time follow the convention of [`~transformers.TrainingArguments`]: a number below `1` is a fraction of
    the run's optimizer steps, a number from `1` on is a count of steps.

    Parameters that choose the decision:
        policy (`str`, *optional*, defaults to `"smartfrz"`):
            Who decides: `"smartfrz"` (the predictor), `"static"` (a fixed prefix from the start), `"linear"` (a
            prefix that grows evenly, as in Composer's layer freezing) or `"never"`.
        predictor (`str`, *optional*):
            Hub id or folder of the predictor. The one inside the package is used when it is not given.
        predictor_revision (`str`, *optional*):
            Branch, tag or commit of the predictor on the Hub.
        operating_point (`str`, *optional*, defaults to `"balanced"`):
            How soon a unit counts as converged: `"conservative"`, `"balanced"` or `"aggressive"`. The probability that
            each stands for comes with the predictor, and what each cost on runs held out is in its model card.
        freeze_threshold (`float`, *optional*):
            Probability from which a unit counts as converged, within `[0, 1]`, instead of the operating point's.
        unfreeze_on_restart (`bool`, *optional*, defaults to `True`):
            Whether everything trains again, with an empty history, when the learning rate has fallen and rises again
            (warm restarts). Only for policies that look at the history.
        max_depth (`int`, *optional*):
            Most units that may freeze, counted from the front, stem included. No limit when it is not given.

    Parameters that control the weight history:
        window (`int`, *optional*):
            Snapshots kept per unit. Defaults to what the predictor was made for.
        weights_per_unit (`int`, *optional*):
            Weights recorded per unit and snapshot. Defaults to what the predictor was made for.
        record_every (`float`, *optional*, defaults to `0.005`):
            Time between snapshots.
        sampling_seed (`int`, *optional*, defaults to `0`):
            Seed of the sampled positions.

    Parameters that control the freezing stages:
        first_decision (`float`, *optional*, defaults to `0.05`):
            Time of the first freezing stage.
        decide_every (`float`, *optional*, defaults to `0.05`):
            Time between freezing stages.
        probe_examples (`int`, *optional*, defaults to `16`):
            Most rows of the first training batch that run again at each freezing stage, to see how far what leaves each
            unit still probe_features; fewer where they would take more than 3 % of a short run. `0` leaves it to the weights
            alone, which say less.

    Parameters that control the activation cache:
        activation_cache (`bool`, *optional*, defaults to `True`):
            Whether what crosses the frozen front is kept, so that the front need not run again for a row seen before.
        cache_memory (`float`, *optional*, defaults to `0.25`):
            Memory it may take: below `1` a fraction of the memory free when training starts, from `1` on bytes. That of
            all ranks of a host together, which share one cache.
        cache_disk (`float`, *optional*, defaults to `0`):
            Disk it may take once memory is spent, all ranks of a host together: below `1` a fraction of the free disk,
            from `1` on bytes.
        cache_folder (`str`, *optional*):
            Folder for the part on disk, which is removed at the end. Defaults to that for temporary files.
        cache_dtype (`str`, *optional*, defaults to `"exact"`):
            Format of what is kept: `"exact"`, or, smaller and rounded, `"float16"`, `"bfloat16"` or `"int8"`.

    Parameters that control the frozen front:
        frozen_dtype (`str`, *optional*):
            Precision in which linear and convolution layers of frozen blocks compute, `"bfloat16"` or `"float16"`;
            their weights are kept, and saved, as they are, but a copy of the model meanwhile has rounded ones. That of
            the model when it is not given.
        offload_frozen (`bool`, *optional*, defaults to `False`):
            Whether weights of a front that the activation cache stands in for are moved to host memory until they are
            needed, as by each look of the front probe. Copying the model meanwhile copies no weights; `state_dict` gives
            them.

    Parameters of the other policies:
        static_depth (`float`, *optional*, defaults to `0.5`):
            Units that `"static"` freezes: a fraction of them below `1`, a count from `1` on.
        linear_start (`float`, *optional*, defaults to `0.0`):
            Fraction of the run at which `"linear"` starts to freeze.
        linear_depth (`float`, *optional*, defaults to `0.75`):
            Units that `"linear"` has frozen at the end of the run: a fraction of them up to `1`.

    Parameters that describe the model:
        blocks (`list[str]`, *optional*):
            Dotted names or shell patterns of the blocks in execution order, such as `encoder.layer.*`. They are found
            by themselves in most models.

    Raises:
        ValueError: a field holds a value that cannot work; the message names the legal ones.
    """

    policy: str = field(
        default="smartfrz",
        metadata={"help": "Who decides when a block freezes.", "choices": list(POLICIES)},
    )
    predictor: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the predictor. Default: the one inside the package."}
    )
    predictor_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the predictor on the Hub."}
    )
    operating_point: str = field(
        default="balanced",
        metadata={"help": "How soon a unit counts as converged.", "choices": list(OPERATING_POINTS)},
    )
    freeze_threshold: float | None = field(
        default=None,
        metadata={"help": "Probability from which a unit counts as converged. Default: the operating point's."},
    )
    unfreeze_on_restart: bool = field(
        default=True, metadata={"help": "Train everything again when the learning rate has fallen and rises again."}
    )
    max_depth: int | None = field(
        default=None, metadata={"help": "Most units (stem included) that may freeze. Default: no limit."}
    )
    window: int | None = field(
        default=None, metadata={"help": "Snapshots kept per unit. Default: what the predictor was made for."}
    )
    weights_per_unit: int | None = field(
        default=None, metadata={"help": "Weights per unit and snapshot. Default: what the predictor was made for."}
    )
    record_every: float = field(
        default=0.005, metadata={"help": "Time between snapshots: below 1 a fraction of the run, else steps."}
    )
    sampling_seed: int = field(default=0, metadata={"help": "Seed of the sampled weight positions."})
    first_decision: float = field(
        default=0.05, metadata={"help": "Time of the first freezing stage: below 1 a fraction of the run, else steps."}
    )
    decide_every: float = field(
        default=0.05, metadata={"help": "Time between freezing stages: below 1 a fraction of the run, else steps."}
    )
    probe_examples: int = field(
        default=16, metadata={"help": "Most rows that run again at each freezing stage; 0: look at weights alone."}
    )
    activation_cache: bool = field(
        default=True, metadata={"help": "Keep what crosses the frozen front, so that it need not run again."}
    )
    cache_memory: float = field(
        default=0.25, metadata={"help": "Memory of the cache: below 1 a fraction of what is free, else bytes."}
    )
    cache_disk: float = field(
        default=0.0, metadata={"help": "Disk of the cache: below 1 a fraction of what is free, else bytes."}
    )
    cache_folder: str | None = field(
        default=None, metadata={"help": "Folder for the cache on disk. Default: that for temporary files."}
    )
    cache_dtype: str = field(
        default="exact",
        metadata={"help": "Format of what the cache keeps; all but `exact` round.", "choices": list(CACHE_DTYPES)},
    )
    frozen_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision in which frozen blocks compute. Default: the model's.",
            "choices": list(FROZEN_DTYPES),
        },
    )
    offload_frozen: bool = field(
        default=False, metadata={"help": "Move the weights of a front that is fully cached to host memory."}
    )
    static_depth: float = field(
        default=0.5, metadata={"help": "Units the policy `static` freezes: below 1 a fraction, else a count."}
    )
    linear_start: float = field(
        default=0.0, metadata={"help": "Fraction of the run at which the policy `linear` starts to freeze."}
    )
    linear_depth: float = field(
        default=0.75, metadata={"help": "Fraction of the units the policy `linear` has frozen at the end of the run."}
    )
    blocks: list[str] | None = field(
        default=None,
        metadata={"help": "Dotted names or shell patterns of the blocks, in execution order. Default: found."},
    )

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"`policy` is {self.policy!r}; it must be one of {', '.join(map(repr, POLICIES))}.")
        if self.operating_point not in OPERATING_POINTS:
            legal = ", ".join(map(repr, OPERATING_POINTS))
            raise ValueError(f"`operating_point` is {self.operating_point!r}; it must be one of {legal}.")
        if self.frozen_dtype not in (None, *FROZEN_DTYPES):
            legal = ", ".join(map(repr, FROZEN_DTYPES))
            raise ValueError(f"`frozen_dtype` is {self.frozen_dtype!r}; it must be one of {legal}, or not given.")
        if self.offload_frozen and not self.activation_cache:
            raise ValueError("`offload_frozen` needs `activation_cache`: without it the front runs in every step.")
        if self.cache_dtype not in CACHE_DTYPES:
            legal = ", ".join(map(repr, CACHE_DTYPES))
            raise ValueError(f"`cache_dtype` is {self.cache_dtype!r}; it must be one of {legal}.")
        for name in ("cache_memory", "cache_disk"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(
                    f"`{name}` is {value}; it must be a fraction from 0 to below 1, or a number of bytes."
                )
        for name in ("freeze_threshold", "linear_start", "linear_depth"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` is {value}; it must lie within [0, 1].")
        if self.linear_start == 1:
            raise ValueError("`linear_start` is 1, the end of the run; it must be below 1.")
        for name in ("record_every", "first_decision", "decide_every"):
            value = getattr(self, name)
            if not value > 0 or (value > 1 and value != int(value)):
                raise ValueError(
                    f"`{name}` is {value}; it must be a fraction of the run between 0 and 1, or a whole number of steps."
                )
        if self.static_depth < 0 or (self.static_depth >= 1 and self.static_depth != int(self.static_depth)):
            raise ValueError(
                f"`static_depth` is {self.static_depth}; it must be a fraction below 1 or a whole number of units."
            )
        for name, least in (("window", 2), ("weights_per_unit", 1), ("max_depth", 0), ("probe_examples", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` is {value}; it must be at least {least}, or not given.")
        if self.blocks is not None and not self.blocks:
            raise ValueError("`blocks` is empty; give at least one name or pattern, or leave it out.")

    def steps(self, name: str, max_steps: int) -> int:
        """
        A length of time in optimizer steps.

        Args:
            name (`str`): field that holds it: `"record_every"`, `"first_decision"` or `"decide_every"`.
            max_steps (`int`): optimizer steps of the run.

        Returns:
            `int`: at least 1. Fractions are rounded down, so that a stage is never later than asked for.
        """
        value = getattr(self, name)
        return max(1, int(value * max_steps) if value < 1 else int(value))

    def to_dict(self) -> dict:
        """The fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "SmartFRZConfig":
        """Build from a `dict`; keys of a newer version are dropped with one warning."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            logger.warning(
                f"SmartFRZConfig does not know {', '.join(unknown)} and ignores them: were they written by a newer "
                "version of smartfrz_hf?"
            )
        return cls(**{key: value for key, value in values.items() if key in known})

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `smartfrz_config.json` into a folder, which is made when it is missing."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "SmartFRZConfig":
        """Read `smartfrz_config.json` from a folder."""
        return cls.from_dict(json.loads((Path(folder) / CONFIG_NAME).read_text()))
