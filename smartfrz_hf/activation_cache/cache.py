"""The activation cache: what the frozen front returns is computed once per row, and then looked up."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..cost.flops import ComputeMeter
from ..cost.ledger import CacheSavings
from ..freezing.compile import is_compiled
from ..freezing.weights import FrozenWeights
from ..model.generators import random_state, set_random_state
from ..model.units import BlockStack
from .calls import Call, name_rows, read_call
from .checks import SpotChecks, WrongActivationError, time_of
from .front import SkippableFront, UnsupportedModelError
from .monitor import CacheMonitor
from .offload import Offload
from .outputs import entry_of
from .padding import PaddingWatch
from .proof import Kind, Verdict, Verdicts
from .rows import Span, assemble, cut, left_out, plan
from .state import FrontState
from .store import ActivationStore

logger = logging.get_logger(__name__)

# The stem alone costs about as much as a lookup.
MIN_DEPTH = 2


class ActivationCache:
    """
    Leaves out the forward pass of a frozen front for rows that came before.

    Rows are known by the content that the front reads, so any dataset, sampler, order and padding will do, and evaluation
    batches are served too. Where the weights, the settings of modules or the arguments differ, a row has another name. Where
    somebody's hook must see the front run, or the front draws random numbers, the cache stands aside. An activation that is
    served equals what computing it now would give, up to the rounding that another batch size gives. This is checked: every value
    is finite, and one batch in a hundred is computed and compared. At the first difference, the cache turns itself off.

    Args:
        stack ([`BlockStack`]): the units of the model.
        store ([`ActivationStore`]): where activations are kept; closed with the cache.
        meter ([`ComputeMeter`], *optional*): told what did not run.
        total_steps (`float`, *optional*): optimizer steps of the run. Without it, nothing is judged.
        steps_per_epoch (`float`, *optional*): optimizer steps in one pass over the data, if known.
        weights ([`FrozenWeights`], *optional*): offloaded while all rows that come are found.
        ranks (`int`, *optional*, defaults to `1`): processes that share the rows of an epoch.
        savings ([`CacheSavings`], *optional*): of an earlier cache of the run, to be added to.

    Attributes:
        savings ([`CacheSavings`]): what it has saved so far.
        checks ([`SpotChecks`]): of what it serves.
    """

    def __init__(
        self,
        stack: BlockStack,
        store: ActivationStore,
        meter: ComputeMeter | None = None,
        total_steps: float = float("inf"),
        steps_per_epoch: float | None = None,
        weights: FrozenWeights | None = None,
        ranks: int = 1,
        savings: CacheSavings | None = None,
    ):
        self.stack, self.store, self.meter = stack, store, meter
        self.savings = CacheSavings() if savings is None else savings
        self._ranks = ranks
        self._closed = False
        self._enter(entry_of(stack), weights)
        self._padding = PaddingWatch()
        self._monitor = CacheMonitor(total_steps, steps_per_epoch)
        self.checks = SpotChecks(self.savings, store.dtype)
        self._reasons: Counter[str] = Counter()
        self._pending: tuple[Call, int, torch.Tensor] | None = None
        self._bypassed = 0

    @property
    def depth(self) -> int:
        """Units that are left out for rows that are found."""
        return 0 if self._closed else self._front.depth

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Run everything meanwhile, as if there were no cache."""
        self._bypassed += 1
        try:
            yield
        finally:
            self._bypassed -= 1

    def freeze_to(self, depth: int) -> None:
        """
        Follow the freezing of all units before `depth`, if that pays. Rows that were kept at another depth move on when they
        come again.
        """
        if self._closed or not self._follows(depth):
            return
        self._offload.wake()
        self._pending = None  # of another depth
        entry = entry_of(self.stack, depth)
        if entry is not self._front.entry:  # a decoder's blocks join those of the encoder
            self._front.close()
            self._enter(entry, self._offload.weights)
        self._front.grow(depth)
        self._state.watch(depth, self._front.patches)
        self._verdicts = Verdicts(self._front, self._state, self.savings)
        self.checks.start(depth)
        if depth >= MIN_DEPTH:
            self._monitor.start()

    def _follows(self, depth: int) -> bool:
        """Whether to leave out more units than so far."""
        if self.depth < MIN_DEPTH or self._offload.weights is not None:
            return True  # what is left out can be offloaded, too
        if depth == len(self.stack) and self._padding.unread is None:
            return True  # with nothing behind it that trains, a gradient shows only there whether padding is read
        return self._monitor.pays(self.depth, depth, len(self.stack))

    def _enter(self, entry: nn.Module, weights: FrozenWeights | None) -> None:
        """Stand in for the forward pass of the module that runs the front."""
        self._front = SkippableFront(self.stack, entry, self._forward, lambda: self._offload.wake())
        self._state = FrontState(self.stack, entry)
        self._verdicts = Verdicts(self._front, self._state, self.savings)
        self._offload: Offload = Offload(weights, self._state)

    def end_of_step(self, step: int) -> None:
        """
        To be called after each optimizer step.

        Args:
            step (`int`): optimizer steps done.
        """
        if self._monitor.end_of_step(step) and not self._closed:
            if not self.savings.rows and not self._monitor.last_epoch:
                logger.warning_once(f"The activation cache was not used in a whole epoch: {self._why_unused()}.")
            if reason := self._monitor.loss():
                self._turn_off(reason)

    def close(self) -> None:
        """Give the model its forward pass back and free what is kept."""
        if not self._closed:
            if self.depth >= MIN_DEPTH and not self.savings.rows and self.savings.off is None:
                self.savings.off = self._why_unused()
            self._offload.wake()
            self._note_size()
            self._front.close()
            self._closed, self._pending = True, None
            self.store.close()

    def _why_unused(self) -> str:
        if is_compiled(self.stack.model):
            return "it does not work with `torch.compile`"
        if self._reasons:
            return self._reasons.most_common(1)[0][0]
        return f"the forward pass of {type(self.stack.backbone).__name__} was not called, or no row came again"

    def _forward(self, original: Callable[..., Any], /, *args, **kwargs) -> Any:
        """Stands in for the forward pass of the backbone."""
        front = self._front
        if self._bypassed or front.busy or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        training = front.entry.training
        self._padding.settle()
        if self.depth < MIN_DEPTH and (self._padding.unread is not None or not training):
            return original(*args, **kwargs)
        call = read_call(front.signature, args, kwargs, getattr(front.entry, "config", None))
        if isinstance(call, str):
            return self._stand_aside(call, args, kwargs)
        if self.depth < MIN_DEPTH:
            output = original(*args, **kwargs)
            if any(call.padding[:2]):
                self._padding.watch(call, output)
            return output
        state = random_state(call.device)
        try:
            self._offload.look()
            if self._state.obstacle is not None:
                return self._stand_aside(self._state.obstacle, args, kwargs)
            return self._answer(call, training)
        except UnsupportedModelError as error:
            self._turn_off(f"{type(self.stack.model).__name__} cannot be served, since {error}")
        except WrongActivationError as error:
            self._turn_off(str(error))
        set_random_state(state, call.device)  # what runs again draws the same numbers again
        return original(*args, **kwargs)

    def _stand_aside(self, reason: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._reasons[reason] += 1
        return self._front.plain(*args, **kwargs)

    def _answer(self, call: Call, training: bool) -> Any:
        front, store, began = self._front, self.store, perf_counter()
        if training and self._monitor.last_epoch and not len(store):
            return self._stand_aside("no training row comes again", (), call.arguments())
        padded = any(call.padding[:2])
        if training and padded and self._padding.unread is None and torch.is_grad_enabled():
            return self._compute_first(call)
        verdict = self._verdicts.reach(self._kind(call), call, training, self._monitor.steps_left)
        if isinstance(verdict, str):
            return self._stand_aside(verdict, (), call.arguments())
        keep = not (training and self._monitor.last_epoch)
        self._keep_pending()
        keys, spans = self._names(call, verdict)
        found = store.get(keys)
        depths = [0 if row is None else self._state.fronts.get(row[0], 0) for row in found]
        depths = [d if MIN_DEPTH <= d <= self.depth and s != e else 0 for d, (s, e) in zip(depths, spans, strict=True)]
        groups = plan(depths, self.depth)
        hits = call.rows - depths.count(0)
        self.savings.rows += call.rows
        self.savings.hits += hits
        if training:
            self._monitor.count(call.rows, hits)
        else:
            self._monitor.count_evaluated()
        if groups is None:
            return self._compute(call, keys, spans, keep, perf_counter() - began)
        at_hand = {place: row[1] for place, row in enumerate(found) if row is not None and depths[place]}
        self.savings.bytes_read += sum(row.nbytes for row in at_hand.values())
        hidden = assemble(front, call, spans, at_hand, groups)
        compared = -self.savings.checked_rows
        checked = self.checks.check(front, call, spans, hidden, groups, self._monitor.steps_left)
        if keep:
            self._keep(keys, spans, hidden, [row for rows in groups.values() for row in rows])
        if self.checks.row_seconds is not None:
            self._gain(call.rows * self.checks.row_seconds - (perf_counter() - began) + checked, training)
        if self.meter is not None and training:
            compared += self.savings.checked_rows
            self.meter.skip(left_out(groups, call.rows, self.depth, compared))
        output = front.serve(call, hidden)
        if training and padded:
            self._padding.watch(call, output)
        self._offload.count(0 if groups else call.rows, len(store) / self._ranks, self.stack, self.depth)
        return output

    def _kind(self, call: Call) -> Kind:
        return Kind(call.context, self._state.variant, self._padding.unread, call.padding)

    def _names(self, call: Call, verdict: Verdict) -> tuple[list[bytes], list[Span]]:
        return name_rows(call, self._state.variant, verdict.without_padding, verdict.shifts_freely)

    def _compute_first(self, call: Call) -> Any:
        """Run everything for a padded batch while nobody knows whether padding is read, and keep its rows once that is known."""
        hidden: list[torch.Tensor] = []
        marks = self.depth == len(self.stack)  # else nothing that the backbone returns need have a gradient
        # A copy, as what runs behind the boundary may write to what crosses it.
        output = self._front.watch(call, lambda v: hidden.append(v.to(self.store.place_for(v), copy=True)), marks)
        self._padding.watch(call, output)
        self._pending = call, self._state.front, hidden[0]
        return output

    def _keep_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None or pending[1] != self._state.front or self._monitor.last_epoch:
            return
        call, _, hidden = pending
        verdict = self._verdicts.known.get(self._kind(call))
        if isinstance(verdict, Verdict) and len(hidden) == call.rows:
            self._keep(*self._names(call, verdict), hidden, range(call.rows))

    def _compute(self, call: Call, keys: list[bytes], spans: list[Span], keep: bool, lookup: float) -> Any:
        """Run everything for all rows, as without a cache, and keep what crosses the boundary."""
        front, began = self._front, perf_counter()
        errors: list[WrongActivationError] = []
        training = front.entry.training

        def cross(hidden: torch.Tensor) -> None:
            self.checks.time_rows(time_of(hidden) - began, call.rows)
            began_keeping = perf_counter()
            try:
                self._keep(keys, spans, hidden, range(call.rows if keep else 0))
            except WrongActivationError as error:
                errors.append(error)
            self._gain(-lookup - (perf_counter() - began_keeping), training)

        output = front.watch(call, cross)
        if errors:
            self._turn_off(str(errors[0]))
        elif training and any(call.padding[:2]):
            self._padding.watch(call, output)
        return output

    def _keep(self, keys: list[bytes], spans: list[Span], hidden: torch.Tensor, rows: Sequence[int]) -> None:
        rows = [row for row in rows if spans[row][0] != spans[row][1]]
        if not rows:
            return
        # Seen at once where all of it is finite; padding may hold anything.
        if not (self.checks.are_finite([hidden]) or self.checks.are_finite(cut(hidden, spans, rows))):
            raise WrongActivationError("the frozen front has returned a value that is not finite")
        values = cut(hidden.to(self.store.place_for(hidden)), spans, rows)
        self.store.put([keys[row] for row in rows], self._state.front, values)
        self._note_size()

    def _gain(self, seconds: float, training: bool) -> None:
        self.savings.seconds_saved += seconds
        if training:
            self._monitor.gain(seconds)

    def _note_size(self) -> None:
        self.savings.bytes_device = self.store.device_used
        self.savings.bytes_memory, self.savings.bytes_disk = self.store.memory_used, self.store.disk_used

    def _turn_off(self, reason: str) -> None:
        """Say why in one line, and give the model its own forward pass back."""
        logger.warning(f"The activation cache is off: {reason}. Training goes on without it.")
        self.savings.off = reason
        self.close()
