"""Trying, on two rows, whether the front of a model can be left out, and telling rounding from a difference."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import torch
from torch import nn

from ..cost.ledger import CacheSavings
from ..model.generators import generators_left_as_found, random_state, random_states, set_random_state
from ..model.left_as_found import model_left_as_found
from ..model.nested import tensors_in
from .calls import Call, content
from .front import Pass, SkippableFront, UnsupportedModelError
from .state import FrontState

# Relative error, in the norm of a row, that the order of sums can make, by what the front computes in.
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
# Of float32 with 10 bits of mantissa, as accelerators may multiply matrices, and as cuDNN computes convolutions unless told otherwise.
ROUNDING_TF32 = 0.01
# The same, of the format in which rows are kept.
ROUNDING_KEPT = {"exact": 0.0, "float16": 0.002, "bfloat16": 0.01, "int8": 0.1}
# To try whether the front can be left out costs about as much as the front of a few batches.
MIN_STEPS_LEFT = 8
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class DoesNotRunError(UnsupportedModelError):
    """The model stops when it is tried."""


class Kind(NamedTuple):
    """Calls that share a verdict: their context, the front's settings, whether padding is read, and where padding is."""

    context: tuple
    settings: bytes
    padding_unread: bool | None
    padding: tuple[bool, bool, bool]


@dataclass(frozen=True)
class Verdict:
    """
    What a trial has shown.

    Attributes:
        without_padding (`bool`): rows may be kept without their padding, and zeros stand for it.
        shifts_freely (`bool`): padding in front of a row changes nothing but by rounding.
    """

    without_padding: bool = False
    shifts_freely: bool = False


class Verdicts:
    """
    Tries once for each kind of call whether the front, at its present depth, can be left out.

    Args:
        front ([`SkippableFront`]): the front.
        state ([`FrontState`]): what its output depends on.
        savings ([`CacheSavings`]): where the time of the trials is counted.

    Attributes:
        known (`dict[Kind, Verdict | str]`): what was found by kind of call: why the front is not left out where that is so.
    """

    def __init__(self, front: SkippableFront, state: FrontState, savings: CacheSavings):
        self._front, self._state, self._savings = front, state, savings
        self.known: dict[Kind, Verdict | str] = {}

    def reach(self, kind: Kind, call: Call, training: bool, steps_left: float) -> Verdict | str:
        """
        The verdict on a call.

        Args:
            kind ([`Kind`]): of the call.
            call ([`Call`]): the batch.
            training (`bool`): whether it trains.
            steps_left (`float`): optimizer steps until the end of the run.

        Raises:
            UnsupportedModelError: the front cannot be left out in training.
        """
        if kind not in self.known:
            if training and steps_left < MIN_STEPS_LEFT:
                return "too few steps were left to gain anything"
            began = perf_counter()
            try:
                holes = kind.padding[2]  # what some models compute there depends on how much padding follows
                self.known[kind] = prove(self._front, self._state, call, kind.padding_unread is True and not holes)
            except UnsupportedModelError as error:
                if training:
                    raise
                self.known[kind] = str(error)
            self._savings.seconds_saved -= perf_counter() - began
        return self.known[kind]


def tolerance(front: SkippableFront, call: Call, kept_as: str = "exact") -> float:
    """The relative error that rounding can make, in the norm of a row."""
    device = call.device.type
    dtypes = {p.dtype for p in front.entry.parameters() if p.is_floating_point()} or {torch.float32}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    worst = max(ROUNDING.get(dtype, 0.1) for dtype in dtypes)
    convolves = any(isinstance(module, CONVOLUTIONS) for module in front.entry.modules())
    if device != "cpu" and (convolves or torch.get_float32_matmul_precision() != "highest"):
        worst = max(worst, ROUNDING_TF32)
    return worst + ROUNDING_KEPT[kept_as]


