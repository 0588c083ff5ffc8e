"""Where people look: the progress bar, the log, experiment trackers and the model card show what a run freezes."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerState
from transformers.trainer_callback import CallbackHandler
from transformers.utils import is_matplotlib_available, logging

from ._compat import after_model_card, calling_handler, calling_trainer
from .config import SmartFRZConfig
from .cost.ledger import HEAD, Ledger
from .policies import SmartFRZPolicy
from .run import FreezingRun

logger = logging.get_logger(__name__)

TAG = "smartfrz"
SECTION = re.compile(r"\n*<!-- smartfrz -->.*?<!-- /smartfrz -->\n*", re.DOTALL)
PICTURE = "freeze_timeline.png"


class Reporter(TrainerCallback):
    """
    Shows in a Trainer what a run freezes. Made and told by [`SmartFRZCallback`].

    It puts itself in front of the Trainer's other callbacks, so that trackers log the figures of [`Ledger.logs`], too.
    """

    def __init__(self) -> None:
        self.run: FreezingRun | None = None
        self._handler: CallbackHandler | None = None
        self._shown = -1

    def attach(self) -> None:
        """Take a place in front of the callbacks of the Trainer that is calling now."""
        handler = calling_handler()
        if handler is not None and self not in handler.callbacks:
            # A new list: the Trainer is going through the old one. Another reporter is that of a callback that was removed.
            handler.callbacks = [self, *(one for one in handler.callbacks if not isinstance(one, Reporter))]
        self._handler = handler

    def begin(self, state: TrainerState, run: FreezingRun) -> None:
        """Say what will happen, and give the configuration to the trackers. Model cards get a section from now on."""
        self.attach()
        self.run, self._shown = run, -1
        trainer = calling_trainer()
        if trainer is not None:
            after_model_card(trainer, lambda card: add_to_model_card(card, run.ledger, run.configuration))
        if state.is_world_process_zero:
            _say(opening_line(run))
            for callback in [] if self._handler is None else self._handler.callbacks:
                share_configuration(run.configuration, callback)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the figures of the ledger to training logs, before any tracker sees them, and to `log_history`."""
        if self.run is not None and ("loss" in logs or "train_loss" in logs):
            figures = self.run.ledger.logs()
            logs.update(figures)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(figures)

    def show_depth(self) -> None:
        """Show in the progress bar how many units are frozen."""
        if self.run is None or self._handler is None or self.run.frozen_units == self._shown:
            return
        for callback in self._handler.callbacks:
            bar = callback.training_bar if isinstance(callback, ProgressCallback) else None
            if bar is not None and hasattr(bar, "set_postfix_str"):
                bar.set_postfix_str(f"frozen {self.run.frozen_units}/{len(self.run.stack)}", refresh=False)
                self._shown = self.run.frozen_units

    def end(self, state: TrainerState, model: Any) -> None:
        """Say what was saved, and tag the model for `push_to_hub`."""
        if self.run is not None and state.is_world_process_zero:
            _say(closing_line(self.run.ledger, state.global_step))
        if hasattr(model, "add_model_tags") and TAG not in (getattr(model, "model_tags", None) or []):
            model.add_model_tags([TAG])
        self.run = None


def _say(line: str) -> None:
    # At the default verbosity, like the Trainer's own lines, and in the same way, which leaves the progress bar whole.
    if logging.get_verbosity() <= logging.WARNING:
        tqdm.write(line)


def opening_line(run: FreezingRun) -> str:
    """One line on what a run will do."""
    config, policy, units = run.config, run.policy, len(run.stack)
    if not isinstance(policy, SmartFRZPolicy):
        name = f"policy {run.configuration['policy']}"
    elif config.target_saving is not None and run.observer.pilot_steps:
        name = f"predictor, to save {config.target_saving:.0%} of the compute"
    elif config.freeze_threshold is not None:
        name = f"predictor, threshold {config.freeze_threshold:g}"
    else:
        name = f"predictor, {config.operating_point}"
    if isinstance(policy, SmartFRZPolicy) and config.target_saving is not None and not run.observer.pilot_steps:
        name += f"; the run is too short to save {config.target_saving:.0%} of the compute from the start"
    kind, due, pilot, total = type(run.stack.model).__name__, run.stages_due, run.observer.pilot_steps, run.total_steps
    are = "is" if run.frozen_units == 1 else "are"
    if policy.decides_once or not run.most_units or not (due or pilot):
        later = policy.most(units) and not policy.decides_once
        if later and not (due or pilot):
            name += f"; the first decision is due at step {due.start} of {total}"
        elif later and due and not policy.most(units, due[-1] / total):
            name += f"; the last decision is due at step {due[-1]} of {total}"
        if not run.frozen_units:
            return f"SmartFRZ: no unit of {kind} will freeze ({name})."
        return (
            f"SmartFRZ: {run.frozen_units} of {units} units of {kind} {are} frozen, and no other will freeze ({name})."
        )
    when = [f"after the first {pilot} steps"] if pilot else []
    if len(due) == 1:
        when.append(f"at step {due.start}")
    elif due:
        when.append("at every step" if due.step == 1 else f"every {due.step} steps")
    since = f", from step {due.start} on" if len(due) > 1 and due.start > due.step else ""
    frozen = f"; {run.frozen_units} {are} frozen already" if run.frozen_units else ""
    return (
        f"SmartFRZ: up to {run.most_units} of {units} units of {kind} may freeze, decided {' and then '.join(when)} of "
        f"{total}{since} ({name}){frozen}."
    )


