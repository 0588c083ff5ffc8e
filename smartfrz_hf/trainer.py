"""`SmartFRZTrainer`: what only a Trainer can do: DDP, FSDP2, exact resume, logs for every tracker, honest FLOPs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer

from ._compat import TrainerHooks
from .callback import SmartFRZCallback
from .checkpoint import frozen_as_saved, last_complete_checkpoint, load_state
from .config import SmartFRZConfig
from .cost.ledger import Ledger
from .distributed.fsdp import is_sharded, reshard
from .model.batches import first_rows_of
from .policies import Policy
from .predictor import SmartFRZPredictor


class SmartFRZMixin(TrainerHooks):
    """
    Turns a subclass of [`~transformers.Trainer`] into one that freezes converged blocks.

    Args:
        smartfrz ([`SmartFRZConfig`] or `dict`, *optional*): all options.
        predictor ([`SmartFRZPredictor`] or `str`, *optional*): a predictor, or its name on the Hub or folder.
        policy ([`Policy`] or `str`, *optional*): a policy of your own, or the name of one.
        args, kwargs: passed on to the Trainer.

    Raises:
        ValueError: an option is wrong, or `callbacks` holds a [`SmartFRZCallback`]: the mixin has one of its own.

    Example:

    ```python
    class FreezingSeq2SeqTrainer(SmartFRZMixin, Seq2SeqTrainer):
        pass
    ```
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Trainer in cls.__mro__ and cls.__mro__.index(Trainer) < cls.__mro__.index(SmartFRZMixin):
            raise TypeError(f"`SmartFRZMixin` must come before the Trainer class in the bases of {cls.__name__}.")

    def __init__(
        self,
        *args: Any,
        smartfrz: SmartFRZConfig | dict[str, Any] | None = None,
        predictor: SmartFRZPredictor | str | None = None,
        policy: Policy | str | None = None,
        **kwargs: Any,
    ):
        options = {name: kwargs[name] for name in SmartFRZConfig.__dataclass_fields__ if name in kwargs}
        if options:
            raise TypeError(f"Options of SmartFRZ are passed together: `smartfrz={options!r}`.")
        self.smartfrz = SmartFRZCallback(smartfrz, predictor, policy)
        self.smartfrz.trainer = self
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), self.smartfrz]
        super().__init__(*args, **kwargs)

    @property
    def ledger(self) -> Ledger:
        """What froze when and why, and what it saved."""
        return self.smartfrz.ledger

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train. With `resume_from_checkpoint=True`, go on from the last checkpoint that was written to its end, and from
        the start if there is none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
        if self.model is not None:
            # An evaluation leaves gathered weights, among which Accelerate 1.15 does not find those of the optimizer.
            reshard(self.model)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @contextmanager
    def around_training(self) -> Iterator[None]:
        """Leave the model as it was found, also when training ends with an exception."""
        try:
            yield
        finally:
            self.smartfrz.release()

    def before_checkpoint(self, folder: Path) -> None:
        """Write the state of the run before the Trainer writes its own."""
        run = self.smartfrz.run
        if run is not None and run.active and run.steps_done < self.state.global_step:
            run.step(self.state.global_step)  # a callback in front of ours saves
        self.smartfrz.save(folder, self.args.should_save)

    @contextmanager
    def around_loading(self, checkpoint: str | None) -> Iterator[None]:
        """Tell the callback which checkpoint it is, and let its optimizer load under FSDP2."""
        self.smartfrz.resume_from = checkpoint
        state = load_state(checkpoint) if checkpoint and is_sharded(self.model_wrapped) else None
        with frozen_as_saved(self.model_wrapped, state, self.smartfrz.config, self._first_rows):
            yield

    def _first_rows(self) -> Mapping[str, Any] | None:
        return first_rows_of(self.get_train_dataloader(), self.args.device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """
        FLOPs of the forward and backward passes since the last call as they really ran, which are fewer once a prefix is
        frozen. `total_flos` is their sum; the base class counts six per weight and token whatever is frozen.
        """
        run = self.smartfrz.run
        return 0 if run is None else round(run.front.meter.take().total)


class SmartFRZTrainer(SmartFRZMixin, Trainer):
    """
    A [`~transformers.Trainer`] that freezes each block from the front once it has converged.

    Args:
        smartfrz ([`SmartFRZConfig`] or `dict`, *optional*): all options.
        predictor ([`SmartFRZPredictor`] or `str`, *optional*): a predictor, or its name on the Hub or folder.
        policy ([`Policy`] or `str`, *optional*): a policy of your own, or the name of one.
        args, kwargs: as for [`~transformers.Trainer`].

    Example:

    ```python
    trainer = SmartFRZTrainer(model, args, train_dataset=train_dataset, smartfrz={"operating_point": "conservative"})
    trainer.train()
    print(trainer.ledger)
    ```
    """
