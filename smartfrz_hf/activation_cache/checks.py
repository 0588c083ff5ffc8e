"""Checks of what is about to be served."""

import random
from collections import Counter, deque
from collections.abc import Iterable
from statistics import median
from time import perf_counter

import torch

from ..cost.ledger import CacheSavings
from .calls import Call
from .front import SkippableFront
from .proof import agree, tolerance
from .rows import Span, cut

# Batches that are computed and compared: the first ones of each kind after each growth, then one in so many. All but the very
# first after a growth wait until they fit into this share of the time.
FIRST_CHECKS, CHECK_EVERY, CHECK_TIME = 2, 100, 0.01
TIMES = 25  # of the front that are remembered: one slow moment of a busy machine is not what it takes
KINDS = 3  # of batches at one depth, as a rule: all rows found, some, and some at another depth


class WrongActivationError(Exception):
    """An activation is not finite, or not what computing it gives."""


class SpotChecks:
    """
    Sees that what is served is finite, always, and now and then that it is what computing it gives.

    Args:
        savings ([`CacheSavings`]): where rows and seconds are counted.
        kept_as (`str`): format in which rows are kept.
    """

    def __init__(self, savings: CacheSavings, kept_as: str):
        self.savings, self.kept_as = savings, kept_as
        self._times: deque[float] = deque(maxlen=TIMES)
        self._done: Counter[tuple] = Counter()
        self._depth = self._served = 0
        self._random = random.Random(0)
        self._began = self._last = perf_counter()

    @property
    def row_seconds(self) -> float | None:
        """What the front takes for a row: the median of the last batches, `None` before the first."""
        return median(self._times) if self._times else None

    def start(self, depth: int) -> None:
        """Begin anew, with a front of `depth` units. What it takes is in proportion to its blocks until it is seen."""
        blocks, before = max(1, depth - 1), max(1, self._depth - 1)
        self._times = deque((seconds * blocks / before for seconds in self._times), maxlen=TIMES)
        self._depth = depth
        self._done.clear()

    def time_rows(self, seconds: float, rows: int) -> None:
        """Note what the front has taken for some rows."""
        self._times.append(seconds / rows)

    def are_finite(self, values: Iterable[torch.Tensor]) -> bool:
        """Whether all elements of some activations are finite. The time is counted."""
        began = perf_counter()
        finite = all(bool(value.isfinite().all()) for value in values)
        self.savings.check_seconds += perf_counter() - began
        return finite

    def check(
        self,
        front: SkippableFront,
        call: Call,
        spans: list[Span],
        hidden: torch.Tensor,
        groups: dict[int, list[int]],
        steps_left: float,
    ) -> float:
        """
        Check a batch of activations.

        Args:
            front ([`SkippableFront`]): computes it.
            call ([`Call`]): the batch.
            spans (`list[tuple[int, int]]`): what counts of each row.
            hidden (`torch.Tensor`): what is about to be served, `(rows, ...)`.
            groups (`dict[int, list[int]]`): rows that were not at hand, by the depth from which they were computed.
            steps_left (`float`): optimizer steps until the end of the run; in a short run, fewer rows are computed.

        Returns:
            `float`: seconds that computing it has taken.

        Raises:
            WrongActivationError: it is wrong.
        """
        # Rows that were computed have whatever the front gives for padding.
        parts = (
            cut(hidden, spans, (row for row in range(call.rows) if spans[row][0] != spans[row][1]))
            if groups
            else [hidden]
        )
        if not self.are_finite(parts):
            raise WrongActivationError("an activation was not finite")
        self._served += 1
        kind = (call.context, *sorted(groups))
        first, began, count = self._done.get(kind, 0) < FIRST_CHECKS, perf_counter(), call.rows
        if not first and self._served % CHECK_EVERY:
            return 0.0
        if self._done and self.savings.check_seconds > CHECK_TIME * (began - self._began):
            return 0.0  # later
        self._done[kind] += 1
        if first:
            count = int(min(call.rows, max(1, CHECK_TIME / FIRST_CHECKS / KINDS * steps_left * count)))
        elif self.row_seconds:
            count = max(1, min(count, int(CHECK_TIME * (began - self._last) / self.row_seconds)))
        rows = sorted(self._random.sample(range(call.rows), count))
        computed = front.run(call, rows)
        same = agree(computed, hidden[rows], tolerance(front, call, self.kept_as), [spans[row] for row in rows])
        self._last = perf_counter()
        seconds = self._last - began
        if count == call.rows:  # a few rows take longer each
            self.time_rows(seconds, count)
        self.savings.checked_rows += count
        self.savings.check_seconds += seconds
        self.savings.seconds_saved -= seconds
        if not same:
            raise WrongActivationError("an activation that was kept is not what computing it gives")
        return seconds


def time_of(hidden: torch.Tensor) -> float:
    """The time at which a tensor has been computed."""
    if hidden.device.type != "cpu":
        torch.accelerator.synchronize(hidden.device)
    return perf_counter()
