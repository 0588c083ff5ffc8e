"""The activation cache: what crosses the boundary is computed once per row, and then looked up."""

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import logging

from ..cost.flops import ComputeMeter
from ..cost.ledger import CacheSavings
from ..freezing.weights import FrozenWeights
from ..model.units import BlockStack
from .calls import Call, fingerprints, read_call
from .exactness import Exactness, name_front, positions
from .prefix import Prefix, UnsupportedModelError
from .store import ActivationStore
from .worth import CacheMonitor

if TYPE_CHECKING:
    from .shared import SharedStore

logger = logging.get_logger(__name__)

# The stem alone costs about as much as a lookup.
MIN_DEPTH = 2
# Trying what can be left out, and which rows have the same bits, takes as long as the front for about four batches.
TRIAL_BATCHES = 8


class ActivationCache:
    """
    Leaves out the forward pass of a frozen front for rows that it has seen.

    Rows are known by the content that the front reads, so any dataset, sampler, order and padding will do, and
    evaluation batches are served too. With `exact`, an activation is used again only where computing it anew would
    give the same bits: the first batch at each depth shows how few rows may be computed by themselves without changing
    a bit, and whether more padding changes one.

    Args:
        stack ([`BlockStack`]): the units of the model.
        store ([`ActivationStore`] or [`SharedStore`]): where activations are kept; closed with the cache.
        meter ([`ComputeMeter`], *optional*): told what did not run.
        exact (`bool`, *optional*, defaults to `True`): whether an activation is used again only where it has the bits
            that computing it anew would give, not merely the same value up to rounding.
        rows_per_epoch (`int`, *optional*): training rows in one pass over the data, if known; those of this rank.
        weights ([`FrozenWeights`], *optional*): offloaded while all rows that come are found.
        ranks (`int`, *optional*, defaults to `1`): among how many the rows of an epoch are dealt.

    Attributes:
        savings ([`CacheSavings`]): what it has saved so far.
        last_epoch (`bool`): whether no training row comes again, so that none is kept.
        rows_left (`int`, *optional*): training rows until the end of the run, if known.
        bypass (`bool`): whether to leave passes alone for now: the front probe looks at what leaves each unit, so that all
            have to run.
    """

    def __init__(
        self,
        stack: BlockStack,
        store: "ActivationStore | SharedStore",
        meter: ComputeMeter | None = None,
        exact: bool = True,
        rows_per_epoch: int | None = None,
        weights: FrozenWeights | None = None,
        ranks: int = 1,
    ):
        self.stack, self.store, self.meter = stack, store, meter
        self.rows_per_epoch, self.last_epoch, self.weights = rows_per_epoch, False, weights
        self.rows_left: int | None = None
        self.bypass = False
        self._shared = None if isinstance(store, ActivationStore) else store
        self._ranks = ranks
        self.savings = CacheSavings()
        self._prefix: Prefix | None = Prefix(stack, self._forward, self._wake)
        self._exactness = Exactness(self._prefix, exact)
        self._proved: set[tuple] = set()
        self._row_seconds: float | None = None
        self._worth = CacheMonitor(rows_per_epoch)
        self._in_a_row = 0
        self._front: list[Mapping[str, torch.Tensor | None]] = []
        self._weights: list[tuple[int, int] | bytes] = []

    @property
    def depth(self) -> int:
        """Units that are left out on a hit."""
        return self._prefix.depth if self._prefix is not None else 0

    def freeze_to(self, depth: int) -> None:
        """Follow the freezing of all units in front of `depth`. Activations kept so far move on when they come again."""
        if self._prefix is None:
            return
        self._forget_if_changed()
        self._prefix.grow(depth)
        self._proved.clear()
        self._exactness.forget()
        self._row_seconds = None
        self._worth.start()
        modules = [m for unit in self.stack.units[:depth] for top in unit.modules.values() for m in top.modules()]
        # The tables themselves, which are quick to walk through and show a parameter that takes another's place.
        self._front = [table for module in modules for table in (module._parameters, module._buffers)]
        self._weights = self._weight_versions()
        self._name_fronts()

    def close(self) -> None:
        """Give the model its forward pass back and free what is kept."""
        if self._prefix is not None:
            self._wake()
            self._note_size()
            self._prefix.close()
            self._prefix = None
            self.store.close()

    def _forward(self, *args, **kwargs) -> Any:
        """Stands in for the backbone's forward pass."""
        prefix = self._prefix
        assert prefix is not None
        training = self.stack.model.training
        if self.bypass or prefix.busy or self.depth < MIN_DEPTH:
            return prefix.plain(*args, **kwargs)
        if training and self.last_epoch and not len(self.store):
            return prefix.plain(*args, **kwargs)
        call = read_call(prefix.signature, args, kwargs, getattr(self.stack.backbone, "config", None))
        if call is None:
            return prefix.plain(*args, **kwargs)
        self._forget_if_changed()
        try:
            if not self._is_worth_trying(call, training):
                return prefix.plain(*args, **kwargs)
            self._prove(call)
            output = self._answer(call, keep=not (training and self.last_epoch))
        except UnsupportedModelError as error:
            self._turn_off(f"{type(self.stack.model).__name__} cannot be served, since {error}")
            return prefix.plain(*args, **kwargs)
        reason = self._worth.why_not()
        if reason is not None:
            self._turn_off(reason)
        return output

    def _answer(self, call: Call, keep: bool) -> Any:
        prefix, store, began = self._prefix, self.store, perf_counter()
        assert prefix is not None
        names, ends = fingerprints(call)
        keys = self._name(call, names, ends)
        depths = self.store.depths(keys)
        groups = self._plan(call, depths)
        found: list[tuple[int, torch.Tensor] | None] = []
        if groups is not None:
            found = store.get(keys)
            depths_found = [None if entry is None else entry[0] for entry in found]
            if depths_found != depths:  # damaged on disk
                depths, groups = depths_found, self._plan(call, depths_found)
        hits = call.rows - depths.count(None)
        if self.stack.model.training:
            self._worth.count(call.rows, hits)
        self.savings.rows += call.rows
        self.savings.hits += hits
        if groups is None:
            missing = [row for row, depth in enumerate(depths) if depth != self.depth]
            lookup = perf_counter() - began
            return self._compute(call, names, ends, missing if keep else [], lookup)
        self.savings.bytes_read += sum(entry[1].nbytes for entry in found if entry is not None)
        hidden = self._assemble(call, found, groups)
        if keep:
            moved = [row for rows in groups.values() for row in rows]
            self._tell_sizes(call, groups)
            self._keep(keys, ends, hidden, moved)
        if self._row_seconds is not None:
            self._gain(call.rows * self._row_seconds - (perf_counter() - began))
        self._tell_meter(call, groups)
        output = prefix.serve(call, hidden)
        self._in_a_row = 0 if groups else self._in_a_row + call.rows
        if self.weights is not None and self._in_a_row > len(store) / self._ranks and not self.weights.offloaded:
            self.weights.offload(prefix.idle)
            self._weights = self._weight_versions()
        return output

    def _compute(self, call: Call, names: list[bytes], ends: list[int], keep: list[int], lookup: float) -> Any:
        """Run all units for all rows, as without a cache, and keep what crosses the boundary."""
        prefix, began, boundary = self._prefix, perf_counter(), []
        assert prefix is not None
        self._in_a_row = 0

        def cross(hidden: torch.Tensor) -> None:
            if hidden.device.type != "cpu":
                torch.accelerator.synchronize(hidden.device)
            taken = perf_counter() - began
            last, self._row_seconds = self._row_seconds, taken / call.rows
            if last is not None:
                self._row_seconds = 0.8 * last + 0.2 * self._row_seconds
            if self._exactness.is_due(call):
                boundary.append(hidden.clone())
            else:
                self._keep(self._name(call, names, ends), ends, hidden, keep)
                self._gain(-lookup - (perf_counter() - began - taken))

        output = prefix.watch(call, cross)
        if boundary:
            began = perf_counter()
            if self._exactness.calibrate(call, boundary[0]) and isinstance(self.store, ActivationStore):
                self.store.clear()  # a shared one knows from what batches its rows are
            self._keep(self._name(call, names, ends), ends, boundary[0], keep)
            self.savings.seconds_saved -= perf_counter() - began
        return output

    def _name(self, call: Call, names: list[bytes], ends: list[int]) -> list[bytes]:
        """The keys of a batch's activations; a shared store is told which of other ranks are as good as one's own."""
        if self._shared is not None:
            size = positions(call)
            self._shared.sizes, self._shared.made_in = self._exactness.sizes(call), range(size, size + 1)
        return self._exactness.classify(call, names, ends)

    def _tell_sizes(self, call: Call, groups: dict[int, list[int]]) -> None:
        """Tell a shared store in batches of what size the rows that did not cross the boundary before were computed."""
        if self._shared is not None and groups:
            least = self._exactness.least_rows(call)
            sizes = [max(len(rows), least) * (call.length or 1) for rows in groups.values()]
            if any(groups):  # some go on from where they were left
                sizes += self._shared.found_in[0], self._shared.found_in[-1]
            self._shared.made_in = range(min(sizes), max(sizes) + 1)

    def _plan(self, call: Call, depths: list[int | None]) -> dict[int, list[int]] | None:
        """Which rows to compute from which depth, or `None` if all rows have to be computed from the start."""
        if self._exactness.is_due(call):
            return None
        groups: dict[int, list[int]] = {}
        for row, depth in enumerate(depths):
            if depth != self.depth:
                groups.setdefault(depth or 0, []).append(row)
        least = self._exactness.least_rows(call)
        cost = sum(max(len(rows), least) * (self.depth - start) for start, rows in groups.items())
        return None if cost >= call.rows * self.depth else groups

    def _assemble(
        self,
        call: Call,
        found: Sequence[tuple[int, torch.Tensor] | None],
        groups: dict[int, list[int]],
    ) -> torch.Tensor:
        """What crosses the boundary: activations at hand, and what has to be computed from where it was left."""
        prefix, least = self._prefix, self._exactness.least_rows(call)
        assert prefix is not None
        at_hand = {row: entry for row, entry in enumerate(found) if entry is not None}
        parts: dict[int, torch.Tensor] = {}
        for start, rows in groups.items():
            chosen = [rows[i % len(rows)] for i in range(max(len(rows), least))]
            enters = self._stack_rows(call, [at_hand[row][1] for row in chosen]) if start else None
            parts[start] = prefix.run(call, chosen, start, enters)
        ready = {row: activation for row, (depth, activation) in at_hand.items() if depth == self.depth}
        if not ready and len(parts) == 1:
            return next(iter(parts.values()))
        like = next(iter(ready.values())) if ready else next(iter(parts.values()))[0]
        hidden = self._stack_rows(call, list(ready.values()), list(ready), like)
        for start, computed in parts.items():
            hidden[groups[start]] = computed[: len(groups[start])]
        return hidden

    def _stack_rows(
        self,
        call: Call,
        rows: Sequence[torch.Tensor],
        places: Sequence[int] | None = None,
        like: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Put rows into one batch on the model's device, with zeros for padding."""
        like = rows[0] if like is None else like
        count = len(rows) if places is None else call.rows
        shape = like.shape if call.length is None else (call.length, *like.shape[1:])
        batch = torch.zeros((count, *shape), dtype=like.dtype)
        for place, row in zip(range(count) if places is None else places, rows, strict=True):
            batch[place, : len(row)] = row
        return batch.to(call.device)

    def _keep(self, keys: list[bytes], ends: list[int], hidden: torch.Tensor, rows: list[int]) -> None:
        rows = [row for row in rows if ends[row]]  # a row that is all padding reads its padding
        if rows:
            values = [hidden[row, : ends[row]] if ends[row] > 0 else hidden[row] for row in rows]
            self.store.put([keys[row] for row in rows], self.depth, values)
            self._note_size()

    def _is_worth_trying(self, call: Call, training: bool) -> bool:
        """Whether as many rows can still be found as pay for trying a new depth, where that has not been tried."""
        if self.rows_left is None or self.rows_per_epoch is None:
            return True
        if self._kind(call) in self._proved and not self._exactness.is_due(call):
            return True
        new = max(0, self.rows_per_epoch - len(self.store) / self._ranks)
        return self.rows_left - new >= TRIAL_BATCHES * call.rows if training else self.rows_left > 0

    def _kind(self, call: Call) -> tuple:
        return call.context, call.mask is not None and not bool(call.mask.all())

    def _prove(self, call: Call) -> None:
        """Try once for each kind of call whether the front can be left out."""
        kind = self._kind(call)
        if kind not in self._proved:
            assert self._prefix is not None
            began = perf_counter()
            self._prefix.prove(call)
            self._proved.add(kind)
            self.savings.seconds_saved -= perf_counter() - began

    def _weight_versions(self) -> list[tuple[int, int] | bytes]:
        tensors = [tensor for tensors in self._front for tensor in tensors.values() if tensor is not None]
        versions: list[tuple[int, int] | bytes] = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if self._ranks > 1:
            # DDP makes them those of rank 0 before each forward pass, which their versions do not tell.
            buffers = [t.flatten() for t in tensors if t.is_floating_point() and not isinstance(t, nn.Parameter)]
            if buffers:
                versions.append(torch.cat(buffers).cpu().view(torch.uint8).numpy().tobytes())
        return versions

    def _forget_if_changed(self) -> None:
        """Empty the store, or give the front another name in a shared one, when frozen weights are others than they were."""
        if self._weights == (versions := self._weight_versions()):
            return
        if isinstance(self.store, ActivationStore):
            self.store.clear()
        else:
            self._reload()
            versions = self._weight_versions()
            self.store.fronts.clear()
            self._name_fronts()
        self._weights = versions

    def _name_fronts(self) -> None:
        """Tell a shared store which rows come from the same front."""
        if self._shared is not None:
            fronts = self._shared.fronts
            for depth in range(len(fronts) + 1, self.depth + 1):
                fronts[depth] = name_front(self.stack.units[depth - 1], fronts.get(depth - 1, 0))

    def _wake(self) -> None:
        """Bring the weights back before a module of the front runs."""
        if self.weights is not None and self.weights.offloaded:
            self._forget_if_changed()
            self._reload()
            self._weights = self._weight_versions()

    def _reload(self) -> None:
        if self.weights is not None:
            self.weights.reload()
            self._in_a_row = 0

    def _tell_meter(self, call: Call, groups: dict[int, list[int]]) -> None:
        if self.meter is not None and self.stack.model.training:
            least = self._exactness.least_rows(call)
            ran = [
                sum(max(len(rows), least) for start, rows in groups.items() if start <= unit)
                for unit in range(self.depth)
            ]
            self.meter.skip([1 - rows / call.rows for rows in ran])

    def _gain(self, seconds: float) -> None:
        self.savings.seconds_saved += seconds
        self._worth.gain(seconds)

    def _note_size(self) -> None:
        self.savings.bytes_memory, self.savings.bytes_disk = self.store.memory_used, self.store.disk_used

    def _turn_off(self, reason: str) -> None:
        """Say why in one line, and give the model its own forward pass back."""
        logger.warning(f"The activation cache is off: {reason}. Training goes on without it.")
        self.savings.off = reason
        self.close()
