"""One run: what is observed, decided, frozen and accounted for, whatever loop trains the model."""

import weakref
from contextlib import ExitStack, suppress
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers.utils import logging

from .checks import (
    check_even_inputs,
    check_lengths,
    check_loop,
    check_other_run,
    check_stack,
    check_state,
    check_wrapper,
)
from .config import SmartFRZConfig
from .cost.ledger import Ledger
from .distributed.consensus import Ranks
from .distributed.fsdp import is_sharded
from .freezing.adalora import leave_frozen_ranks
from .freezing.compile import is_compiled
from .freezing.steps import around_steps, follow_steps
from .front import Front
from .model.tracing import Inputs
from .model.units import find_blocks
from .policies import Policy, policy_name, resolve
from .predictor import SmartFRZPredictor
from .signals.observer import Observer
from .signals.pilot import pilot_steps
from .signals.schedule import LearningRates
from .stages import StageRunner

logger = logging.get_logger(__name__)

# The run that freezes each model now: there can be one at a time.
_active: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[FreezingRun]]" = weakref.WeakKeyDictionary()


class FreezingRun:
    """
    Freezes the front of a model while a training loop of any kind trains it.

    The loop calls [`~FreezingRun.step`] after each call of `optimizer.step()`. With Accelerate, pass what
    `accelerator.prepare` returned, and call `step` once per batch: under gradient accumulation nothing happens until
    the optimizer has taken a step. [`SmartFRZCallback`] and [`SmartFRZTrainer`] use this class.

    Args:
        model (`torch.nn.Module`): what the loop calls: plain, or wrapped by DDP, FSDP2, `torch.compile` or PEFT.
        optimizer (`torch.optim.Optimizer`): its optimizer, plain or prepared by Accelerate.
        total_steps (`int`): optimizer steps of the whole run.
        config ([`SmartFRZConfig`] or `dict`, *optional*): all options.
        lr_scheduler (`torch.optim.lr_scheduler.LRScheduler`, *optional*): its schedule; constant without it.
        predictor ([`SmartFRZPredictor`] or `str`, *optional*): a predictor, or its name on the Hub or folder.
        policy ([`Policy`] or `str`, *optional*): a policy of your own, or the name of one.
        steps_per_epoch (`float`, *optional*):
            Optimizer steps in one pass over the data. The activation cache uses it to see whether it pays.
        batches_per_step (`int`, *optional*, defaults to `1`): of one optimizer step in this process, under gradient accumulation.
        compiled (`bool`, *optional*): whether the loop runs a compiled model. Detected when it is not given.
        timeout (`float`, *optional*, defaults to `1800.0`): seconds that processes wait for each other's decision.
        inputs (`Mapping` or `Callable`, *optional*):
            Keyword arguments of the model for a row or two, or a function that returns them, see [`find_blocks`].

    Attributes:
        ledger ([`Ledger`]): what froze when and why, and what it saved.
        configuration (`dict`): all options, with the class of a policy that was passed as an instance.
        depth (`int`): frozen units of the front now.
        steps_done (`int`): optimizer steps so far.
        should_stop (`bool`): whether nothing is left to train and `when_all_frozen="stop"` asks to stop then.

    Raises:
        TypeError: the optimizer, the scheduler, the policy or an option is of the wrong type.
        ValueError: the model has no repeated blocks, nothing in it is left to freeze, another run freezes it
            already, or the configuration does not fit the model.
        OSError: the predictor's files are missing or damaged.

    Example:

    ```python
    with FreezingRun(model, optimizer, total_steps, lr_scheduler=scheduler) as run:
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            run.step()
    print(run.ledger)
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        total_steps: int,
        config: SmartFRZConfig | dict[str, Any] | None = None,
        *,
        lr_scheduler: Any = None,
        predictor: SmartFRZPredictor | str | None = None,
        policy: Policy | str | None = None,
        steps_per_epoch: float | None = None,
        batches_per_step: int = 1,
        compiled: bool | None = None,
        timeout: float = 1800.0,
        inputs: Inputs = None,
    ):
        config, self.policy = resolve(config, predictor, policy)
        self.config = config
        self.configuration = config.to_dict() | {"policy": policy_name(config, self.policy)}
        self.stack = find_blocks(model, config.blocks, config.stem, inputs)
        if self.stack.problem:
            logger.warning(self.stack.problem)
        check_wrapper(model)
        check_stack(self.stack)
        check_other_run(self.stack.model, FreezingRun.of(self.stack.model))
        check_loop(self.stack.model, optimizer, total_steps, lr_scheduler)
        check_lengths(steps_per_epoch, batches_per_step, timeout)
        self._model, self.total_steps, self.steps_done = model, total_steps, 0
        self._begun = False
        between_stages = config.steps("decide_every", total_steps)
        self.rates = LearningRates.planned(lr_scheduler, total_steps)
        self.policy.reset()
        self._optimizer: Any = getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's wrapper
        self._optimizer_stepped = False
        self._last_state: dict[str, Any] | None = None
        self._restored: dict[Any, Any] = {}  # the optimizer's state before the first step
        compiled = is_compiled(model) if compiled is None else compiled
        with ExitStack() as undo:  # whatever fails here leaves nothing behind on the model
            self.ranks = Ranks(timeout)
            undo.callback(self.ranks.close)
            self.front = Front(
                model, self.stack, self._optimizer, config, self.ranks, total_steps, steps_per_epoch, compiled
            )
            undo.callback(self.front.close)
            sizes = self.front.meter.unit_parameters
            self.ledger = Ledger(self.stack.names, sizes, total_steps, trainable_parameters=sum(sizes.values()))
            self.front.update_ledger(self.ledger)
            self.observer = Observer(
                self.stack,
                history_size=self.policy.history_size,
                record_every=config.steps("record_every", total_steps),
                sampling_seed=config.sampling_seed,
                probe_examples=config.probe_examples if self.policy.front_probe else 0,
                min_probe_examples=self.policy.min_probe_examples,
                examples_between=lambda rows: between_stages * batches_per_step * rows,
                pilot_steps=pilot_steps(self.policy.pilot, total_steps),
                alone=self.front.beside_training,
                on_pass=self.front.meter.add_forward,
            )
            undo.callback(self.observer.close)
            self._stages = StageRunner(
                config, self.policy, self.front, self.observer, self.rates, self.ranks, self.ledger, total_steps
            )
            for hook in (
                *leave_frozen_ranks(model, lambda: self.front.freezer.frozen_adapters),
                *around_steps(self._optimizer, self._before_update, self._after_update),
                *follow_steps(
                    self.policy, self.stack, self._optimizer, lambda: (self.steps_done, total_steps, self.depth)
                ),
            ):
                undo.callback(hook.remove)
            self._undo = undo.pop_all()
        self.active = True
        _active[self.stack.model] = weakref.ref(self)

    @classmethod
    def of(cls, model: nn.Module) -> "FreezingRun | None":
        """The run that freezes an unwrapped model now, if there is one."""
        reference = _active.get(model)
        run = reference() if reference is not None else None
        return run if run is not None and run.active else None

    @property
    def depth(self) -> int:
        """Frozen units of the front now."""
        return self.front.depth

    @property
    def frozen_units(self) -> int:
        """Frozen units now, wherever they are."""
        return len(self.front.freezer.frozen)

    @property
    def should_stop(self) -> bool:
        """Whether nothing is left to train and `when_all_frozen="stop"` asks to stop then."""
        return self._stages.should_stop

    @property
    def stages_due(self) -> range:
        """The steps after which there is a freezing stage, besides the one at the end of the pilot."""
        return self._stages.due

    @property
    def most_units(self) -> int:
        """The most units that may ever freeze."""
        return self._stages.most

    def __enter__(self) -> "FreezingRun":
        if not self._begun:
            try:
                self.begin()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def begin(self, step: int = 0) -> None:
        """
        Take the first snapshot, and freeze what the policy freezes before training. Called by `with`.

        Args:
            step (`int`, *optional*, defaults to `0`): optimizer steps done so far.
        """
        self._begun, self.steps_done = True, step
        self._restored = dict(self._optimizer.state)
        self.observer.begin(step)
        self._stages.hold(step)

    def step(self, steps_done: int | None = None) -> None:
        """
        To be called after each call of `optimizer.step()`. Does nothing if the optimizer has taken no step since the
        last call, as under gradient accumulation.

        Args:
            steps_done (`int`, *optional*):
                Optimizer steps so far, for a loop that counts them itself (also those that a loss scaler has skipped).
                Counted here when it is not given.
        """
        if not self.active:
            raise ValueError("This FreezingRun is closed. Make a new one to go on freezing.")
        if not self._begun:
            self.begin()
        if steps_done is None:
            steps_done = self.steps_done + self._optimizer_stepped
        if steps_done == self.steps_done:
            return
        self._optimizer_stepped = False
        if self.ranks.count > 1:
            check_even_inputs(self._model)
        self.steps_done = steps_done
        if self.front.cache is not None:
            self.front.cache.end_of_step(steps_done)
        self.observer.end_of_step(steps_done, self.front.freezer.frozen)
        rises = self.rates.observe(steps_done, self._optimizer.param_groups[0]["lr"])
        if rises and self.frozen_units and self.config.unfreeze_on_restart and self.policy.history_size:
            self._stages.unfreeze(steps_done, "the learning rate rises again")
            self.observer.restart(steps_done)
        if self._stages.is_due(steps_done):
            self._stages.hold(steps_done)

    def close(self) -> None:
        """Leave the model as it was found, except for its weights. May be called again."""
        if not self.active:
            return
        if not is_sharded(self.stack.model):  # else all ranks would have to take part, and one may have failed alone
            with suppress(Exception):  # what failed may have no state
                self._last_state = self.state_dict()
        self.active = False
        self._undo.close()

    def state_dict(self) -> dict[str, Any]:
        """
        What a checkpoint has to keep, so that a run can go on as if it had never stopped. To be called after
        [`~FreezingRun.step`]. A closed run gives what it was before.

        Returns:
            `dict` of nested JSON values and tensors: `step`, `units` (names), `depth`, `apart` (indices of units), `config`,
            `ledger`, `meter`, `policy`, `learning_rates`, `rate_factor`, `weight_history`, `probe_history` and `pilot` (or
            `None`). Save it with [`~smartfrz_hf.checkpoint.save_state`], or beside the state of your own loop.

        Raises:
            ValueError: the run is closed, and was sharded by FSDP2.
        """
        if not self.active:
            if self._last_state is None:
                raise ValueError("This FreezingRun is closed, and its state is gone. Save it inside the `with` block.")
            return self._last_state
        return {
            "step": self.steps_done,
            "units": self.stack.names,
            "depth": self.depth,
            "apart": sorted(self.front.freezer.apart),
            "config": self.configuration,
            "ledger": self.ledger.state_dict(),
            "meter": self.front.meter.state_dict(),
            "policy": self.policy.state_dict(),
            "learning_rates": self.rates.state_dict(),
            "rate_factor": self.front.rate.factor,
            **self.observer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on from what `state_dict` gave, with a model and an optimizer that were restored already.

        Args:
            state (`dict`): as `state_dict` gives it.

        Raises:
            ValueError: it is of another model, or of another policy or history; the message says which.
        """
        check_state(state, self.stack.names, self.observer.history_shape, self.configuration)
        self._begun, self.steps_done = True, state["step"]
        if self.front.unfreeze():  # what froze as the run began has lost its state
            self._optimizer.state.update(self._restored)
        self._restored = {}
        self.ledger.load_state_dict(state["ledger"])
        self.front.meter.load_state_dict(state["meter"])
        self.policy.load_state_dict(state["policy"])
        if state["learning_rates"] is not None:
            self.rates.load_state_dict(state["learning_rates"])
        self.front.rate.factor = state["rate_factor"]
        self.observer.load_state_dict(state)
        frozen = [*range(state["depth"]), *state["apart"]]
        if frozen:
            self.front.freeze(frozen)
        self.front.update_ledger(self.ledger)

    def _before_update(self) -> None:
        self._restored = {}
        self.front.before_update()
        self.observer.before_update(self.steps_done)

    def _after_update(self) -> None:
        self._optimizer_stepped = True
        self.front.after_update()
        self.front.update_ledger(self.ledger)
