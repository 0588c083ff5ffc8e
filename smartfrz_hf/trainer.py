"""`SmartFRZTrainer`: what only a Trainer can do for freezing: DDP, FSDP2, checkpoints, logs for every tracker, honest FLOPs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .callback import SmartFRZCallback
from .checkpoint import last_complete_checkpoint, load_state
from .config import SmartFRZConfig
from .cost.ledger import Ledger
from .distributed.ddp import rebuild_reducer
from .distributed.fsdp import is_sharded, reshard
from .model.units import find_blocks
from .predictor import SmartFRZPredictor

# A mixin comes before the Trainer it widens; only the type checker has to know which methods it can rely on.
if TYPE_CHECKING:
    _Widened = Trainer
else:
    _Widened = object


class SmartFRZMixin(_Widened):
    """
    Turns a subclass of [`~transformers.Trainer`] into one that freezes converged blocks.

    Args:
        smartfrz ([`SmartFRZConfig`], *optional*): every knob.
        predictor ([`SmartFRZPredictor`], *optional*): used instead of the one that the configuration names.
        args, kwargs: passed on to the Trainer.

    Example:

    ```python
    class FreezingSeq2SeqTrainer(SmartFRZMixin, Seq2SeqTrainer):
        pass
    ```
    """

    def __init__(
        self, *args, smartfrz: SmartFRZConfig | None = None, predictor: SmartFRZPredictor | None = None, **kwargs
    ):
        self.smartfrz = SmartFRZCallback(smartfrz, predictor)
        self.smartfrz.after_freezing = lambda: rebuild_reducer(self.model_wrapped)
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), self.smartfrz]
        super().__init__(*args, **kwargs)

    @property
    def ledger(self) -> Ledger:
        """What froze when and why, and what it saved."""
        return self.smartfrz.ledger

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train. With `resume_from_checkpoint=True`, go on from the last checkpoint that was written to its end, and from the
        start if there is none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
        if self.model is not None:
            # An evaluation leaves gathered weights, among which Accelerate 1.15 does not find those of the optimizer.
            reshard(self.model)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            # A Trainer that tries again with a smaller batch, and a user who does, finds nothing frozen.
            self.smartfrz.release()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.smartfrz.save(folder)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.smartfrz.resume_from = checkpoint
        with self._only_what_has_state(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    @contextmanager
    def _only_what_has_state(self, checkpoint: str | None) -> Iterator[None]:
        """
        Meanwhile, under FSDP2, have those parameters ask for no gradient whose optimizer state a checkpoint does not hold. The
        state of all others has to be there, or it does not load.
        """
        found = load_state(checkpoint) if checkpoint and is_sharded(self.model_wrapped) else None
        if found is None:
            yield
            return
        # What trains again since this very step has no state yet.
        before = [stage["depth"] for stage in found.ledger["stages"] if stage["step"] < found.step]
        depth = max([found.depth, *before[-1:]])
        units = find_blocks(self.model_wrapped, self.smartfrz.config.blocks).units[:depth]
        parameters = [p for unit in units for p in unit.named_parameters().values() if p.requires_grad]
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the figures of [`Ledger.logs`] (`freeze/depth` and others) added to training logs."""
        if "loss" in logs or "train_loss" in logs:
            logs |= self.ledger.logs()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """
        FLOPs of one micro-batch's forward and backward pass as they really ran: counted, and smaller once a prefix is
        frozen. `total_flos` is their sum; the base class counts six per weight and token whatever is frozen.
        """
        return round(self.smartfrz.meter.end_of_backward().total)


class SmartFRZTrainer(SmartFRZMixin, Trainer):
    """
    A [`~transformers.Trainer`] that freezes each block from the front once it has converged.

    Args:
        smartfrz ([`SmartFRZConfig`], *optional*): every knob.
        predictor ([`SmartFRZPredictor`], *optional*): used instead of the one that the configuration names.
        args, kwargs: as for [`~transformers.Trainer`].

    Example:

    ```python
    trainer = SmartFRZTrainer(model, args, train_dataset=train_dataset, smartfrz=SmartFRZConfig())
    trainer.train()
    trainer.ledger.freeze_steps
    ```
    """
