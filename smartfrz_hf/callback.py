"""The callback: tells a [`FreezingRun`] what a Trainer does."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ._compat import calling_handler, resumed_checkpoint
from .checkpoint import load_renamed, load_run, save_state
from .checks import check_only_callback, check_restart, check_stack, check_trainer
from .config import SmartFRZConfig
from .cost.ledger import Ledger
from .model.batches import first_rows_of
from .model.discovery import NoOrderError
from .model.units import find_blocks, unwrap_model
from .policies import Policy, resolve
from .predictor import SmartFRZPredictor
from .reporting import Reporter
from .run import FreezingRun

logger = logging.get_logger(__name__)


class SmartFRZCallback(TrainerCallback):
    """
    Freezes each block of the model that a [`~transformers.Trainer`] trains, from the front, once it has converged.

    Args:
        config ([`SmartFRZConfig`] or `dict`, *optional*): all options.
        predictor ([`SmartFRZPredictor`] or `str`, *optional*): a predictor, or its name on the Hub or folder.
        policy ([`Policy`] or `str`, *optional*): a policy of your own, or the name of one.
        options: fields of [`SmartFRZConfig`], such as `operating_point="conservative"`.

    Attributes:
        ledger ([`Ledger`]): what froze when and why, and what it saved, in the present or last run.
        run ([`FreezingRun`], *optional*): the present or last run; `None` before training.
        trainer ([`~transformers.Trainer`], *optional*): set by [`SmartFRZMixin`]; a plain Trainer does not tell.
        resume_from (`str`, *optional*): checkpoint that the run goes on from, set by [`SmartFRZMixin`].

    Raises:
        ValueError: an option is wrong; and when the `Trainer` is made or training starts, the model has no
            repeated blocks, nothing in it is left to freeze, the Trainer has two of these callbacks, or freezing does not
            work with the way in which the run is distributed.
        TypeError: an option is unknown, or of the wrong type.
        OSError: the predictor's files are missing or damaged.

    Example:

    ```python
    trainer = Trainer(model, args, train_dataset=train_dataset, callbacks=[SmartFRZCallback()])
    trainer.train()
    ```
    """

    def __init__(
        self,
        config: SmartFRZConfig | dict[str, Any] | None = None,
        predictor: SmartFRZPredictor | str | None = None,
        policy: Policy | str | None = None,
        **options: Any,
    ):
        self.config, self.policy = resolve(config, predictor, policy, **options)
        self.ledger = Ledger()
        self.run: FreezingRun | None = None
        self.trainer: Trainer | None = None
        self.resume_from: str | None = None
        self._reporter = Reporter()
        self._saved_step = -1

    def on_init_end(self, args, state, control, model=None, **kwargs):
        """Refuse what cannot work before any time is spent."""
        args, model = _of_body(args, model, kwargs)
        self._check(args, model)
        self._reporter.attach()
        with suppress(NoOrderError):  # the first rows of the training data may show the order
            check_stack(find_blocks(model, self.config.blocks, self.config.stem))

    def on_train_begin(
        self, args, state, control, model=None, optimizer=None, lr_scheduler=None, train_dataloader=None, **kwargs
    ):
        """Start a run, or go on with the one in the checkpoint."""
        args, model = _of_body(args, model, kwargs)
        if self.run is not None and self.run.active and self.trainer is None:
            check_restart(args, self.run.frozen_units)
        self._check(args, model)
        if state.max_steps == 0:  # `num_train_epochs=0`, as to evaluate with a training script
            self.run, self.ledger = None, Ledger()
            return
        epochs = state.num_train_epochs
        self.run = FreezingRun(
            model if self.trainer is None else self.trainer.model_wrapped,
            optimizer,
            state.max_steps,
            self.config,
            lr_scheduler=lr_scheduler,
            policy=self.policy,
            # The length of a pass over an iterable dataset is not known.
            steps_per_epoch=state.max_steps / epochs if 0 < epochs <= state.max_steps else None,
            batches_per_step=args.gradient_accumulation_steps,
            compiled=True if args.torch_compile else None,
            timeout=args.ddp_timeout,
            inputs=lambda: first_rows_of(train_dataloader, args.device),
        )
        self.ledger, self._saved_step = self.run.ledger, -1
        if not state.global_step or not load_run(
            self.run, self.resume_from or resumed_checkpoint() or _checkpoint(args, state), state.global_step
        ):
            self.run.begin(state.global_step)
        self._reporter.begin(state, self.run)

    def on_step_end(self, args, state, control, **kwargs):
        """Take a snapshot and hold a freezing stage where they are due."""
        if self.run is not None:
            self.run.step(state.global_step)
            self._reporter.show_depth()
            control.should_training_stop |= self.run.should_stop
            if control.should_save and not control.should_evaluate:
                self._save_before_trainer(args, state, kwargs)

    def on_evaluate(self, args, state, control, **kwargs):
        """Write the state where a checkpoint follows."""
        if self.run is not None and self.run.active and control.should_save:
            self._save_before_trainer(args, state, kwargs)

    def on_save(self, args, state, control, **kwargs):
        """Write the state where nothing announced the checkpoint."""
        if self.run is not None and self._saved_step != state.global_step:
            self._save_before_trainer(args, state, kwargs)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Leave the model as it was found, except for its weights, and with the best ones if that was asked for."""
        args, model = _of_body(args, model, kwargs)
        self.release()
        self._reporter.end(state, model)
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None:
            load_renamed(unwrap_model(model), best)

    def release(self) -> None:
        """Leave the model as it was found, except for its weights. Does nothing unless a run is under way."""
        if self.run is not None:
            self.run.close()

    def save(self, folder: str | Path, writes: bool = True) -> None:
        """
        Write what the run needs to go on from here. Does nothing before the first run. To be called in all processes.

        Args:
            folder (`str`): of the checkpoint.
            writes (`bool`, *optional*, defaults to `True`): whether it is this process that writes.
        """
        if self.run is not None:
            state = self.run.state_dict()
            if writes:
                save_state(state, folder)
            self._saved_step = self.run.steps_done

    def _save_before_trainer(self, args: TrainingArguments, state: TrainerState, event: dict[str, Any]) -> None:
        # The Trainer writes its own state last, so that a checkpoint that looks complete to it has ours. Where the
        # checkpoints of a trial go, a callback does not know, and no trial is resumed.
        if not state.is_hyper_param_search:
            args, _ = _of_body(args, None, event)
            self.save(_checkpoint(args, state), args.should_save)

    def _check(self, args: TrainingArguments, model: Any) -> None:
        handler = calling_handler()
        if handler is not None:
            check_only_callback(sum(isinstance(callback, SmartFRZCallback) for callback in handler.callbacks))
        check_trainer(args, model, self.config, with_mixin=self.trainer is not None)
        interrupted = FreezingRun.of(unwrap_model(model))
        if interrupted is not None:
            interrupted.close()


def _of_body(args: Any, model: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """
    The arguments and the model of an event. SetFit tells its callbacks its own, and those of the trainer of its body as `st_args`
    and `st_model`.
    """
    return kwargs.get("st_args", args), kwargs.get("st_model", model)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
