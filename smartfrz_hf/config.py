"""All options of a SmartFRZ run. Imports no torch, so that command lines stay quick."""

import json
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_origin, get_type_hints

from huggingface_hub import HfApi, hf_hub_download

from .choices import one_of
from .sizes import Size

ORDERS = ("front", "independent")
OPERATING_POINTS = ("conservative", "balanced", "aggressive")
# `register_policy` adds to it.
POLICIES = ["linear", "never", "smartfrz", "static"]
POLICIES += ["autofreeze", "egeria", "freezeout", "grades", "random", "self_cka"]
WITHOUT_TARGET = frozenset(POLICIES) - {"smartfrz"}
FROZEN_DTYPES = ("float16", "bfloat16")
CACHE_DTYPES = ("exact", "float16", "bfloat16", "int8")
CONFIG_NAME = "smartfrz_config.json"


def share_of(share: float, whole: float) -> int:
    """A share of a number, rounded down. `0.29 * 100` is 29, although the product of these floats is a little less."""
    return int(share * whole + 1e-9)


def _is_share_or_count(value: float) -> bool:
    return 0 <= value < 1 or (value >= 1 and value % 1 == 0)


def _help(documentation: str, name: str) -> str:
    """The description of one argument in a docstring, as plain text for the help of a command line."""
    match = re.search(rf"^ +{name} \(.*?\):\n((?: {{12}}.*\n)+)", documentation, re.MULTILINE)
    text = re.sub(r"\[(`[^`]+`)\]|`", lambda link: (link[1] or "").strip("`"), match[1] if match else "")
    return " ".join(text.split()).replace("%", "%%")  # argparse formats it


