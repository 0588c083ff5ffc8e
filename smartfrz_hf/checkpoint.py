"""The state of a run in its checkpoints: a few files beside those of the Trainer."""

import hashlib
import json
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .signals.probe_history import ProbeHistory
from .signals.weights import WeightHistory

logger = logging.get_logger(__name__)

STATE = "smartfrz_state.json"
HISTORY = "smartfrz_state.safetensors"
PROBE = "smartfrz_probe.safetensors"
FORMAT = 1
# What has to be the same for a history to go on.
HISTORY_FIELDS = ("policy", "record_every", "sampling_seed", "blocks")


@dataclass
class RunState:
    """
    What a run has to know to go on as if it had never stopped.

    Attributes:
        step (`int`): optimizer steps done.
        units (`list[str]`): names of the model's units.
        depth (`int`): frozen units.
        config (`dict`): of the run, as [`SmartFRZConfig.to_dict`] gives it.
        ledger (`dict`): as [`Ledger.state`] gives it.
        meter (`dict`): as [`ComputeMeter.state`] gives it.
        history ([`WeightHistory`], *optional*): if the policy looks at one.
        front ([`ProbeHistory`], *optional*): if the policy looks at one. It is only saved so; a run loads it into its own,
            from `front_file`.
        front_file (`Path`, *optional*): the file that it is in.
    """

    step: int
    units: list[str]
    depth: int
    config: dict[str, Any]
    ledger: dict[str, Any]
    meter: dict[str, Any]
    history: WeightHistory | None = None
    front: ProbeHistory | None = None
    front_file: Path | None = None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _version() -> str:
    try:
        return version("smartfrz_hf")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def save_state(state: RunState, folder: str | os.PathLike) -> None:
    """
    Write the files, each in one move, the one that names the others last.

    Args:
        state ([`RunState`]): what to write.
        folder (`str`): of the checkpoint; made if it is not there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"history": (HISTORY, state.history), "front": (PROBE, state.front)}
    values = {key: value for key, value in vars(state).items() if key not in (*kept, "front_file")}
    values |= {"format": FORMAT, "version": _version()}
    for key, (name, part) in kept.items():
        values[key] = None
        if part is not None:
            partial = folder / f".{name}.partial"
            part.save(partial)
            values[key] = _digest(partial)
            partial.replace(folder / name)
    partial = folder / f".{STATE}.partial"
    with partial.open("w") as file:
        file.write(json.dumps(values, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / STATE)


def load_state(folder: str | os.PathLike, device: Any = None) -> RunState | None:
    """
    Read what [`save_state`] wrote.

    Args:
        folder (`str`): of the checkpoint.
        device (`torch.device`, *optional*): where the history is put. Defaults to the CPU.

    Returns:
        [`RunState`], or `None` where the checkpoint was made without SmartFRZ.

    Raises:
        ValueError: the files are damaged, do not belong together, or were written by a newer version.
    """
    folder = Path(folder)
    if not (folder / STATE).is_file():
        return None
    remedy = f"Take another checkpoint, or delete {STATE} there to go on with nothing frozen and an empty history."
    try:
        values = json.loads((folder / STATE).read_text())
        if values["format"] > FORMAT:
            raise ValueError(
                f"{folder / STATE} was written by version {values['version']} of smartfrz_hf, in a format that this "
                f"one does not know. Install that version. {remedy}"
            )
        known = {key: values[key] for key in ("step", "units", "depth", "config", "ledger", "meter")}
        digests = {HISTORY: values["history"], PROBE: values.get("front")}
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / STATE} is damaged ({type(error).__name__}: {error}). {remedy}") from error
    files = {name: folder / name for name, digest in digests.items() if digest is not None}
    for name, file in files.items():
        if not file.is_file() or _digest(file) != digests[name]:
            raise ValueError(f"{file} is missing or not the one that {STATE} was written with. {remedy}")
    history = WeightHistory.load(files[HISTORY], device) if HISTORY in files else None
    return RunState(**known, history=history, front_file=files.get(PROBE))


def check_state(
    state: RunState,
    folder: str | os.PathLike,
    step: int,
    units: list[str],
    shape: tuple[int, ...] | None,
    config: dict[str, Any],
) -> None:
    """
    See whether a run can go on from a state. What may differ in the configuration is said in a warning.

    Args:
        state ([`RunState`]): what was found.
        folder (`str`): where.
        step (`int`): optimizer steps done in the checkpoint.
        units (`list[str]`): names of the model's units.
        shape (`tuple[int, ...]`, *optional*): of the history that the policy needs, if it needs one.
        config (`dict`): of the run, as [`SmartFRZConfig.to_dict`] gives it.

    Raises:
        ValueError: it cannot; the message says why and what helps.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(
            f"The SmartFRZ state in {folder} cannot be taken up: {what}. Resume as the run was started, or delete "
            f"{STATE} there to go on with nothing frozen and an empty history."
        )

    if state.step != step:
        raise refuse(f"it is of step {state.step}, and the checkpoint of step {step}")
    if state.units != units or not 0 <= state.depth <= len(units):
        raise refuse(
            f"it is of a model with the units {state.units}, {state.depth} of them frozen, and this has {units}"
        )
    other = {key: value for key, value in state.config.items() if config.get(key, value) != value}
    for key in HISTORY_FIELDS:
        if key in other:
            raise refuse(f"`{key}` was {other[key]!r} and is {config[key]!r} now")
    found = None if state.history is None else state.history.shape
    if found != shape:
        raise refuse(f"{HISTORY} holds a history of shape {found}, and the policy needs {shape}")
    if other:
        changed = ", ".join(f"`{key}` was {value!r} and is {config[key]!r}" for key, value in other.items())
        logger.warning(f"The run goes on with another configuration than it was started with: {changed}.")


def load_renamed(model: nn.Module, folder: str | os.PathLike) -> bool:
    """
    Load the weights of a checkpoint whose tensors have other names than the model's.

    `save_pretrained` writes some models (ViT, DeiT) under the names that they had in earlier versions of Transformers, and the
    Trainer, which looks for the present ones, then resumes with new weights and says nothing (Transformers 5.23).

    Args:
        model (`torch.nn.Module`): what the Trainer trains.
        folder (`str`): of the checkpoint.

    Returns:
        `bool`: whether there was something to mend.
    """
    files = list(Path(folder).glob("model*.safetensors"))
    if not isinstance(model, PreTrainedModel) or not files:
        return False
    names = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    if names <= set(model.state_dict()):
        return False
    found = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
    model.load_state_dict(found.state_dict())
    return True


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    The latest checkpoint that was written to its end. The Trainer writes its state last, so that a process that was killed
    while it wrote leaves a folder without a readable one.

    Args:
        folder (`str`): the Trainer's output folder.
    """

    def step(path: Path) -> int:
        number = path.name.rpartition("-")[2]
        return int(number) if number.isdigit() else -1

    def complete(path: Path) -> bool:
        try:
            return json.loads((path / "trainer_state.json").read_text())["global_step"] == step(path)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    found = [path for path in Path(folder).glob("checkpoint-*") if step(path) >= 0 and complete(path)]
    return str(max(found, key=step)) if found else None
