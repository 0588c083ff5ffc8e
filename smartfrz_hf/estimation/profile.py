"""Measures a few training steps of a Trainer: what they cost at each depth, and what the pilot shows."""

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import chain
from math import ceil
from statistics import mean
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import Trainer

from .._compat import training_checkpointing
from ..activation_cache.cache import MIN_DEPTH
from ..checks import check_trainer
from ..config import SmartFRZConfig
from ..model.generators import generators_left_as_found
from ..model.nested import batch_size, first_rows, main_input_elements
from ..policies import Decision, Observation, Policy
from ..run import FreezingRun
from ..signals.pilot import MIN_STEPS
from ..signals.pilot_signals import PilotSignals
from .loop import Loop, check_estimate
from .measured import DepthCost, Profile
from .restoring import restored

TIMED = 3  # steps at each depth, of which the fastest counts: a busy machine must not decide
TRIES = 8  # steps until the cache has to serve a batch
EARLIER = 8  # steps in the last third of the pilot at which the policies are asked, too
KEPT = 9  # batches of the pilot, of which the middle one by size is timed
PILOT_TIME = 0.6  # of the time that there is
LONG_STEP = 1.0  # seconds; a longer one is timed with fewer rows
LONG_RUN = 100_000  # steps, so that the cache does not see the end of the run near


class _Pilot(Policy):
    """Takes note of what the pilot shows, and freezes nothing."""

    def __init__(self, length: float):
        self.pilot = length
        self.seen: Observation | None = None

    def decide(self, observation: Observation) -> Decision:
        if observation.pilot is not None:
            self.seen = observation
        return Decision(observation.depth, "a pilot")


class _Depth(Policy):
    """Freezes what it is told."""

    depth = 0

    def decide(self, observation: Observation) -> Decision:
        return Decision(self.depth, "to measure it")


def profile(
    trainer: Trainer,
    config: SmartFRZConfig,
    policies: Mapping[str, Policy],
    seconds: float = 30.0,
    rows: int | None = None,
) -> Profile:
    """
    Measure the training that a Trainer is set up for, and leave the Trainer as it was found.

    Args:
        trainer ([`~transformers.Trainer`]): not training now, in a single process.
        config ([`SmartFRZConfig`]): of the run.
        policies (`dict[str, Policy]`): asked at the end of the pilot, each by its name.
        seconds (`float`, *optional*, defaults to `30.0`):
            About how long to measure. At least a few steps and two depths are measured, however long they take.
        rows (`int`, *optional*): training rows, if the Trainer has only a part of them.

    Raises:
        ValueError: the training cannot be measured; the message says why.
    """
    began, args = time.perf_counter(), trainer.args
    model: Any = trainer.model
    check_trainer(args, model, config, with_mixin=True)
    rows = check_estimate(args, trainer.train_dataset, rows, seconds)
    per_step = args.train_batch_size * args.gradient_accumulation_steps
    epoch = float("inf") if rows is None else max(1, ceil(rows / per_step))
    steps = args.max_steps if args.max_steps > 0 else ceil(args.num_train_epochs * epoch)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    result = Profile(
        model=type(model).__name__,
        device=str(args.device),
        total_steps=steps,
        steps_per_epoch=epoch,
        rows=rows or steps * per_step,
        rows_per_step=per_step,
        parameters=sum(size for size, _ in sizes),
        trainable=sum(size for size, trains in sizes if trains),
    )
    with restored(trainer), training_checkpointing(trainer):
        if trainer.state.global_step:  # it has trained before, and begins anew
            trainer.optimizer = trainer.lr_scheduler = None
        loop = Loop(trainer, steps)
        with closing(loop.batches()) as batches:
            seen, earlier = _run_pilot(loop, batches, result, config, PILOT_TIME * seconds)
        if result.observation is not None:
            at = result.observation
            result.earlier_depths = {
                name: [policy.decide(replace(at, pilot=signals)).depth for signals in earlier]
                for name, policy in policies.items()
            }
            result.decisions = {name: policy.decide(at) for name, policy in policies.items()}
        _measure_depths(loop, seen, result, config, seconds - (time.perf_counter() - began))
    result.seconds = time.perf_counter() - began
    return result


