"""The ledger of a run: what froze when and why, what it cost and what it saved."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .stages import Stage, StageRecord, StartStage, freeze_steps, frozen_spans

HEAD = "head"
CACHE_NOW = ("bytes_device", "bytes_memory", "bytes_disk", "off")  # fields of a cache that are no sums


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of forward passes, of backward passes, and of the optimizer."""

    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """All three."""
        return self.forward + self.backward + self.optimizer


@dataclass
class CacheSavings:
    """
    What the activation cache did for the forward passes of the frozen front on this rank.

    Attributes:
        rows (`int`): rows that were looked up.
        hits (`int`): rows among them that were found.
        seconds_saved (`float`): seconds of forward passes that were not run, less what the cache itself took.
        checked_rows (`int`): rows that were found, and computed all the same to compare them.
        check_seconds (`float`): seconds that this has taken, and seeing that all values are finite; `seconds_saved` counts them,
            too.
        bytes_device (`int`): bytes held now on the accelerator.
        bytes_memory, bytes_disk (`int`): bytes held now, in memory and on disk, by all ranks of the host.
        bytes_read (`int`): bytes read from it so far.
        off (`str`, *optional*): why it was turned off; `None` while it is on.
    """

    rows: int = 0
    hits: int = 0
    seconds_saved: float = 0.0
    checked_rows: int = 0
    check_seconds: float = 0.0
    bytes_device: int = 0
    bytes_memory: int = 0
    bytes_disk: int = 0
    bytes_read: int = 0
    off: str | None = None

    @property
    def bytes_held(self) -> int:
        """Bytes held now, wherever they are."""
        return self.bytes_device + self.bytes_memory + self.bytes_disk

    @property
    def hit_rate(self) -> float:
        """Share of the rows looked up that were found."""
        return self.hits / self.rows if self.rows else 0.0

    @property
    def outcome(self) -> str:
        """`"1.5 s saved"`, or `"0.6 s lost"` where it took longer than it saved."""
        seconds = round(self.seconds_saved, 1)
        return f"{abs(seconds):.1f} s {'lost' if seconds < 0 else 'saved'}"