def agree(
    a: torch.Tensor,
    b: torch.Tensor,
    rounding: float,
    spans: Sequence[tuple[int, int]] | None = None,
    floor: float = 0.0,
) -> bool:
    """
    Whether two batches differ by rounding alone, row by row. Never true of NaN.

    Args:
        a (`torch.Tensor`): of shape `(rows, ...)` or a single number.
        b (`torch.Tensor`): the same.
        rounding (`float`): largest relative error.
        spans (`list[tuple[int, int]]`, *optional*): first position and end of what counts of each row.
        floor (`float`, *optional*, defaults to `0.0`): norms below it count as this large.
    """
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    if spans is not None and any(end >= 0 for _, end in spans):
        places = torch.arange(a.shape[1], device=a.device)
        limits = torch.tensor(spans, device=a.device)
        inside = (places >= limits[:, :1]) & (places < limits[:, 1:])
        inside = inside.view(*inside.shape, *[1] * (a.ndim - 2))
        a, b = a.masked_fill(~inside, 0), b.masked_fill(~inside, 0)
    a, b = a.detach().float(), b.detach().float()
    a, b = (a.flatten(1), b.flatten(1)) if a.ndim > 1 else (a.reshape(1, -1), b.reshape(1, -1))
    return bool(((a - b).norm(dim=1) <= rounding * (a.norm(dim=1) + floor) + 1e-30).all())


def prove(front: SkippableFront, state: FrontState, call: Call, without_padding: bool) -> Verdict:
    """
    Try whether the front can be left out for calls of this kind, in the mode in which the model is.

    The front is computed twice, and each row with nothing but itself, and has to give the same values and draw no random number.
    What it leaves behind in its modules has to be the same for both rows: whoever reads that would find another row's.
    Then the outputs of the whole model, its loss included, are compared with those when all frozen blocks return NaN, the
    activations are put in place at the boundary, and zeros stand for padding. The model is as it was found before each of these
    passes, so that what a block has left behind for others in an earlier one is not there; in the end, so are the generators of
    random numbers.

    Args:
        front ([`SkippableFront`]): the front.
        state ([`FrontState`]): what its output depends on.
        call ([`Call`]): the batch; two of its rows are tried. One that is alone is tried beside another of its values.
        without_padding (`bool`): whether to try to keep rows without their padding.

    Raises:
        UnsupportedModelError: the front cannot be left out.
    """
    if call.rows == 1:
        outer, second = front.outer_call, call.with_second_row()
        usable = all(len(value) == 1 for value in tensors_in(outer) if value.ndim)
        try:
            front.outer_call = call.add_second_row(outer) if outer and usable else None
            return prove(front, state, second, without_padding)
        except DoesNotRunError:  # the values do not go in every order, such as sizes of images
            pass
        finally:
            front.outer_call = outer
    rows = [0, call.rows - 1]
    if call.mask is not None:  # the rows with the most padding in front and behind
        shown = call.mask.ne(0).int()
        rows = [int(shown.argmax(1).argmax()), int(shown.flip(1).argmax(1).argmax())]
        if rows[0] == rows[1]:  # another row shows what one does to the other
            rows[1] = (rows[0] + 1) % call.rows
    try:
        with generators_left_as_found(call.device), torch.no_grad():
            return _prove(front, state, call, rows, without_padding)
    except UnsupportedModelError:
        raise
    except Exception as error:  # the model's own code runs here, with tensors that it may not expect
        raise DoesNotRunError(f"it does not run without them ({type(error).__name__}: {error})") from error


