"""The callback: observes, asks the policy, tells the Freezer."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .activation_cache import ActivationCache, make_cache
from .checkpoint import RunState, check_state, load_renamed, load_state, save_state
from .checks import check_engine
from .config import SmartFRZConfig
from .cost.flops import ComputeMeter
from .cost.ledger import Ledger, Stage
from .distributed.consensus import Ranks
from .distributed.fsdp import is_sharded, reshard
from .freezing.compile import GraphLimits, is_compiled
from .freezing.freezer import Freezer
from .model.units import BlockStack, Unit, find_blocks
from .policies import Observation, make_policy
from .predictor import SmartFRZPredictor
from .signals.probe import FrontProbe
from .signals.probe_history import ProbeHistory, affordable_rows
from .signals.schedule import LearningRates
from .signals.weights import WeightHistory, WeightSampler

logger = logging.get_logger(__name__)


class SmartFRZCallback(TrainerCallback):
    """
    Freezes each block of the model that a [`~transformers.Trainer`] trains, from the front, once it has converged.

    Args:
        config ([`SmartFRZConfig`], *optional*): every knob.
        predictor ([`SmartFRZPredictor`], *optional*): used instead of the one that the configuration names.

    Attributes:
        ledger ([`Ledger`]): what froze when and why, and what it saved, in the present or last run.
        resume_from (`str`, *optional*): checkpoint that the run goes on from, where a Trainer says so. Without it, the
            one of the present step in the output folder.
        after_freezing (`Callable`, *optional*): called on all ranks after the depth has changed.

    Raises:
        ValueError: the configuration does not fit the predictor; and when training starts or the `Trainer` is made,
            the model has no linear order of blocks, nothing in it is left to freeze, or the run is distributed in a
            way that freezing cannot serve.
        OSError: the predictor's files are missing or damaged.

    Example:

    ```python
    trainer = Trainer(model, args, train_dataset=train_dataset, callbacks=[SmartFRZCallback()])
    trainer.train()
    ```
    """

    def __init__(self, config: SmartFRZConfig | None = None, predictor: SmartFRZPredictor | None = None):
        self.config = config or SmartFRZConfig()
        self.policy = make_policy(self.config, predictor)
        self.ledger = Ledger()
        self.resume_from: str | None = None
        self.after_freezing: Callable[[], object] | None = None
        self._cache: ActivationCache | None = None
        self._running = False

    def on_init_end(self, args, state, control, model=None, **kwargs):
        """Refuse what cannot work while the mistake is still cheap."""
        self._check(args, model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        **kwargs,
    ):
        """Find the units, take the first snapshot, and let the policy freeze what is frozen from the start."""
        if self._running and self.ledger.depth and args.auto_find_batch_size and args.world_size > 1:
            raise RuntimeError(
                "The Trainer starts again with a smaller batch, and has told DDP to leave out what had frozen. Use "
                "`SmartFRZTrainer`, or `SmartFRZMixin` over a Trainer of your own; or set `auto_find_batch_size=False`."
            )
        self.release()  # what an interrupted run has left frozen
        self._stack = self._check(args, model)
        self._trainable = [unit.trainable for unit in self._stack.units]
        self._cache = None
        dtype = getattr(torch, self.config.frozen_dtype) if self.config.frozen_dtype else None
        self._freezer = Freezer(self._stack, optimizer, dtype)
        self.meter = ComputeMeter(model, self._stack, optimizer)
        self._graphs = GraphLimits(is_compiled(model, args))
        self._running, self._saved = True, -1
        self.ledger = Ledger(
            units=self._stack.names,
            max_steps=state.max_steps,
            trainable_parameters=sum(p.numel() for p in self._stack.model.parameters() if p.requires_grad),
        )
        self._record_every = self.config.steps("record_every", state.max_steps)
        self._first_decision = self.config.steps("first_decision", state.max_steps)
        self._decide_every = self.config.steps("decide_every", state.max_steps)
        self._ranks = Ranks(args.ddp_timeout)
        self._cache = self._make_cache(args, state)
        if self._cache is not None:
            self.ledger.cache = self._cache.savings
        self._rates = LearningRates.planned(kwargs.get("lr_scheduler"), state.max_steps)
        self._restarts = self._rates.restarts if self.config.unfreeze_on_restart and self.policy.history_size else []
        self._history: WeightHistory | None = None
        if self.policy.history_size is not None:
            window, weights_per_unit = self.policy.history_size
            self._sampler = WeightSampler(self._stack.units, weights_per_unit, self.config.sampling_seed)
            self._history = WeightHistory(len(self._stack), window, weights_per_unit, self._device)
        self._front = self._make_front(args)
        if not self._resume(args, state):
            if self._history is not None:
                self._history.record(self._sampler, state.global_step)
            self._decide(state)

    def _make_cache(self, args: TrainingArguments, state: TrainerState) -> ActivationCache | None:
        epochs = state.num_train_epochs
        per_epoch = state.max_steps / epochs if 0 < epochs <= state.max_steps else None
        if args.num_train_epochs and args.max_steps <= 0:
            per_epoch = state.max_steps / args.num_train_epochs
        return make_cache(
            self.config,
            self._freezer,
            self.meter,
            self._ranks,
            state.max_steps,
            per_epoch,
            is_compiled(self._stack.model, args),
        )

    def _make_front(self, args: TrainingArguments) -> ProbeHistory | None:
        if not (self.policy.front_probe and self.config.probe_examples):
            return None
        rows_per_step = args.gradient_accumulation_steps * args.train_batch_size
        rows = affordable_rows(self._decide_every * rows_per_step)
        probe = FrontProbe(self._stack, min(rows, self.config.probe_examples))
        probe.on_pass = self.meter.add_forward
        return ProbeHistory(probe)

    def _look(self, step: int) -> None:
        """Take a look at the front probe, if there is one."""
        if self._front is None or not self._front.probe.ready:
            return
        try:
            with nullcontext() if self._cache is None else self._cache.bypassed():
                self._front.record(step)
        except Exception as error:
            logger.warning(
                f"The front probe does not work with {type(self._stack.model).__name__} ({type(error).__name__}: {error}): "
                "SmartFRZ decides by the weights alone."
            )
            self._close_front()
        finally:
            reshard(self._stack.model)

    def _close_front(self) -> None:
        if self._front is not None:
            self._front.probe.close()
            self._front = None

    def on_step_begin(self, args, state, control, **kwargs):
        """Open the account of a step."""
        self.meter.start_of_step()

    def on_substep_end(self, args, state, control, **kwargs):
        """Close the account of a micro-batch."""
        self.meter.end_of_backward()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Close the account of the last micro-batch of a step, and look at the front before anything has changed."""
        self.meter.end_of_backward()
        if self._front is not None and not self._front.steps:
            self._look(state.global_step)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Close the account of a step."""
        self.meter.end_of_step()
        self.ledger.spent, self.ledger.full = self.meter.spent, self.meter.full
        self.ledger.unit_flops, self.ledger.full_unit_flops = self.meter.unit_flops, self.meter.full_unit_flops

    def on_step_end(self, args, state, control, **kwargs):
        """Take a snapshot and hold a freezing stage where they are due."""
        step, active = state.global_step, range(self._freezer.depth, len(self._stack))
        self._step = step
        if self._cache is not None:
            self._cache.end_of_step(step)
        if self._history is not None and active and step % self._record_every == 0:
            self._history.record(self._sampler, step, active)
        if step in self._restarts and self._freezer.depth:
            self._unfreeze(args, state)
        since_first = step - self._first_decision
        if since_first >= 0 and since_first % self._decide_every == 0 and step < state.max_steps:
            self._decide(state)
        if control.should_save and not control.should_evaluate:
            self._save_before_trainer(args, state)

    def on_evaluate(self, args, state, control, **kwargs):
        """Write the state where a checkpoint follows."""
        if self._running and control.should_save:
            self._save_before_trainer(args, state)

    def on_save(self, args, state, control, **kwargs):
        """Write the state where nobody knew of the checkpoint before."""
        if self._saved != state.global_step:
            self._save_before_trainer(args, state)

    def save(self, folder: str | Path) -> None:
        """
        Write what the run needs to go on from here into the folder of a checkpoint.

        Args:
            folder (`str`): of the checkpoint.
        """
        state = RunState(
            step=self._step,
            units=self._stack.names,
            depth=self._freezer.depth,
            config=self.config.to_dict(),
            ledger=self.ledger.state(),
            meter=self.meter.state(),
            history=self._history,
            front=self._front if self._front is not None and self._front.steps else None,
        )
        save_state(state, folder)
        self._saved = self._step

    def _save_before_trainer(self, args: TrainingArguments, state: TrainerState) -> None:
        # The Trainer writes its own state last, so that a checkpoint which it takes for whole has ours. Where it puts the
        # checkpoints of a trial, a callback does not know, and no trial is resumed.
        if args.should_save and not state.is_hyper_param_search:
            self.save(self._checkpoint(args, state))

    @staticmethod
    def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the model as it was found, but for its weights, and see that they are the best ones if that was asked for."""
        self.release()
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and self._load_renamed(best):
            logger.warning(f"The Trainer did not know the names of the best weights, in {best}; they are loaded now.")

    def release(self) -> None:
        """Give the model back as it was found, but for its weights. Does nothing unless a run is under way."""
        if self._running:
            self._running = False
            if self._cache is not None:
                self._cache.close()
            reshard(self._stack.model)
            units = self._freezer.unfreeze_to(0)
            if units and self.after_freezing is not None:
                self.after_freezing()
            self._graphs.restore()
            self._close_front()
            self.meter.close()
            self._ranks.close()

    def _decide(self, state: TrainerState) -> None:
        if self._front is not None and self._front.steps and self._freezer.depth < len(self._stack):
            self._look(state.global_step)
        observation = Observation(
            step=state.global_step,
            max_steps=state.max_steps,
            depth=self._freezer.depth,
            trainable=self._trainable,
            rates=self._rates,
            history=self._history,
            front=self._front,
        )
        decision = self.policy.decide(observation)
        self.ledger.decisions += 1
        depth = decision.depth if self.config.max_depth is None else min(decision.depth, self.config.max_depth)
        depth = self._ranks.broadcast(depth, f"the freezing stage of step {state.global_step}")
        if depth <= self._freezer.depth:
            return
        self.meter.recount(depth)
        new = self._freeze_to(depth)
        self.ledger.stages.append(Stage(state.global_step, depth, [unit.name for unit in new], decision.reason))
        self.ledger.frozen_parameters = self._freezer.frozen_parameters
        logger.info(
            f"step {state.global_step}: froze {', '.join(unit.name for unit in new)} ({depth} of "
            f"{len(self._stack)} units): {decision.reason}"
        )

    def _freeze_to(self, depth: int) -> list[Unit]:
        new = self._freezer.freeze_to(depth)
        self._graphs.extend()
        if self._cache is not None:
            self._cache.freeze_to(depth)
        if self.after_freezing is not None:
            self.after_freezing()
        return new

    def _unfreeze(self, args: TrainingArguments, state: TrainerState) -> None:
        """Let everything train again: what was learned of the weights says nothing about where a new cycle takes them."""
        if self._cache is not None:
            savings = self._cache.savings
            self._cache.close()
            # On all ranks, though it may have turned itself off on some.
            self._cache = self._make_cache(args, state)
            if self._cache is not None:
                if savings.off is not None:
                    self._cache.close()
                self._cache.savings = savings
        units = self._freezer.unfreeze_to(0)
        self._graphs.extend()
        self.meter.recount(0)
        if self.after_freezing is not None:
            self.after_freezing()
        if self._history is not None:
            self._history = WeightHistory(*self._history.shape, self._device)
            self._history.record(self._sampler, state.global_step)
        if self._front is not None and self._front.steps:
            self._front.restart()
            self._look(state.global_step)
        reason = "the learning rate rises again"
        self.ledger.stages.append(Stage(state.global_step, 0, [unit.name for unit in units], reason))
        self.ledger.frozen_parameters = 0
        logger.info(f"step {state.global_step}: all {len(self._stack)} units train again, as {reason}")

    def _resume(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Take up the state of the checkpoint that the run goes on from; whether there was one."""
        self._step = state.global_step
        if not state.global_step:
            return False
        folder = Path(self.resume_from) if self.resume_from else self._checkpoint(args, state)
        if self._load_renamed(folder):
            logger.warning(f"The Trainer did not know the names of the weights in {folder}; they are loaded now.")
        found = load_state(folder, self._device)
        depths = -1 if found is None else found.depth
        if self._ranks.broadcast(depths, f"the checkpoint {folder}") != depths:
            raise ValueError(
                f"This rank does not find in {folder} what rank 0 finds there: all have to read the same files."
            )
        if found is None:
            logger.warning(
                f"There is no SmartFRZ state of step {state.global_step} in {folder}: training goes on with nothing frozen "
                "and an empty history."
            )
            return False
        shape = None if self._history is None else self._history.shape
        check_state(found, folder, state.global_step, self._stack.names, shape, self.config.to_dict())
        if not any(folder.glob("optimizer*")):
            logger.warning(f"{folder} holds no optimizer state: the optimizer starts anew, frozen units stay frozen.")
        self.ledger.restore(found.ledger)
        self.meter.restore(found.meter)
        self.ledger.spent, self.ledger.full = self.meter.spent, self.meter.full
        if found.history is not None:
            self._history = found.history
        if found.front_file is not None and self._front is not None:
            self._front.load(found.front_file, self._device)
        if found.depth:
            self._freeze_to(found.depth)
        return True

    def _load_renamed(self, folder: str | Path) -> bool:
        # Checkpoints of FSDP2 are read by Accelerate, by the names that the model has.
        return not is_sharded(self._stack.model) and load_renamed(self._stack.model, folder)

    @property
    def _device(self) -> torch.device:
        return next(self._stack.backbone.parameters()).device

    def _check(self, args: TrainingArguments, model: nn.Module) -> BlockStack:
        check_engine(args, model, self.config, with_mixin=self.after_freezing is not None)
        stack = find_blocks(model, self.config.blocks)
        if not any(unit.trainable for unit in stack.units):
            raise ValueError(
                f"All of {len(stack)} units of {type(stack.model).__name__} are frozen already: nothing is left for "
                "SmartFRZ to freeze. Leave the callback out, or let some parameters require gradients."
            )
        return stack
