"""What a run observes of the model that it trains."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

from transformers.utils import logging

from ..distributed.fsdp import reshard
from ..model.generators import device_of
from ..model.units import BlockStack
from .pilot import Pilot
from .probe import FrontProbe
from .probe_history import ProbeHistory, affordable_rows
from .weights import WeightHistory, WeightSampler

logger = logging.get_logger(__name__)


class Observer:
    """
    Records the signals that a policy asks for: the weight history, and the front probe.

    Args:
        stack ([`BlockStack`]): units of the model.
        history_size (`tuple[int, int]`, *optional*):
            Snapshots in the weight history, and weights in each snapshot. No history when it is not given.
        record_every (`int`): steps between snapshots.
        sampling_seed (`int`): seed of the sampled positions.
        probe_examples, min_probe_examples (`int`): most and fewest examples of the front probe; 0 for none.
        examples_between (`Callable[[int], int]`):
            From the rows of the first training batch to those that are trained between two freezing stages. The
            probe may take 1 % of that time; there is none if this is too little for one example.
        pilot_steps (`int`): optimizer steps of the pilot at the start of the run; 0 for none.
        alone (`Callable`): a context in which the model runs beside training.
        on_pass (`Callable[[int], None]`): called after each pass of the probe with the elements of its main input.

    Attributes:
        history ([`WeightHistory`], *optional*): the snapshots so far.
        probe ([`ProbeHistory`], *optional*): the snapshots of the probe; `None` without a probe.
        pilot ([`Pilot`], *optional*): the first steps of the run, until they are over.
    """

    def __init__(
        self,
        stack: BlockStack,
        history_size: tuple[int, int] | None,
        record_every: int,
        sampling_seed: int,
        probe_examples: int,
        min_probe_examples: int,
        examples_between: Callable[[int], int],
        pilot_steps: int,
        alone: Callable[[], AbstractContextManager],
        on_pass: Callable[[int], None],
    ):
        self._stack, self._record_every, self._alone = stack, record_every, alone
        self.pilot_steps, self._sampling_seed = pilot_steps, sampling_seed
        self.pilot: Pilot | None = None
        self.history: WeightHistory | None = None
        if history_size is not None:
            window, weights_per_unit = history_size
            self.sampler = WeightSampler(stack.units, weights_per_unit, sampling_seed, lora_products=True)
            self.history = WeightHistory(len(stack), window, weights_per_unit, device_of(stack.backbone))
        self.probe: ProbeHistory | None = None
        if probe_examples:
            probe = FrontProbe(
                stack,
                lambda batch: min(max(affordable_rows(examples_between(batch)), min_probe_examples), probe_examples),
            )
            probe.on_pass = on_pass
            self.probe = ProbeHistory(probe)

    def begin(self, step: int) -> None:
        """Take the first snapshot of the weights, and start the pilot if the run starts here."""
        if self.pilot_steps and not step:
            self.pilot = Pilot(self._stack, self._sampling_seed)
        if self.history is not None:
            self.history.record(self.sampler, step)

    def before_update(self, step: int) -> None:
        """
        Take the first snapshot of the probe, once its examples are there and before any weight has changed. Record the
        gradients of the pilot.
        """
        if self.pilot is not None:
            self.pilot.before_update()
        if self.probe is not None and not self.probe.steps:
            self._probe(step)

    def end_of_step(self, step: int, frozen: Collection[int] = ()) -> None:
        """Take a snapshot of the weights when one is due, but not of the frozen units."""
        active = [unit for unit in range(len(self._stack)) if unit not in frozen]
        if self.history is not None and active and step % self._record_every == 0:
            self.history.record(self.sampler, step, active)

    def before_decision(self, step: int) -> None:
        """Take a snapshot of the probe for a freezing stage."""
        if self.probe is not None and self.probe.steps:
            self._probe(step)

    def restart(self, step: int) -> None:
        """Forget everything: what was seen says nothing about where a new cycle of the learning rate leads."""
        if self.history is not None:
            self.history = WeightHistory(*self.history.shape, device_of(self._stack.backbone))
            self.history.record(self.sampler, step)
        if self.probe is not None and self.probe.steps:
            self.probe.restart()
            self._probe(step)

    def close(self) -> None:
        """Take the hooks off the model, and forget the weights of the start."""
        self.pilot = None
        self._close_probe()

    def _close_probe(self) -> None:
        if self.probe is not None:
            self.probe.probe.close()
            self.probe = None

    def state_dict(self) -> dict[str, Any]:
        """`weight_history`, `probe_history` and `pilot`, each as its class documents it, or `None`."""
        return {
            "weight_history": None if self.history is None else self.history.state_dict(),
            "probe_history": self.probe.state_dict() if self.probe is not None and self.probe.steps else None,
            "pilot": None if self.pilot is None else self.pilot.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        if self.history is not None and state["weight_history"] is not None:
            self.history.load_state_dict(state["weight_history"])
        if self.probe is not None and state["probe_history"] is not None:
            self.probe.load_state_dict(state["probe_history"])
        self.pilot = None  # one that began with this run, and not with the saved one
        if self.pilot_steps and state["pilot"] is not None:
            self.pilot = Pilot(self._stack, self._sampling_seed)
            self.pilot.load_state_dict(state["pilot"])

    @property
    def history_shape(self) -> tuple[int, ...] | None:
        """`(units, window, weights_per_unit)`, or `None` without a history."""
        return None if self.history is None else self.history.shape

    def _probe(self, step: int) -> None:
        assert self.probe is not None
        if not self.probe.probe.ready:
            return
        try:
            with self._alone():
                self.probe.record(step)
        except Exception as error:  # the model's own code runs here, outside the loop that calls it otherwise
            logger.warning(
                f"The front probe does not work with {type(self._stack.model).__name__} ({type(error).__name__}: "
                f"{error}). SmartFRZ decides from the weights alone. `SmartFRZConfig(probe_examples=0)` turns it off."
            )
            self._close_probe()
        finally:
            reshard(self._stack.model)
