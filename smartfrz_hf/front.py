"""The frozen front of a model in training, and all that follows when it grows: DDP's reducer, FLOPs, the cache."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from .activation_cache import ActivationCache, make_cache
from .config import SmartFRZConfig
from .cost.flops import ComputeMeter
from .cost.ledger import Ledger
from .distributed.consensus import Ranks
from .distributed.ddp import rebuild_reducer
from .distributed.fsdp import reshard
from .freezing.boundary import front_of
from .freezing.compile import GraphLimits
from .freezing.freezer import Freezer
from .freezing.kept import kept_parameters
from .freezing.rate import RateFactor
from .model.units import BlockStack, Unit
from .signals.pilot import Pilot
from .signals.pilot_signals import PilotSignals


class Front:
    """
    Freezes the front of a model in training, and keeps everything that depends on it in step. All methods are to be called
    in all processes.

    Args:
        model (`torch.nn.Module`): what the training loop calls.
        stack ([`BlockStack`]): its units.
        optimizer (`torch.optim.Optimizer`): its optimizer, not wrapped.
        config ([`SmartFRZConfig`]): of the run.
        ranks ([`Ranks`]): the processes of the run.
        total_steps (`int`): optimizer steps of the run.
        steps_per_epoch (`float`, *optional*): optimizer steps in one pass over the data, if known.
        compiled (`bool`): whether the loop runs a compiled model.

    Attributes:
        stack ([`BlockStack`]): the units.
        freezer ([`Freezer`]): freezes parameters and cuts the backward pass.
        meter ([`ComputeMeter`]): counts FLOPs.
        rate ([`RateFactor`]): raises the learning rate of the rest, where a front froze from the start.
        cache ([`ActivationCache`], *optional*): keeps the outputs of the front.
    """

    def __init__(
        self,
        model: nn.Module,
        stack: BlockStack,
        optimizer: Optimizer,
        config: SmartFRZConfig,
        ranks: Ranks,
        total_steps: int,
        steps_per_epoch: float | None,
        compiled: bool,
    ):
        self.stack, self._model, self._config, self._ranks = stack, model, config, ranks
        dtype = getattr(torch, config.frozen_dtype) if config.frozen_dtype else None
        self.freezer = Freezer(stack, optimizer, dtype)
        self.meter = ComputeMeter(model, stack, optimizer)
        self.rate = RateFactor(optimizer)
        self._graphs = GraphLimits(compiled)
        self._make_cache = partial(
            make_cache, config, self.freezer, self.meter, ranks, total_steps, steps_per_epoch, compiled
        )
        self.cache: ActivationCache | None = None
        try:
            self.cache = self._make_cache()
        except BaseException:
            self.close()
            raise

    @property
    def depth(self) -> int:
        """Frozen units of the front."""
        return self.freezer.depth

    def freeze(
        self, units: Iterable[int], pilot: Pilot | None = None, signals: PilotSignals | None = None
    ) -> list[Unit]:
        """
        Freeze more units, and return those that froze now.

        Args:
            units (`Iterable[int]`): their indices.
            pilot ([`Pilot`], *optional*): gives the front the weights of the start of the run. The learning rate of the rest
                rises.
            signals ([`PilotSignals`], *optional*): what the pilot has shown. Needed with a pilot.
        """
        before, units = self.depth, set(units)
        depth = front_of(units | self.freezer.frozen)
        if pilot is not None and depth > before:
            assert signals is not None
            if self._config.compensate_rate:
                # Sums may differ in the last bit from host to host, and the ranks would drift apart.
                self.rate.factor = self._ranks.gather(signals.rate_factor(depth), "the learning rate")[0]
            pilot.restore(depth, {name for unit in self.stack.units[:depth] for name in kept_parameters(unit)})
        new = self.freezer.freeze(units)
        front = {name for unit in self.stack.units[:depth] for name in unit.named_parameters()}
        constant = front.isdisjoint(self.freezer.kept)  # else its outputs change
        if self.cache is not None and depth > before and constant:
            self.cache.freeze_to(depth)
        self._adapt()
        return new

    def unfreeze(self) -> list[Unit]:
        """Train everything again, with an empty cache, and return the units that were frozen."""
        if self.cache is not None:
            savings = self.cache.savings
            self.cache.close()
            self.cache = self._make_cache(savings=savings)
            if self.cache is not None and savings.off is not None:
                self.cache.close()
        self.rate.factor = 1.0
        units = self.freezer.unfreeze_to(0)
        if units:
            self._adapt()
        return units

    def check_consistency(self, step: int) -> None:
        """
        See that the processes still have the same frozen weights.

        Raises:
            RuntimeError: they do not.
        """
        if self.freezer.frozen and self._ranks.count > 1:
            self._ranks.check_equal(self.freezer.checksum(), f"the checksum of the frozen front at step {step}")

    def before_update(self) -> None:
        """
        To be called right before a step of the optimizer: take note of frozen parameters that somebody has made trainable, and
        count FLOPs where that is due.
        """
        thawed = self.freezer.check()
        if thawed:
            if self.cache is not None:
                self.cache.close()
            if rebuild_reducer(self._model):  # their gradients of this step were not exchanged
                parameters = dict(self.stack.model.named_parameters())
                for name in thawed:
                    parameters[name].grad = None
        with self.beside_training():
            self.meter.count()
        self.rate.before_step()

    def after_update(self) -> None:
        """To be called right after a step of the optimizer."""
        self.rate.after_step()
        self.meter.end_of_step()

    def update_ledger(self, ledger: Ledger) -> None:
        """Enter what is spent and saved so far."""
        ledger.spent, ledger.full, ledger.gap = self.meter.spent, self.meter.full, self.meter.gap
        ledger.unit_flops, ledger.full_unit_flops = self.meter.unit_flops, self.meter.full_unit_flops
        ledger.frozen_parameters = self.freezer.frozen_parameters
        ledger.cache = None if self.cache is None else self.cache.savings

    def beside_training(self) -> AbstractContextManager:
        """A context for passes that the cache must neither serve nor learn from."""
        return nullcontext() if self.cache is None else self.cache.bypassed()

    def close(self) -> None:
        """Leave the model as it was found, except for its weights."""
        self.rate.after_step()
        if self.cache is not None:
            self.cache.close()
        reshard(self._model)
        if self.freezer.unfreeze_to(0):
            rebuild_reducer(self._model)
        self._graphs.restore()
        self.meter.close()

    def _adapt(self) -> None:
        self._graphs.extend()
        self.meter.freeze_to(self.depth, self.freezer.apart)
        rebuild_reducer(self._model)