@dataclass
class SmartFRZConfig:
    r"""
    Configuration of [`SmartFRZCallback`], [`SmartFRZTrainer`] and [`FreezingRun`].

    A length of time below `1` is a fraction of the run's optimizer steps; from `1` on it is a number of steps, as in
    [`~transformers.TrainingArguments`].

    Parameters that control the decision:
        policy (`str`, *optional*, defaults to `"smartfrz"`):
            What decides: `"smartfrz"` (the predictor), `"static"` (a fixed number of units from the start), `"linear"`
            (a number that grows evenly, as in Composer's layer freezing), `"never"`, a rule of another paper, with its
            published settings where they are known (`"autofreeze"`, `"egeria"`, `"freezeout"`, `"grades"`, `"self_cka"`),
            `"random"`, or a name that was given to [`register_policy`].
        order (`str`, *optional*, defaults to `"front"`):
            Which units may freeze: `"front"`, those in front of all that train, or `"independent"`, any, one by one, as in the
            paper. A unit that is frozen behind one that trains saves its weight gradients and its optimizer steps only: the
            backward pass still runs through it. For the policies `"smartfrz"` and `"grades"`, and your own.
        predictor (`str`, *optional*, defaults to `"smartfrz-base"`):
            Predictor on the Hub or in a folder. `"smartfrz-base"` comes with the package and needs no network.
        predictor_revision (`str`, *optional*):
            Branch, tag or commit of the predictor on the Hub.
        operating_point (`str`, *optional*, defaults to `"balanced"`):
            How early units freeze: `"conservative"`, `"balanced"` or `"aggressive"`. For each, the predictor comes with
            a probability from which units freeze, and with limits for a front that freezes from the start.
        freeze_threshold (`float`, *optional*):
            Probability in `[0, 1]` from which a unit freezes, in place of the operating point's, also once a front has frozen from
            the start.
        start_stage (`bool`, *optional*, defaults to `True`):
            Whether the predictor may freeze a front from the start: after the first steps of the run, the pilot, units
            within the limits of the operating point freeze with the weights that they had before training.
        compensate_rate (`bool`, *optional*, defaults to `True`):
            Whether the learning rate of what still trains is raised when a front freezes from the start: it is divided by the
            share of the units that still train, as far as a step stays small against the weights, and at least raised so that the
            loss falls as fast as before. Done inside the optimizer's steps: the scheduler and the logs keep the rate of the schedule.
        target_saving (`float`, *optional*):
            Share of the compute to be saved without the activation cache, in place of the operating point: at the end of
            the pilot as many units freeze as that takes.
        unfreeze_on_restart (`bool`, *optional*, defaults to `True`):
            Whether everything trains again when the learning rate rises again after it has fallen (warm restarts). Only
            for policies that use the weight history.
        max_depth (`int`, *optional*):
            Most units that may freeze, counted from the front, the stem included. No limit by default.
        when_all_frozen (`str`, *optional*, defaults to `"keep_last"`):
            What happens when the policy freezes all that can train: `"keep_last"` keeps the last trainable unit active,
            `"stop"` ends training early.

    Parameters that control the weight history:
        record_every (`float`, *optional*, defaults to `0.005`):
            Time between snapshots: below 1 a fraction of the run, else steps.
        sampling_seed (`int`, *optional*, defaults to `0`):
            Seed of the sampled weight positions.

    Parameters that control the freezing stages:
        first_decision (`float`, *optional*, defaults to `0.05`):
            Time of the first freezing stage: below 1 a fraction of the run, else steps. The policy `"smartfrz"` freezes
            nothing in the first fifth of the run while the learning rate is near its peak, and nothing before 65 % of the run
            once a block has frozen from the start.
        decide_every (`float`, *optional*, defaults to `0.05`):
            Time between freezing stages: below 1 a fraction of the run, else steps.
        probe_examples (`int`, *optional*, defaults to `16`):
            Most examples of the first training batch that run again at each freezing stage, to see how the outputs of
            the units change. Fewer are used where they would take more than 3 % of a short run. `0` turns it off.

    Parameters that control the activation cache:
        activation_cache (`bool`, *optional*, defaults to `True`):
            Whether the output of the frozen front is kept and used again for rows that were seen before.
        cache_memory (`float` or `str`, *optional*, defaults to `0.25`):
            Memory of the cache: a fraction of the memory that is free when training starts, or bytes (`8e9`, `"8GB"`). The
            processes of a machine share it.
        cache_device_memory (`float` or `str`, *optional*, defaults to `0.25`):
            Memory of the accelerator that the cache takes first, in runs of one process: a fraction of what training
            leaves free, or bytes.
        cache_disk (`float` or `str`, *optional*, defaults to `0`):
            Disk of the cache, once its memory is full: a fraction of the free disk, or bytes.
        cache_folder (`str`, *optional*):
            Folder for the part of the cache on disk, which is removed at the end. Defaults to the one for temporary files.
        cache_dtype (`str`, *optional*, defaults to `"exact"`):
            Format of the cached outputs: `"exact"`, or smaller and rounded `"float16"`, `"bfloat16"`, `"int8"`.

    Parameters that control the frozen front:
        frozen_dtype (`str`, *optional*):
            Precision in which linear and convolution layers of frozen blocks compute, `"bfloat16"` or `"float16"`. Saved
            weights keep their precision. Defaults to the model's precision.
        offload_frozen (`bool`, *optional*, defaults to `False`):
            Whether the weights of a front whose outputs are all cached move to host memory until they are needed.

    Parameters of the other policies:
        static_depth (`float`, *optional*, defaults to `0.5`):
            Units that `"static"` freezes: a fraction below `1`, a number from `1` on.
        linear_start (`float`, *optional*, defaults to `0.0`):
            Fraction of the run at which `"linear"` starts.
        linear_depth (`float`, *optional*, defaults to `0.75`):
            Fraction of the units that `"linear"` has frozen at the end.

    Parameters that describe the model:
        blocks (`list[str]`, *optional*):
            Names or shell patterns of the blocks in execution order, such as `encoder.layer.*`. Found by default.
        stem (`list[str]`, *optional*):
            Names or shell patterns of the modules that feed the first block. Found by default.

    Raises:
        TypeError: a field holds a value of another type; the message names the right one.
        ValueError: a field holds a value that cannot work; the message names the legal ones.
    """

    policy: str = field(default="smartfrz", metadata={"choices": POLICIES})
    order: str = field(default="front", metadata={"choices": list(ORDERS)})
    predictor: str | None = None
    predictor_revision: str | None = None
    operating_point: str = field(default="balanced", metadata={"choices": list(OPERATING_POINTS)})
    freeze_threshold: float | None = None
    start_stage: bool = True
    compensate_rate: bool = True
    target_saving: float | None = None
    unfreeze_on_restart: bool = True
    max_depth: int | None = None
    when_all_frozen: str = field(default="keep_last", metadata={"choices": ["keep_last", "stop"]})
    record_every: float = 0.005
    sampling_seed: int = 0
    first_decision: float = 0.05
    decide_every: float = 0.05
    probe_examples: int = 16
    activation_cache: bool = True
    cache_memory: Size | str | float = 0.25
    cache_device_memory: Size | str | float = 0.25
    cache_disk: Size | str | float = 0.0
    cache_folder: str | None = None
    cache_dtype: str = field(default="exact", metadata={"choices": list(CACHE_DTYPES)})
    frozen_dtype: str | None = field(default=None, metadata={"choices": list(FROZEN_DTYPES)})
    offload_frozen: bool = False
    static_depth: float = 0.5
    linear_start: float = 0.0
    linear_depth: float = 0.75
    blocks: list[str] | None = None
    stem: list[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.predictor, os.PathLike):
            self.predictor = os.fspath(self.predictor)
        for name in ("blocks", "stem"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        self._check_types()
        for name, option in self.__dataclass_fields__.items():
            value, choices = getattr(self, name), option.metadata.get("choices")
            if choices is not None and value not in (*choices, option.default):
                raise ValueError(f"`{name}` is {value!r}; it must be {one_of(value, choices)}")
        for name in ("cache_memory", "cache_device_memory", "cache_disk"):
            try:
                setattr(self, name, float(Size(getattr(self, name))))
            except ValueError as error:
                raise ValueError(f"`{name}`: {error}") from None
            legal = 0 <= getattr(self, name) < float("inf")
            self._require(name, legal, "a fraction from 0 to below 1, or a number of bytes")
        for name in ("freeze_threshold", "linear_start", "linear_depth", "target_saving"):
            self._require(name, 0 <= (getattr(self, name) or 0) <= 1, "between 0 and 1")
        self._require("linear_start", self.linear_start < 1, "below 1, which is the end of the run")
        for name in ("record_every", "first_decision", "decide_every"):
            wanted = "a fraction of the run between 0 and 1, or a whole number of steps"
            self._require(name, getattr(self, name) > 0 and _is_share_or_count(getattr(self, name)), wanted)
        legal = _is_share_or_count(self.static_depth)
        self._require("static_depth", legal, "a fraction below 1 or a whole number of units")
        for name in ("max_depth", "probe_examples", "sampling_seed"):
            self._require(name, (getattr(self, name) or 0) >= 0, "at least 0")
        self._require("blocks", self.blocks != [], "at least one name or pattern, or left out")
        for name in ("blocks", "stem"):
            legal = all(isinstance(pattern, str) for pattern in getattr(self, name) or ())
            self._require(name, legal, "a list of names or patterns")
        self._require("predictor", self.predictor != "", "a name or a folder, or left out")
        if self.offload_frozen and not self.activation_cache:
            raise ValueError("`offload_frozen` needs `activation_cache`: without it the front runs in every step.")
        if self.target_saving is not None and self.policy in WITHOUT_TARGET:
            raise ValueError(f'`target_saving` needs the policy "smartfrz"; `policy` is {self.policy!r}.')

    def _check_types(self) -> None:
        for name, kind in get_type_hints(type(self)).items():  # `HfArgumentParser` changes `field.type`
            value, types = getattr(self, name), get_args(kind) or (kind,)
            types = tuple(get_origin(kind) or kind for kind in types) + ((int,) if float in types else ())
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                wanted = " or ".join(
                    "None" if kind is type(None) else kind.__name__ for kind in types if kind is not Size
                )
                raise TypeError(f"`{name}` is {value!r}, of type {type(value).__name__}; it must be of type {wanted}.")

    def _require(self, name: str, legal: bool, wanted: str) -> None:
        if not legal:
            raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be {wanted}.")

    def steps(self, name: str, total_steps: int) -> int:
        """
        A length of time in optimizer steps.

        Args:
            name (`str`): field that holds it: `"record_every"`, `"first_decision"` or `"decide_every"`.
            total_steps (`int`): optimizer steps of the run.

        Returns:
            `int`: at least 1. Fractions are rounded down.
        """
        value = getattr(self, name)
        return max(1, share_of(value, total_steps) if value < 1 else int(value))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SmartFRZConfig":
        """Build from a `dict`. Unknown keys, as of a newer version, are ignored with one warning."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            from transformers.utils import logging  # which imports torch, in earlier versions of Transformers

            logger = logging.get_logger(__name__)
            logger.warning(
                f"SmartFRZConfig ignores {', '.join(unknown)}, which this version of smartfrz_hf does not know. Was the "
                "file written by another version?"
            )
        return cls(**{key: value for key, value in values.items() if key in known})

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `smartfrz_config.json` into a folder, which is made when it is missing."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None, **kwargs: Any) -> str:
        """
        Put `smartfrz_config.json` into a repository on the Hub, and return the address of the commit.

        Args:
            repo_id (`str`): `user/name`; made if it does not exist.
            private (`bool`, *optional*): whether a new repository is private.
            token (`str`, *optional*): defaults to the stored one, or that of `HF_TOKEN`.
            kwargs: for [`~huggingface_hub.HfApi.upload_file`], such as `revision` or `commit_message`.

        Raises:
            OSError: the Hub cannot be reached, or refuses.
        """
        api, content = HfApi(token=token), json.dumps(self.to_dict(), indent=2).encode()
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        kwargs = {"commit_message": "Upload SmartFRZ configuration", **kwargs}
        commit = api.upload_file(path_or_fileobj=content, path_in_repo=CONFIG_NAME, repo_id=repo_id, **kwargs)
        return commit.commit_url

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, **kwargs: Any) -> "SmartFRZConfig":
        """
        Read `smartfrz_config.json` from a folder or the Hub.

        Args:
            name (`str`): folder, or `user/name` on the Hub.
            kwargs: for [`~huggingface_hub.hf_hub_download`], such as `revision` or `token`.

        Raises:
            OSError: the file is missing, or the Hub cannot be reached.
        """
        file = Path(name) / CONFIG_NAME
        if not file.parent.is_dir():
            try:
                file = Path(hf_hub_download(os.fspath(name), CONFIG_NAME, **kwargs))
            except (OSError, ValueError) as error:
                raise OSError(
                    f"{name} is no folder, and {CONFIG_NAME} of {name} cannot be loaded from the Hub: {error}"
                ) from error
        elif not file.is_file():
            raise OSError(f"The folder {name} has no {CONFIG_NAME}; `SmartFRZConfig.save_pretrained` writes it.")
        return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))


for option in fields(SmartFRZConfig):
    option.metadata = MappingProxyType({"help": _help(SmartFRZConfig.__doc__ or "", option.name), **option.metadata})
