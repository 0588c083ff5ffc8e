"""The looks at the front probe over a run, kept as long as they are needed."""

import json
import os

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .probe import FrontProbe, ProbeSnapshot

LAGS = (1, 2, 4)
MIN_ROWS, MAX_COST = 4, 0.03


def affordable_rows(rows_between: int) -> int:
    """
    How many rows a probe may have so that it takes no more than 3 % of a run, but at least four.

    Args:
        rows_between (`int`): rows that are trained from one look to the next.
    """
    return max(MIN_ROWS, int(MAX_COST * 3 * rows_between))  # a step costs three forward passes


def looks_before(number: int) -> list[int]:
    """Numbers of the looks that a look is compared with: 1, 2 and 4 before it, and the first."""
    return [*(max(0, number - lag) for lag in LAGS), 0]


class ProbeHistory:
    """
    The looks of a run, as far as they are needed, and what has changed since them.

    Args:
        probe ([`FrontProbe`]): takes the looks.

    Attributes:
        steps (`list[int]`): at which all looks so far were taken.
        changes (`torch.Tensor` of shape `(units, 4, 2)`, *optional*): what [`ProbeSnapshot.changes`] says of the looks that
            [`looks_before`] names. None before the second look.
    """

    def __init__(self, probe: FrontProbe):
        self.probe = probe
        self.restart()

    def restart(self) -> None:
        """Forget all looks."""
        self.steps: list[int] = []
        self.changes: torch.Tensor | None = None
        self._looks: dict[int, ProbeSnapshot] = {}

    def record(self, step: int) -> None:
        """
        Take a look.

        Args:
            step (`int`): optimizer steps done.

        Raises:
            TypeError: the model takes what no checkpoint can hold.
        """
        number = len(self.steps)
        if not number:
            self.probe.state({})  # rather now than when a checkpoint is written
        now = self.probe.look()
        self.steps.append(step)
        self._looks[number] = now
        if number:
            self.changes = torch.stack([now.changes(self._looks[i]) for i in looks_before(number)], dim=1)
        kept = {0, *range(number + 1 - max(LAGS), number + 1)}
        self._looks = {i: look for i, look in self._looks.items() if i in kept}

    def save(self, path: str | os.PathLike) -> None:
        """Write the looks to one safetensors file."""
        tensors: dict[str, torch.Tensor] = {}
        probe = self.probe.state(tensors)
        if self.changes is not None:
            tensors["changes"] = self.changes
        for number, look in self._looks.items():
            tensors[f"{number}.output"] = look.output.contiguous()
            for unit, hidden in enumerate(look.hidden):
                tensors[f"{number}.{unit}"] = hidden.contiguous()
        known = {"steps": self.steps, "probe": probe, "looks": list(self._looks)}
        save_file(tensors, path, metadata={"known": json.dumps(known)})

    def load(self, path: str | os.PathLike, device: torch.device | str) -> None:
        """Go on from what `save` wrote."""
        with safe_open(path, framework="pt", device=str(device)) as file:
            known = json.loads(file.metadata()["known"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.restart()
        self.probe.restore(known["probe"], tensors)
        self.steps = known["steps"]
        changes = tensors.get("changes")
        self.changes = None if changes is None else changes.cpu()
        for number in known["looks"]:
            hidden = [tensors[f"{number}.{unit}"] for unit in range(self.probe.units)]
            self._looks[number] = ProbeSnapshot(hidden, tensors[f"{number}.output"])