@dataclass
class Ledger:
    """
    What froze when and why, and what it saved. `print` shows it as a table.

    Attributes:
        units (`list[str]`): names of all units, front first.
        unit_parameters (`dict[str, int]`): how many parameters of each unit, and of `"head"` (everything else), were
            trainable at the start.
        max_steps (`int`): optimizer steps of the run.
        stages (`list[Stage]`): the freezing stages that changed what is frozen.
        decisions (`int`): how often the policy was asked.
        records (`list[StageRecord]`): all freezing stages, with what the policy saw in each.
        start ([`StartStage`], *optional*): what was decided at the end of the pilot; `None` before, and without one.
        spent, full ([`Flops`]): of the training so far, and what it would have cost with nothing frozen and no cache.
        gap (`float`): FLOPs among those spent, of backward passes through units that are frozen behind units that train.
            Freezing these units does not save them until everything in front is frozen, too.
        unit_flops, full_unit_flops (`dict[str, Flops]`): the same by unit and `"head"`, for the average training pass
            so far.
        frozen_parameters, trainable_parameters (`int`): frozen now, and trainable at the start.
        cache ([`CacheSavings`], *optional*): what the activation cache saved; `None` without one.
    """

    units: list[str] = field(default_factory=list)
    unit_parameters: dict[str, int] = field(default_factory=dict)
    max_steps: int = 0
    stages: list[Stage] = field(default_factory=list)
    decisions: int = 0
    records: list[StageRecord] = field(default_factory=list)
    start: StartStage | None = None
    spent: Flops = field(default_factory=Flops)
    full: Flops = field(default_factory=Flops)
    gap: float = 0.0
    unit_flops: dict[str, Flops] = field(default_factory=dict)
    full_unit_flops: dict[str, Flops] = field(default_factory=dict)
    frozen_parameters: int = 0
    trainable_parameters: int = 0
    cache: CacheSavings | None = None

    def __post_init__(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall-clock time since the run began, in seconds, without what was lost when it was interrupted."""
        return time.perf_counter() - self._started

    @property
    def depth(self) -> int:
        """Frozen units of the front now."""
        return self.stages[-1].depth if self.stages else 0

    @property
    def apart(self) -> list[str]:
        """Names of the units that are frozen now behind units that train."""
        return self.stages[-1].apart if self.stages else []

    @property
    def frozen_units(self) -> int:
        """Frozen units now, wherever they are."""
        return self.depth + len(self.apart)

    @property
    def gap_share(self) -> float:
        """`gap` as a share of what the run would have cost so far with nothing frozen and no cache."""
        return self.gap / self.full.total if self.full.total else 0.0

    @property
    def freeze_steps(self) -> dict[str, int]:
        """The step at which each unit that is frozen now froze."""
        return freeze_steps(map(asdict, self.stages))

    @property
    def frozen_spans(self) -> dict[str, list[tuple[int, int]]]:
        """From which step to which each unit was, or is to be, frozen; units that never were are left out."""
        return frozen_spans(map(asdict, self.stages), self.max_steps)

    @property
    def frozen_fraction(self) -> float:
        """Share of the parameters trainable at the start that are frozen now."""
        return self.frozen_parameters / self.trainable_parameters if self.trainable_parameters else 0.0

    @property
    def compute_saved(self) -> float:
        """Share of the FLOPs so far (forward, backward and optimizer) that freezing and the cache have saved."""
        return _saved(self.spent, self.full)

    @property
    def unit_compute_saved(self) -> dict[str, float]:
        """The same for the FLOPs of each unit and of `"head"`."""
        return {unit: _saved(self.unit_flops[unit], full) for unit, full in self.full_unit_flops.items()}

    def record(self, step: int, probabilities: list[float] | None) -> None:
        """Note that the policy was asked."""
        self.decisions += 1
        numbers = None if probabilities is None else [float(p) for p in probabilities]  # those of numpy are no JSON
        self.records.append(StageRecord(step, self.seconds, self.depth, numbers))

    def logs(self) -> dict[str, float]:
        """What goes to `log_history` and the trackers: three values, and three more if there is a cache."""
        logs = {
            "freeze/depth": self.depth,
            "freeze/frozen_fraction": self.frozen_fraction,
            "freeze/compute_saved": self.compute_saved,
        }
        if self.cache is not None:
            logs["freeze/cache_hit_rate"] = self.cache.hit_rate
            logs["freeze/cache_bytes"] = self.cache.bytes_held
            logs["freeze/cache_seconds_saved"] = self.cache.seconds_saved
        return logs

    def summary(self) -> str:
        """A table with one line per unit, and the totals below it."""
        if not self.units:
            return "Nothing to show: training has not begun."
        saved, steps = self.unit_compute_saved, self.freeze_steps
        rows = [("unit", "trainable", "froze at step", "compute saved")]
        for unit in (*self.units, HEAD):
            parameters = f"{self.unit_parameters[unit]:,}" if unit in self.unit_parameters else "?"
            rows.append((unit, parameters, str(steps.get(unit, "-")), f"{saved.get(unit, 0.0):.1%}"))
        lines = text_table(rows)
        lines.append(lines[1])
        lines.append(
            f"frozen now: {self.frozen_units} of {len(self.units)} units, {self.frozen_parameters:,} of "
            f"{self.trainable_parameters:,} trainable parameters ({self.frozen_fraction:.1%})"
        )
        lines.append(
            f"compute saved: {self.compute_saved:.1%} ({self.spent.total:.3g} of {self.full.total:.3g} FLOPs spent)"
        )
        if self.gap:
            apart = f"{', '.join(self.apart)} frozen" if self.apart else "units were frozen"
            lines.append(
                f"gap: {apart} behind units that train; {self.gap_share:.1%} ({self.gap:.3g} FLOPs) of the compute went "
                "into backward passes through such units, which freezing them does not save"
            )
        if self.start is not None:
            lines.append(f"start stage, after {self.start.step} steps: {self.start}")
        if self.cache is not None and not self.cache.rows:
            lines.append("activation cache: not used" + (f"; {self.cache.off}" if self.cache.off else ""))
        elif self.cache is not None:
            held = self.cache.bytes_held / 1e6
            lines.append(
                f"activation cache: {self.cache.hit_rate:.1%} of {self.cache.rows:,} rows found, "
                f"{self.cache.outcome}, {held:.1f} MB held"
                + (f"; turned off: {self.cache.off}" if self.cache.off else "")
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    def plot(self, path: str | os.PathLike, title: str = "Freeze timeline") -> None:
        """
        Draw when each unit froze, see [`~smartfrz_hf.cost.plotting.plot_timeline`].

        Args:
            path (`str`): image file; its ending chooses the format.
            title (`str`, *optional*): of the chart.

        Raises:
            ImportError: matplotlib is missing.
        """
        from .plotting import plot_timeline

        plot_timeline(self, path, title)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values, for people."""
        return asdict(self) | {"freeze_steps": self.freeze_steps, **self.logs()}

    def state_dict(self) -> dict[str, Any]:
        """
        JSON values: `stages` and `records` (lists of dictionaries), `start` (or `None`), `decisions`, `seconds`,
        `frozen_parameters` and `cache` (or `None`). For reports, not for resuming: `max_steps`, `unit_parameters`, `spent`, `full`
        and `gap`.
        """
        return {
            "stages": [asdict(stage) for stage in self.stages],
            "records": [asdict(record) for record in self.records],
            "start": None if self.start is None else asdict(self.start),
            "decisions": self.decisions,
            "seconds": self.seconds,
            "frozen_parameters": self.frozen_parameters,
            "cache": None if self.cache is None else asdict(self.cache),
            "max_steps": self.max_steps,
            "unit_parameters": self.unit_parameters,
            "spent": asdict(self.spent),
            "full": asdict(self.full),
            "gap": self.gap,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned. A cache starts empty, but its sums go on."""
        self.stages = [Stage(**stage) for stage in state["stages"]]
        self.records = [StageRecord(**record) for record in state["records"]]
        self.start = None if state["start"] is None else StartStage(**state["start"])
        self._started = time.perf_counter() - state["seconds"]
        self.decisions, self.frozen_parameters = state["decisions"], state["frozen_parameters"]
        if self.cache is not None and state["cache"] is not None:
            for name, value in state["cache"].items():
                if hasattr(self.cache, name) and name not in CACHE_NOW:
                    setattr(self.cache, name, value)


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table with a line below its first row, its first column on the left and the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = (
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
    return [first, "-" * len(first), *others]


def _saved(spent: Flops, full: Flops) -> float:
    return 1 - spent.total / full.total if full.total else 0.0
