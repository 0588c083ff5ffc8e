"""Whether the activation cache pays."""

from math import isinf
from statistics import median

# Passes of a trial through the front, and through the whole model. Each has a few rows, but where steps wait for the host, as they
# do on fast accelerators, it takes as long as that of a batch.
FRONT_PASSES, MODEL_PASSES = 8, 2


class CacheMonitor:
    """
    Judges every half of an epoch whether looking rows up has saved time.

    Args:
        total_steps (`float`): optimizer steps of the run.
        steps_per_epoch (`float`, *optional*):
            Optimizer steps in one pass over the data. Where it is not known, a quarter of the run is time enough for rows to come
            again, and any epoch may have another one behind it.
    """

    def __init__(self, total_steps: float, steps_per_epoch: float | None):
        self.total_steps = total_steps
        self._counts_epochs = steps_per_epoch is not None
        self.steps_per_epoch = max(1.0, total_steps / 4 if steps_per_epoch is None else steps_per_epoch)
        self.step = self.rows = self.hits = 0
        self._evaluated = self._evaluations = self._batches = 0
        self._losses, self._judge_at = 0, float("inf")
        self._begun = False
        self._open_window()

    @property
    def steps_left(self) -> float:
        """Optimizer steps until the end of the run."""
        return max(0, self.total_steps - self.step)

    @property
    def last_epoch(self) -> bool:
        """Whether no training row comes again, as far as is known."""
        epochs = -(-self.total_steps // self.steps_per_epoch)
        return self._counts_epochs and self.step >= (epochs - 1) * self.steps_per_epoch

    def pays(self, before: int, depth: int, units: int) -> bool:
        """
        Whether leaving out a deeper front saves more than trying whether it can be done. It is saved for rows that come twice from
        now on: those of training after one more epoch, those of evaluations, if they go on as so far, after the next one.

        Args:
            before (`int`): units that are left out so far.
            depth (`int`): units of the deeper front.
            units (`int`): of the model.
        """
        if isinf(self.total_steps):
            return True
        evaluations = self._evaluations * self.steps_left / max(1, self.step)
        first = self.steps_per_epoch if self._counts_epochs else 0
        batches = max(0, self.steps_left - first) + max(0, evaluations - 1) * self._batches
        return batches * (depth - before) > FRONT_PASSES * (depth - 1) + MODEL_PASSES * (units - 1)

    def start(self) -> None:
        """Begin anew, at another depth. The first pass over the data is not judged: no row has come before."""
        wait = self.steps_per_epoch / 2 if self._begun else self.steps_per_epoch
        self._begun = True
        self._losses, self._judge_at = 0, self.step + wait
        self._cold = wait > self.steps_per_epoch / 2
        self._open_window()

    def count(self, rows: int, hits: int) -> None:
        """Note training rows that were looked up, and those that were found."""
        self.rows, self.hits = self.rows + rows, self.hits + hits

    def count_evaluated(self) -> None:
        """Note a batch of an evaluation whose rows were looked up."""
        self._evaluated += 1

    def gain(self, seconds: float) -> None:
        """Note what a training batch has saved, or lost."""
        self._gains.append(seconds)

    def end_of_step(self, step: int) -> bool:
        """Note how many optimizer steps are done. Returns whether a window has ended, which `loss` judges."""
        self.step = step
        if self._evaluated:
            self._evaluations, self._batches, self._evaluated = self._evaluations + 1, self._evaluated, 0
        return step >= self._judge_at

    def loss(self) -> str | None:
        """
        End the window. Returns why the cache does not pay, after two windows in a row in which it did not.

        One slow moment of a busy machine must not decide, so both the sum and the median of the batches' gains have to be
        negative.
        """
        rows, hits, gains, cold = self.rows, self.hits, self._gains, self._cold
        self._judge_at, self._cold = self.step + self.steps_per_epoch / 2, False
        self._open_window()
        if cold or not gains:
            return None
        lost = sum(gains) < 0 and median(gains) < 0
        self._losses = self._losses + 1 if lost else 0
        if self._losses < 2:
            return None
        if hits < rows / 2:
            return f"looking rows up takes longer than it saves: only {hits} of {rows} rows were in the cache"
        return "looking activations up takes longer than computing them"

    def _open_window(self) -> None:
        self.rows, self.hits = 0, 0
        self._gains: list[float] = []
