"""Paired differences over seeds, their bootstrap intervals, and what counts as equal accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
# Equal accuracy: on average no more than this many points lost, and no more than that at the interval's end.
MEAN_LOST, MOST_LOST = 0.2, 0.5


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and its bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def equal(self) -> bool:
        """For points lost: whether the accuracy counts as equal."""
        return self.mean < MEAN_LOST and self.high < MOST_LOST

    def to_dict(self) -> dict[str, float]:
        """The three numbers, rounded to four digits."""
        return {"mean": round(self.mean, 4), "low": round(self.low, 4), "high": round(self.high, 4)}


def bootstrap(values: Sequence[float]) -> Interval:
    """
    Mean of some values, with the percentile interval at 95 % over 10,000 resamples of them. Always the same ones.

    Args:
        values (`Sequence[float]`): one paired difference a seed. One alone gives an interval without width.
    """
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means = np.asarray(values, dtype=float)[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(np.mean(values)), float(low), float(high))


def interpolate(curve: Sequence[tuple[float, float]], at: float) -> float | None:
    """
    The value of a curve of straight lines at a place.

    Args:
        curve (`Sequence[tuple[float, float]]`): places and values, in any order.
        at (`float`): the place.

    Returns:
        `float`, or `None` in front of the first place. Behind the last place it keeps the last value.
    """
    places, values = zip(*sorted(curve), strict=True)
    return None if at < places[0] else float(np.interp(at, places, values))
