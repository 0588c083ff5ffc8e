"""The callback: observes, asks the policy, tells the Freezer."""

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .accounting import ComputeMeter
from .activation_cache import ActivationCache, make_cache
from .blocks import BlockStack, find_blocks
from .config import SmartFRZConfig
from .freezing import Freezer
from .history import WeightHistory, WeightSampler
from .ledger import Ledger, Stage
from .policies import LearningRates, Observation, make_policy
from .predictor import SmartFRZPredictor

logger = logging.get_logger(__name__)


class SmartFRZCallback(TrainerCallback):
    """
    Freezes each block of the model that a [`~transformers.Trainer`] trains, from the front, once it has converged.

    Args:
        config ([`SmartFRZConfig`], *optional*): every knob.
        predictor ([`SmartFRZPredictor`], *optional*): used instead of the one that the configuration names.

    Attributes:
        ledger ([`Ledger`]): what froze when and why, and what it saved, in the present or last run.

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
        self._release()  # what an interrupted run has left frozen
        self._stack = self._check(args, model)
        self._trainable = [unit.trainable for unit in self._stack.units]
        self._cache = None
        dtype = getattr(torch, self.config.frozen_dtype) if self.config.frozen_dtype else None
        self._freezer = Freezer(self._stack, optimizer, dtype)
        self.meter = ComputeMeter(model, self._stack, optimizer)
        self._running = True
        self.ledger = Ledger(
            units=self._stack.names,
            max_steps=state.max_steps,
            trainable_parameters=sum(p.numel() for p in self._stack.model.parameters() if p.requires_grad),
        )
        self._record_every = self.config.steps("record_every", state.max_steps)
        self._first_decision = self.config.steps("first_decision", state.max_steps)
        self._decide_every = self.config.steps("decide_every", state.max_steps)
        self._cache = make_cache(self.config, self._freezer, self.meter, args, state)
        if self._cache is not None:
            self.ledger.cache = self._cache.savings
        self._rates = LearningRates.planned(kwargs.get("lr_scheduler"), state.max_steps)
        self._history: WeightHistory | None = None
        if self.policy.history_size is not None:
            window, samples = self.policy.history_size
            self._sampler = WeightSampler(self._stack.units, samples, self.config.sampling_seed)
            device = next(self._stack.backbone.parameters()).device
            self._history = WeightHistory(len(self._stack), window, samples, device)
            self._history.record(self._sampler, state.global_step)
        self._decide(state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Say when no training row comes again."""
        if self._cache is not None:
            self._cache.last_epoch = state.epoch is not None and state.epoch + 1 >= state.num_train_epochs

    def on_step_begin(self, args, state, control, **kwargs):
        """Open the account of a step."""
        self.meter.start_of_step()

    def on_substep_end(self, args, state, control, **kwargs):
        """Close the account of a micro-batch."""
        self.meter.end_of_backward()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Close the account of the last micro-batch of a step."""
        self.meter.end_of_backward()

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Close the account of a step."""
        self.meter.end_of_step()
        self.ledger.spent, self.ledger.full = self.meter.spent, self.meter.full
        self.ledger.unit_flops, self.ledger.full_unit_flops = self.meter.unit_flops, self.meter.full_unit_flops

    def on_step_end(self, args, state, control, **kwargs):
        """Take a snapshot and hold a freezing stage where they are due."""
        step, active = state.global_step, range(self._freezer.depth, len(self._stack))
        if self._cache is not None:
            rows_per_step = args.gradient_accumulation_steps * args.train_batch_size
            self._cache.rows_left = (state.max_steps - step) * rows_per_step
        if self._history is not None and active and step % self._record_every == 0:
            self._history.record(self._sampler, step, active)
        since_first = step - self._first_decision
        if since_first >= 0 and since_first % self._decide_every == 0 and step < state.max_steps:
            self._decide(state)

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the model as it was found, but for its weights."""
        self._release()

    def _decide(self, state: TrainerState) -> None:
        observation = Observation(
            step=state.global_step,
            max_steps=state.max_steps,
            depth=self._freezer.depth,
            trainable=self._trainable,
            rates=self._rates,
            history=self._history,
        )
        decision = self.policy.decide(observation)
        self.ledger.decisions += 1
        depth = decision.depth if self.config.max_depth is None else min(decision.depth, self.config.max_depth)
        if depth <= self._freezer.depth:
            return
        new = self._freezer.freeze_to(depth)
        self.meter.recount(depth)
        if self._cache is not None:
            self._cache.freeze_to(depth)
        self.ledger.stages.append(Stage(state.global_step, depth, [unit.name for unit in new], decision.reason))
        self.ledger.frozen_parameters = self._freezer.frozen_parameters
        logger.info(
            f"step {state.global_step}: froze {', '.join(unit.name for unit in new)} ({depth} of "
            f"{len(self._stack)} units): {decision.reason}"
        )

    def _check(self, args: TrainingArguments, model: nn.Module) -> BlockStack:
        if args.deepspeed is not None or args.distributed_state.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "SmartFRZ cannot freeze under DeepSpeed ZeRO, which fixes what is trained when it starts; use DDP or "
                "a single process instead."
            )
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(
                f"This version of smartfrz_hf serves one process on one device, and this run has {args.world_size} "
                f"processes and {args.n_gpu} devices in each; start one process and show it one device "
                "(`CUDA_VISIBLE_DEVICES=0`), or leave the callback out."
            )
        stack = find_blocks(model, self.config.blocks)
        if not any(unit.trainable for unit in stack.units):
            raise ValueError(
                f"All of {len(stack)} units of {type(stack.model).__name__} are frozen already: nothing is left for "
                "SmartFRZ to freeze. Leave the callback out, or let some parameters require gradients."
            )
        return stack

    def _release(self) -> None:
        if self._running:
            if self._cache is not None:
                self._cache.close()
            self._freezer.unfreeze_to(0)
            self.meter.close()
            self._running = False