def closing_line(ledger: Ledger, steps: int) -> str:
    """One line on what a run has frozen and saved."""
    if not ledger.stages:
        return f"SmartFRZ: nothing froze in {steps} {'step' if steps == 1 else 'steps'}."
    first, are = ledger.stages[0].step, "is" if ledger.frozen_units == 1 else "are"
    line = (
        f"SmartFRZ: {ledger.frozen_units} of {len(ledger.units)} units {are} frozen at the end, the first froze at step {first} of "
        f"{steps}; saved {ledger.compute_saved:.1%} of the compute"
    )
    if ledger.gap:
        line += f" ({ledger.gap_share:.1%} went through units frozen behind units that train)"
    if ledger.cache is not None and ledger.cache.rows:
        line += f"; {ledger.cache.outcome} by the cache ({ledger.cache.hit_rate:.0%} of rows found)"
    return f"{line}."


def share_configuration(config: dict[str, Any], callback: TrainerCallback) -> None:
    """
    Give the configuration to a tracker: to the `config` of W&B and Trackio, the parameters of MLflow, the texts of
    TensorBoard. Does nothing for other callbacks. A tracker that refuses it is worth a warning only.

    Args:
        config (`dict`): of the run, `FreezingRun.configuration`.
        callback ([`~transformers.TrainerCallback`]): any callback of the Trainer, after its `on_train_begin`.
    """
    names = {cls.__name__ for cls in type(callback).__mro__}
    values = {f"smartfrz/{name}": value for name, value in config.items()}
    try:
        if "WandbCallback" in names and (wandb := sys.modules.get("wandb")) and wandb.run is not None:
            wandb.config.update(values, allow_val_change=True)
        elif "TrackioCallback" in names and (trackio := sys.modules.get("trackio")):
            trackio.config.update(values, allow_val_change=True)
        elif "MLflowCallback" in names and (mlflow := sys.modules.get("mlflow")) and mlflow.active_run() is not None:
            mlflow.log_params(values)
        elif "TensorBoardCallback" in names and (writer := getattr(callback, "tb_writer", None)) is not None:
            writer.add_text("smartfrz", "\n".join(f"    {name}: {value!r}" for name, value in values.items()))
    except Exception as error:  # of a tracker, which may be offline, or have other values for a run that goes on
        logger.warning(
            f"{type(callback).__name__} did not take the configuration of SmartFRZ ({type(error).__name__}: {error})."
        )


def model_card_section(ledger: Ledger, config: SmartFRZConfig | dict[str, Any], picture: str | None = None) -> str:
    """
    A section for a model card: what froze when, and what it saved.

    Args:
        ledger ([`Ledger`]): of the run.
        config ([`SmartFRZConfig`] or `dict`): of the run, or its `FreezingRun.configuration`; options that are not the default
            ones are listed.
        picture (`str`, *optional*): path of the timeline, relative to the card.

    Returns:
        `str`: Markdown.
    """
    steps, saved = ledger.freeze_steps, ledger.unit_compute_saved
    rows = [
        f"| `{unit}` | {ledger.unit_parameters.get(unit, 0):,} | {steps.get(unit, '-')} | {saved.get(unit, 0.0):.1%} |"
        for unit in (*ledger.units, HEAD)
    ]
    defaults = SmartFRZConfig().to_dict()
    values = config if isinstance(config, dict) else config.to_dict()
    options = [f"`{name}={value!r}`" for name, value in values.items() if value != defaults[name]]
    lines = [
        "<!-- smartfrz -->",
        "## Layer freezing",
        "",
        f"Trained with [smartfrz_hf](https://github.com/smartfrz/smartfrz_hf): {ledger.frozen_units} of {len(ledger.units)} units "
        f"were frozen at the end, and {ledger.compute_saved:.1%} of the training compute was saved. "
        f"Options: {', '.join(options) or 'the default ones'}.",
        "",
        "| unit | trainable | froze at step | compute saved |",
        "|---|---|---|---|",
        *rows,
        *(["", f"![When each unit froze]({picture})"] if picture else []),
        "<!-- /smartfrz -->",
    ]
    return "\n".join(lines)


def add_to_model_card(path: str | os.PathLike, ledger: Ledger, config: SmartFRZConfig | dict[str, Any]) -> None:
    """
    Add the tag `smartfrz` and a section on freezing to a model card, in place of the section of an earlier run. With
    matplotlib, a picture of the timeline is written beside it.

    Args:
        path (`str`): Markdown file of the card, such as the `README.md` that `Trainer.create_model_card` writes.
        ledger ([`Ledger`]): of the run.
        config ([`SmartFRZConfig`] or `dict`): of the run, or its `FreezingRun.configuration`.

    Raises:
        FileNotFoundError: there is no card.
    """
    path = Path(path)
    card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    tags = card.data.get("tags") or []
    card.data["tags"] = [*([tags] if isinstance(tags, str) else tags), *([] if TAG in tags else [TAG])]
    picture = PICTURE if is_matplotlib_available() and ledger.units else None
    if picture:
        ledger.plot(path.with_name(PICTURE))
    card.text = f"{SECTION.sub(chr(10), card.text).rstrip()}\n\n{model_card_section(ledger, config, picture)}\n"
    card.save(path)