def _prove(front: SkippableFront, state: FrontState, call: Call, rows: list[int], without_padding: bool) -> Verdict:
    rounding, start, generator = tolerance(front, call), random_states(call.device), random_state(call.device)
    crossed = []

    def cross(hidden: torch.Tensor) -> None:
        crossed.append((hidden.clone(), random_states(call.device)))  # what runs behind may write to it

    whole = Pass(call.layout, 2, on_boundary=cross)
    with model_left_as_found(front.stack.model):
        expected = front.try_pass(whole, front.call_model(rows, call))
    hidden, at_boundary = crossed[0]
    if not hidden.is_floating_point() or hidden.ndim < 2:
        raise UnsupportedModelError("what its blocks return does not have one entry per row")
    if not hidden.isfinite().all():
        raise UnsupportedModelError("its frozen blocks return values that are not finite")
    if not tensors_in(expected):
        raise UnsupportedModelError(
            f"it returns a {type(expected).__name__}, in which no tensors can be seen; return a dictionary or a tuple"
        )
    between = random_states(call.device)
    again = _run(front, call, rows)
    after = random_states(call.device)
    # Whatever else draws numbers of Python or NumPy now and then will not do so both times.
    drawn = [a != b and c != d for a, b, c, d in zip(start, at_boundary, between, after, strict=True)]
    if any(drawn) or not agree(hidden, again, rounding):
        raise UnsupportedModelError(
            "its frozen front draws random numbers (dropout, masked features, dropped layers or noise), so that no row "
            "comes again with the same activations"
        )
    alone = _run_alone(front, state, call, rows)
    if not agree(hidden, torch.cat(alone), rounding):
        raise UnsupportedModelError("what its frozen blocks return for a row depends on the other rows of the batch")
    verdict, spans = Verdict(), [(0, -1)] * 2
    if without_padding and call.mask is not None and hidden.ndim > 2 and hidden.shape[1] == call.length:
        verdict = _try_padding(front, call, rows, hidden, rounding)
    if verdict.without_padding:
        assert call.mask is not None
        inside = content(call.mask[rows])
        inside[~inside.any(1)] = True  # with nothing else to read, a row reads its padding, and is not kept
        hidden = hidden * inside.view(*inside.shape, *[1] * (hidden.ndim - 2))
        spans = [(int(row.int().argmax()), int(row.int().argmax() + row.sum())) for row in inside]
    with model_left_as_found(front.stack.model):
        front.learn_layout(call)
    set_random_state(generator, call.device)
    served = Pass(call.layout, 2, front.depth, hidden, poison=True)
    with model_left_as_found(front.stack.model):
        given = front.try_pass(served, front.call_model(rows, call))
    pairs = list(zip(tensors_in(expected), tensors_in(given), strict=True))
    if all(agree(a, b, rounding, spans if a.shape[:2] == (2, call.length) else None, 0.1) for a, b in pairs):
        return verdict
    if verdict.without_padding:  # something behind the boundary reads padding, or more
        set_random_state(generator, call.device)
        return _prove(front, state, call, rows, without_padding=False)
    raise UnsupportedModelError("what runs behind the boundary reads more of the front than what crosses it")


def _run(front: SkippableFront, call: Call, rows: Sequence[int]) -> torch.Tensor:
    """What crosses the boundary for some rows, with the model left as found."""
    with model_left_as_found(front.stack.model):
        return front.run(call, rows)


def _run_alone(front: SkippableFront, state: FrontState, call: Call, rows: list[int]) -> list[torch.Tensor]:
    """What crosses the boundary for each row, computed with nothing but itself."""
    alone = []
    left = set() if _differ(call, rows) else {state.front}
    with model_left_as_found(front.stack.model):
        for row in rows:
            alone.append(front.run(call, [row, row])[:1])
            state.look()
            left.add(state.front)
    state.look()
    if len(left) > 1:
        raise UnsupportedModelError("its frozen blocks keep something of each batch in their attributes")
    return alone


def _differ(call: Call, rows: list[int]) -> bool:
    return any(not torch.equal(value[rows[0]], value[rows[1]]) for value in call.tensors.values())


def _try_padding(front: SkippableFront, call: Call, rows: list[int], hidden: torch.Tensor, rounding: float) -> Verdict:
    """Whether what is not padding depends on the padding: on what it holds, and on how much there is."""
    tried = [
        _try_padding_of(front, call, row, values[None], rounding) for row, values in zip(rows, hidden, strict=True)
    ]
    shifts = [shifts for _, shifts in tried if shifts is not None]
    return Verdict(True, bool(shifts) and all(shifts)) if all(free for free, _ in tried) else Verdict()


def _try_padding_of(
    front: SkippableFront, call: Call, row: int, hidden: torch.Tensor, rounding: float
) -> tuple[bool, bool | None]:
    """Whether one row depends on its padding, and whether it may shift; `None` without padding in front of it."""
    assert call.mask is not None and call.length is not None
    inside = content(call.mask[row : row + 1])[0]
    start, end = int(inside.int().argmax()), int(inside.int().argmax() + inside.sum())
    if end <= start:
        return False, None

    def same(other: Call, first: int) -> bool:
        found = _run(front, other, [row, row])[:1]
        return agree(hidden[:, start:end], found[:, start - first : end - first], rounding)

    if end - start < call.length and not same(call.refill(row), 0):
        return False, None
    if end < call.length and not same(call.crop(0, end), 0):
        return False, None
    return True, same(call.crop(start, call.length), start) if start else None
