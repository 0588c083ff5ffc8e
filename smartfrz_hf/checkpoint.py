"""The files of SmartFRZ in a checkpoint: one JSON file, and one safetensors file for its tensors."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from . import __version__
from .config import SmartFRZConfig
from .distributed.fsdp import is_sharded
from .model.tracing import Inputs
from .model.units import find_blocks
from .run import FreezingRun

logger = logging.get_logger(__name__)

STATE_FILE = "smartfrz_state.json"
TENSORS_FILE = "smartfrz_state.safetensors"
FORMAT = 2
TENSOR = "__tensor__"  # {TENSOR: name} stands in the JSON file for the tensor `name` of the other file


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _split(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Replace tensors in nested dictionaries and lists by their names, and collect them."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().contiguous()
        return {TENSOR: name}
    if isinstance(value, dict):
        return {key: _split(item, f"{name}.{key}".lstrip("."), tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_split(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _join(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Undo `_split`."""
    if isinstance(value, dict):
        if set(value) == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: _join(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    return value


def save_state(state: dict[str, Any], folder: str | os.PathLike) -> None:
    """
    Write the state of a run into a folder: `smartfrz_state.json` and `smartfrz_state.safetensors`.

    The JSON file holds `format` (`int`), `version` (of smartfrz_hf), `libraries` (versions of others), `tensors` (SHA-256
    of the other file) and `state`, in which `{"__tensor__": name}` stands for a tensor of the other file. Each file appears as a
    whole, the JSON file last, so that a process that dies in between leaves nothing that looks complete.

    Args:
        state (`dict`): what [`FreezingRun.state_dict`] gives.
        folder (`str`): of the checkpoint; made when it is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    values = _split(state, "", tensors)
    partial = folder / f".{TENSORS_FILE}.partial"
    save_file(tensors, partial)
    libraries = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    content = {"format": FORMAT, "version": __version__, "libraries": libraries, "tensors": _digest(partial)}
    content["state"] = values
    partial.replace(folder / TENSORS_FILE)
    partial = folder / f".{STATE_FILE}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / STATE_FILE)


def load_state(folder: str | os.PathLike) -> dict[str, Any] | None:
    """
    Read what [`save_state`] wrote.

    Args:
        folder (`str`): of the checkpoint.

    Returns:
        `dict` for [`FreezingRun.load_state_dict`], with tensors on the CPU, or `None` if the folder holds no state.

    Raises:
        ValueError: the files are damaged, do not belong together, or were written in another format.
    """
    folder = Path(folder)
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    remedy = f"Resume from another checkpoint, or delete {STATE_FILE} there to go on with nothing frozen."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(
                f"{path} was written by version {content['version']} of smartfrz_hf, in format {content['format']}; this "
                f"version reads format {FORMAT} only. Install that version. {remedy}"
            )
        file = _checked(folder / TENSORS_FILE, content["tensors"], remedy)
        return _join(content["state"], load_file(file))
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). {remedy}") from error


def _checked(file: Path, digest: str, remedy: str) -> Path:
    if not file.is_file() or _digest(file) != digest:
        raise ValueError(f"{file} is missing, or not the one that {STATE_FILE} was written with. {remedy}")
    return file


def load_run(run: FreezingRun, folder: str | os.PathLike, step: int) -> bool:
    """
    Have a run go on from a checkpoint of a Trainer. To be called on all ranks.

    Args:
        run ([`FreezingRun`]): made, but not begun.
        folder (`str`): of the checkpoint.
        step (`int`): optimizer steps done in the checkpoint.

    Returns:
        `bool`: whether the checkpoint holds a state. If not, a warning says so.

    Raises:
        ValueError: the state is damaged, or of another step, model or policy.
        RuntimeError: not all processes read the same state.
    """
    load_renamed(run.stack.model, folder)
    state = load_state(folder)
    frozen = -1 if state is None else [state["depth"], *state["apart"]]
    run.ranks.check_equal(frozen, f"the depth saved in {folder} (-1 without a state)")
    if state is None:
        logger.warning(
            f"{folder} holds no SmartFRZ state ({STATE_FILE}): training goes on with nothing frozen and an empty history."
        )
        return False
    if state["step"] != step:
        raise ValueError(
            f"The SmartFRZ state in {folder} is of step {state['step']}, but the checkpoint is of step {step}. Resume "
            f"from another checkpoint, or delete {STATE_FILE} there to go on with nothing frozen."
        )
    if not any(Path(folder).glob("optimizer*")):
        logger.warning(f"{folder} holds no optimizer state: the optimizer starts anew, frozen units stay frozen.")
    run.load_state_dict(state)
    return True


@contextmanager
def frozen_as_saved(
    model: nn.Module,
    state: dict[str, Any] | None,
    config: SmartFRZConfig | None = None,
    inputs: Inputs = None,
) -> Iterator[None]:
    """
    Meanwhile, what had no optimizer state when a checkpoint was written requires no gradient. Under FSDP2, the optimizer of a
    checkpoint in which something is frozen loads in this context only; elsewhere it makes no difference.

    Args:
        model (`torch.nn.Module`): what the loop calls.
        state (`dict`, *optional*): of [`load_state`]. Without one, nothing is done.
        config ([`SmartFRZConfig`], *optional*): of the run; `blocks` and `stem` are read.
        inputs (`Mapping` or `Callable`, *optional*): as of [`FreezingRun`].

    Raises:
        ValueError: the model has no repeated blocks.

    Example:

    ```python
    state = load_state(folder)
    with frozen_as_saved(model, state):
        accelerator.load_state(folder)
    with FreezingRun(model, optimizer, total_steps) as run:
        run.load_state_dict(state)
        ...
    ```
    """
    parameters: list[nn.Parameter] = []
    if state is not None and is_sharded(model):
        config = config or SmartFRZConfig()
        stack = find_blocks(model, config.blocks, config.stem, inputs)
        # What trains again since this very step has no state yet.
        before = [stage for stage in state["ledger"]["stages"] if stage["step"] < state["step"]]
        depth = max([state["depth"], *(stage["depth"] for stage in before[-1:])])
        apart = {name for stage in before[-1:] for name in stage["apart"]}
        apart |= {stack.names[index] for index in state["apart"]}
        parameters = [
            parameter
            for index, unit in enumerate(stack)
            for parameter in unit.named_parameters().values()
            if (index < depth or unit.name in apart) and parameter.requires_grad
        ]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def load_renamed(model: nn.Module, folder: str | os.PathLike) -> None:
    """
    Load the weights of a checkpoint whose tensors have other names than the model's.

    `save_pretrained` writes some models (ViT, DeiT) under the names of earlier versions of Transformers, and the
    Trainer, which looks for the present ones, then resumes with new weights and says nothing (Transformers 5.23).

    Args:
        model (`torch.nn.Module`): what the Trainer trains.
        folder (`str`): of the checkpoint.
    """
    files = list(Path(folder).glob("model*.safetensors"))
    # Checkpoints of FSDP2 are read by Accelerate, by the names that the model has.
    if not isinstance(model, PreTrainedModel) or not files or is_sharded(model):
        return
    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    if names <= set(model.state_dict()):
        return
    renamed = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
    model.load_state_dict(renamed.state_dict())
    logger.warning(f"The Trainer did not find the weights in {folder} by their names; they are loaded now.")


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    The latest checkpoint that was written to its end, if there is one. The Trainer writes its state last, so that a
    process that was killed while it wrote leaves a folder without a readable one.

    Args:
        folder (`str`): output folder of the Trainer.
    """

    def step(path: Path) -> int:
        number = path.name.rpartition("-")[2]
        return int(number) if number.isdigit() else -1

    def complete(path: Path) -> bool:
        try:
            return json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"] == step(path)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    checkpoints = sorted((path for path in Path(folder).glob("checkpoint-*") if step(path) >= 0), key=step)
    found = next((path for path in reversed(checkpoints) if complete(path)), None)
    if found is not None and found != checkpoints[-1]:
        logger.warning(f"{checkpoints[-1]} was not written to its end. The run goes on from {found}.")
    return None if found is None else str(found)
