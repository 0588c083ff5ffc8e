"""The looks at the front probe over a run, kept as long as they are needed."""

import json
import os

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .probe import FrontProbe, Look

LAGS = (1, 2, 4)
LEAST_ROWS, MOST_COST = 4, 0.03


def affordable_rows(units: int, rows_between: int) -> int:
    """
    How many rows a probe may have so that it takes no more than 3 % of a run, but at least four.

    Args:
        units (`int`): of the model.
        rows_between (`int`): rows that are trained from one look to the next.
    """
    passes = 1 + (len(LAGS) + 1) * units / 2
    return max(LEAST_ROWS, int(MOST_COST * 3 * rows_between / passes))  # a step costs three forward passes


def looks_before(number: int) -> list[int]:
    """Numbers of the looks that a look is compared with: 1, 2 and 4 before it, and the first."""
    return [*(max(0, number - lag) for lag in LAGS), 0]


class FrontHistory:
    """
    The looks of a run, as far as they are needed, and what has changed since them.

    Args:
        probe ([`FrontProbe`]): takes the looks.

    Attributes:
        steps (`list[int]`): at which all looks so far were taken.
        changes (`torch.Tensor` of shape `(units, 4, 3)`, *optional*): what [`FrontProbe.changes`] says of the looks that
            [`looks_before`] names; zero for frozen units. None before the second look.
    """

    def __init__(self, probe: FrontProbe):
        self.probe = probe
        self.restart()

    def restart(self) -> None:
        """Forget all looks."""
        self.steps: list[int] = []
        self.changes: torch.Tensor | None = None
        self._looks: dict[int, Look] = {}

    @property
    def since(self) -> list[int]:
        """Steps of the looks that `changes` compares with."""
        return [self.steps[i] for i in looks_before(len(self.steps) - 1)]

    def record(self, step: int, depth: int = 0) -> None:
        """
        Take a look.

        Args:
            step (`int`): optimizer steps done.
            depth (`int`, *optional*, defaults to 0): units that have been frozen since the last look.

        Raises:
            TypeError: the model takes or puts out what no checkpoint can hold.
        """
        number = len(self.steps)
        now = self.probe.look(self._looks.get(number - 1), depth)
        if not number:
            self.probe.state({})  # rather now than when a checkpoint is written
        self.steps.append(step)
        self._looks[number] = now
        if number:
            parts = [self.probe.changes(now, self._looks[i], depth) for i in looks_before(number)]
            self.changes = torch.zeros(len(now.hidden), len(parts), 3)
            self.changes[depth:] = torch.stack(parts, dim=1)
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
        # Looks share what has not changed between them, which safetensors refuses to write.
        save_file(
            {name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"known": json.dumps(known)}
        )

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
            self._looks[number] = Look(hidden, tensors[f"{number}.output"])
