"""The snapshots of the front probe over a run, kept as long as they are needed."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device

from .probe import FrontProbe, ProbeSnapshot

LAGS = (1, 2, 4)
MAX_COST = 0.01


def affordable_rows(rows_between: int) -> int:
    """
    The number of rows for which the probe takes at most 1 % of a run. It is 0 for a run that is too short for a single row.

    Args:
        rows_between (`int`): training rows from one snapshot to the next.
    """
    return int(MAX_COST * 3 * rows_between)  # a training step costs three forward passes


def compared_snapshots(number: int) -> list[int]:
    """Numbers of the snapshots with which snapshot `number` is compared: 1, 2 and 4 before it, and the first."""
    return [*(max(0, number - lag) for lag in LAGS), 0]


class ProbeHistory:
    """
    The probe snapshots of a run that are still needed, and how much has changed since then.

    Args:
        probe ([`FrontProbe`]): takes the snapshots.

    Attributes:
        steps (`list[int]`): the steps of all snapshots so far.
        changes (`torch.Tensor` of shape `(units, 4, 2)`, *optional*): [`ProbeSnapshot.changes`] of the last snapshot
            against each one that [`compared_snapshots`] names. `None` before the second snapshot.
    """

    def __init__(self, probe: FrontProbe):
        self.probe = probe
        self.restart()

    def restart(self) -> None:
        """Forget all snapshots. The probe keeps its rows."""
        self.steps: list[int] = []
        self.changes: torch.Tensor | None = None
        self._snapshots: dict[int, ProbeSnapshot] = {}

    @property
    def first(self) -> ProbeSnapshot | None:
        """The snapshot before the first step of the run, or since the last restart; `None` before it is taken."""
        return self._snapshots.get(0)

    @property
    def last(self) -> ProbeSnapshot | None:
        """The latest snapshot; `None` before the first one."""
        return self._snapshots.get(len(self.steps) - 1)

    def record(self, step: int) -> None:
        """
        Take a snapshot.

        Args:
            step (`int`): optimizer steps done.

        Raises:
            TypeError: the model takes inputs that a checkpoint cannot hold.
        """
        number = len(self.steps)
        if not number:
            self.probe.state_dict()  # inputs that cannot be saved show now, not at the first checkpoint
        now = self.probe.run()
        self.steps.append(step)
        self._snapshots[number] = now
        if number:
            earlier = [self._snapshots[i] for i in compared_snapshots(number)]
            self.changes = torch.stack([now.changes(snapshot) for snapshot in earlier], dim=1)
        needed = {0, *range(number + 1 - max(LAGS), number + 1)}
        self._snapshots = {i: snapshot for i, snapshot in self._snapshots.items() if i in needed}

    def state_dict(self) -> dict[str, Any]:
        """
        What a run needs to continue.

        Returns:
            `dict`: `"steps"` (`list[int]`), `"changes"` (`torch.Tensor`, or `None`), `"inputs"` (the rows of the probe)
            and `"snapshots"`: by number, `{"hidden": {unit: torch.Tensor}, "output": torch.Tensor}`.
        """
        snapshots = {
            str(number): {"hidden": {str(i): h for i, h in enumerate(snapshot.hidden)}, "output": snapshot.output}
            for number, snapshot in self._snapshots.items()
        }
        return {"steps": list(self.steps), "changes": self.changes, "snapshots": snapshots, **self.probe.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Its rows and snapshots go to the device of the model."""
        self.probe.load_state_dict(state)
        self.steps = list(state["steps"])
        self.changes = None if state["changes"] is None else state["changes"].cpu()
        self._snapshots = {}
        for number, snapshot in send_to_device(state["snapshots"], self.probe.batch.device).items():
            hidden = [snapshot["hidden"][str(unit)] for unit in range(len(snapshot["hidden"]))]
            self._snapshots[int(number)] = ProbeSnapshot(hidden, snapshot["output"])
