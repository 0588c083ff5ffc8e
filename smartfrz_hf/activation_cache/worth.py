"""Whether the activation cache pays."""

from statistics import median


class CacheMonitor:
    """
    Judges every half of an epoch whether looking rows up has saved time.

    Args:
        rows_per_epoch (`int`, *optional*): training rows in one pass over the data; nothing is judged without it.
    """

    def __init__(self, rows_per_epoch: int | None):
        self.rows_per_epoch = rows_per_epoch
        self.start()

    def start(self) -> None:
        """Begin anew, at another depth: the first pass over the data is not judged."""
        self._cold, self._losses = self.rows_per_epoch or 0, 0
        self._open_window()

    def _open_window(self) -> None:
        self._seen, self._hits = 0, 0
        self._gains: list[float] = []

    def count(self, rows: int, hits: int) -> None:
        """Note training rows that were looked up, and those that were found."""
        self._seen, self._hits = self._seen + rows, self._hits + hits

    def gain(self, seconds: float) -> None:
        """Note what a batch has saved, or lost."""
        self._gains.append(seconds)

    def why_not(self) -> str | None:
        """
        Why the cache does not pay, after two halves of an epoch in a row in which it did not.

        One slow moment of a busy machine must not decide, so both the sum and the median of the batches' gains have to be
        negative.
        """
        if self.rows_per_epoch is None or self._seen < (self._cold or self.rows_per_epoch / 2):
            return None
        seen, hits, gains, cold = self._seen, self._hits, self._gains, self._cold
        self._cold = 0
        self._open_window()
        if cold:
            return None
        lost = bool(gains) and sum(gains) < 0 and median(gains) < 0
        self._losses = self._losses + 1 if lost else 0
        if self._losses < 2:
            return None
        if hits < seen / 2:
            return f"only {hits} of {seen} rows came again unchanged"
        return "looking activations up takes longer than computing them"