def _run_pilot(
    loop: Loop, batches: Iterator, result: Profile, config: SmartFRZConfig, seconds: float
) -> tuple[list[Any], list[PilotSignals]]:
    """
    Take the first steps of the run as the run would: with the same rows and random numbers. The whole pilot if there is time for
    it, else as many steps as there is time for.

    Returns:
        `tuple`: some of the batches, and what the pilot showed at some steps before its end.
    """
    batch, load = next(batches)
    with generators_left_as_found(loop.args.device):
        loop.warm_up(batch)
        result.batch_seconds = loop.warm_up(batch)
    batches = chain([(batch, load)], batches)
    wanted = result.pilot_steps or min(MIN_STEPS, result.total_steps)
    affordable = int(seconds / result.batch_seconds)
    count = max(min(MIN_STEPS, wanted), min(wanted, affordable))
    accumulated = max(1, min(loop.args.gradient_accumulation_steps, affordable // count))
    asked = {ceil(count * (2 + i / EARLIER) / 3) for i in range(EARLIER)} - {count}
    seen: list[Any] = []
    loads: list[float] = []
    sizes: list[int] = []
    earlier: list[PilotSignals] = []
    policy = _Pilot(count / result.total_steps)
    run = FreezingRun(
        loop.model,
        loop.optimizer,
        result.total_steps,
        replace(config, activation_cache=False, offload_frozen=False),
        policy=policy,
        lr_scheduler=loop.scheduler,
        inputs=batch if isinstance(batch, Mapping) else None,
    )
    with run:
        for step in range(1, count + 1):
            new = [next(batches) for _ in range(accumulated)]
            loads += [load for _, load in new]
            sizes += [main_input_elements(loop.model, ((), batch)) for batch, _ in new]
            seen = [*seen, *(batch for batch, _ in new)][:KEPT]
            loop.step([batch for batch, _ in new])
            if not isinstance(loop.scheduler, ReduceLROnPlateau):
                loop.scheduler.step()
            run.step()
            if step in asked and run.observer.pilot is not None:
                earlier.append(run.observer.pilot.signals(run.rates.relative[:step]))
        result.savings = run.front.meter.savings()
    result.units, result.deepest = run.stack.names, run.stack.deepest_safe_depth()
    result.load_seconds = loop.args.gradient_accumulation_steps * mean(loads)
    result.batch_elements, result.observation, result.steps_taken = mean(sizes), policy.seen, count
    return seen, earlier


def _measure_depths(loop: Loop, seen: list[Any], result: Profile, config: SmartFRZConfig, seconds: float) -> None:
    """Time steps on one batch with more and more units frozen."""
    seen = sorted(seen, key=lambda batch: main_input_elements(loop.model, ((), batch)))
    batch = seen[len(seen) // 2]
    share = 1.0
    if result.batch_seconds > LONG_STEP:
        rows = batch_size(batch) or 1
        kept = max(1, round(rows * LONG_STEP / result.batch_seconds))
        batch, share = first_rows(batch, kept), kept / rows
    accumulated = loop.args.gradient_accumulation_steps
    elements = main_input_elements(loop.model, ((), batch))
    scale = accumulated * result.batch_elements / elements
    policy = _Depth()
    config = replace(config, first_decision=1, decide_every=1, max_depth=None, when_all_frozen="keep_last")
    run = FreezingRun(
        loop.model,
        loop.optimizer,
        LONG_RUN,
        config,
        policy=policy,
        steps_per_epoch=LONG_RUN / 2,
        inputs=batch if isinstance(batch, Mapping) else None,
    )
    # What happens at a depth takes about as long as seven steps in full.
    count = int(seconds / (7 * min(result.batch_seconds, LONG_STEP)))
    with run:
        for depth in _depths(result, count):
            policy.depth = depth
            loop.step([batch])
            run.step()
            with run.front.beside_training():
                fixed, activations = loop.memory(batch)
                plain = min(loop.step([batch]) for _ in range(TIMED))
            served = row_bytes = None
            if depth >= MIN_DEPTH and run.front.cache is not None:
                served, row_bytes = _time_cached(loop, run, batch)
            result.costs.append(
                DepthCost(
                    depth,
                    seconds=scale * plain,
                    memory=fixed + int(activations / share),
                    cached_seconds=None if served is None else scale * served,
                    cached_row_bytes=(
                        None if row_bytes is None else row_bytes * result.batch_elements * share / elements
                    ),
                )
            )
    if run.front.cache is None:
        result.cache_off = "it is turned off, or cannot be used here"
    elif all(cost.cached_seconds is None for cost in result.costs):
        result.cache_off = run.front.cache.savings.off or "it did not serve the rows that came again"


def _time_cached(loop: Loop, run: FreezingRun, batch: Any) -> tuple[float | None, float | None]:
    """Seconds of a step in which the cache serves all rows, and bytes that it keeps of a row."""
    cache, times = run.front.cache, []
    assert cache is not None
    for _ in range(TRIES):
        savings = cache.savings
        rows, hits, checking = savings.rows, savings.hits, savings.check_seconds
        seconds = loop.step([batch])
        run.step()
        if savings.rows > rows and savings.hits - hits == savings.rows - rows:
            times.append(seconds - (savings.check_seconds - checking))
        if len(times) > TIMED:
            break
    kept = len(cache.store)
    if len(times) < 2 or not kept:
        return None, None
    return min(times[1:]), cache.store.used / kept


def _depths(result: Profile, count: int) -> list[int]:
    """0, those that were decided, the deepest one, and others in between, as many as there is time for."""
    last = result.deepest
    chosen = {0, last, *(min(decision.depth, last) for decision in result.decisions.values())}
    for depth in sorted(range(last), key=lambda depth: (depth % 4, depth % 2)):
        if len(chosen) < count:
            chosen.add(depth)
    return sorted(chosen)
