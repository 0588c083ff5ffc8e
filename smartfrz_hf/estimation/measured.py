"""What is measured of a training before it is run."""

from dataclasses import dataclass, field

from ..policies import Decision, Observation
from ..policies.smartfrz import PILOT
from ..signals.pilot import pilot_steps


@dataclass(frozen=True)
class DepthCost:
    """
    What one optimizer step costs with some units frozen.

    Attributes:
        depth (`int`): frozen units, counted from the front.
        seconds (`float`): without an activation cache, and without loading data.
        memory (`int`):
            Bytes of weights, gradients, optimizer state, and activations that wait for the backward pass.
        cached_seconds (`float`, *optional*): where the cache serves all rows; `None` where it serves none.
        cached_row_bytes (`float`, *optional*): bytes that the cache keeps of one row.
    """

    depth: int
    seconds: float
    memory: int
    cached_seconds: float | None = None
    cached_row_bytes: float | None = None


@dataclass
class Profile:
    """
    What was measured of a training.

    Attributes:
        model (`str`): class of the model.
        device (`str`): that it trains on.
        total_steps (`int`): optimizer steps of the run.
        steps_per_epoch (`float`): optimizer steps in one pass over the data.
        rows, rows_per_step (`int`): training rows in all, and in an optimizer step.
        parameters, trainable (`int`): of the model.
        units (`list[str]`): names of the model's units.
        deepest (`int`): most units that can freeze.
        load_seconds (`float`): time to load the rows of a step.
        costs (`list[DepthCost]`): of some depths, 0 first.
        savings (`list[float]`): by depth, the share of a step's FLOPs that freezing saves without a cache.
        observation ([`Observation`], *optional*): at the end of the pilot; `None` for a run that is too short for one.
        decisions (`dict[str, Decision]`): what each policy decided then.
        earlier_depths (`dict[str, list[int]]`):
            The depth that each policy would have chosen at some steps in the last third of the pilot. Where they differ, the
            decision depends on the few rows that the pilot sees.
        steps_taken (`int`): optimizer steps of the pilot that were taken here; at most `pilot_steps`.
        batch_seconds (`float`): of a forward and a backward pass with nothing frozen.
        batch_elements (`float`): elements (tokens, pixels) of the mean batch.
        cache_off (`str`, *optional*): why the cache serves nothing.
        seconds (`float`): that measuring has taken.
    """

    model: str
    device: str
    total_steps: int
    steps_per_epoch: float
    rows: int
    rows_per_step: int
    parameters: int
    trainable: int
    units: list[str] = field(default_factory=list)
    deepest: int = 0
    load_seconds: float = 0.0
    costs: list[DepthCost] = field(default_factory=list)
    savings: list[float] = field(default_factory=list)
    observation: Observation | None = None
    decisions: dict[str, Decision] = field(default_factory=dict)
    earlier_depths: dict[str, list[int]] = field(default_factory=dict)
    steps_taken: int = 0
    batch_seconds: float = 0.0
    batch_elements: float = 1.0
    cache_off: str | None = None
    seconds: float = 0.0

    @property
    def pilot_steps(self) -> int:
        """Optimizer steps of the pilot of the run; 0 if the run is too short for one."""
        return pilot_steps(PILOT, self.total_steps)
