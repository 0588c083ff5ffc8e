"""
Fine-tune a model for text classification on GLUE or on your own files in a plain training loop, and freeze its blocks as they
converge.

With Accelerate the script runs on any number of devices (`accelerate launch run_glue_no_trainer.py ...`). With
`--no_accelerate` the same loop runs in plain PyTorch, on one device.
"""

import argparse
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from common import check_extensions, first_samples, report_freezing, require_split, set_up_logging
from text_classification import (
    EXTENSION_TO_BUILDER,
    TASK_TO_KEYS,
    check_labels,
    check_task,
    evaluation_splits,
    load_model,
    load_text_metric,
    load_texts,
    predictions_of,
    text_columns,
    tokenize,
)
from torch.utils.data import DataLoader, RandomSampler
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, HfArgumentParser, SchedulerType, get_scheduler, set_seed

from smartfrz_hf import FreezingRun, SmartFRZArguments, SmartFRZConfig
from smartfrz_hf.checkpoint import load_state, save_state

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"


def parse_args(args: list[str] | None = None) -> tuple[SmartFRZConfig, argparse.Namespace]:
    """
    Read the command line.

    Args:
        args (`list[str]`, *optional*): the command line; that of the process when it is not given.

    Raises:
        ValueError: a value cannot work.
    """
    parser = HfArgumentParser(SmartFRZArguments, description=__doc__)
    add = parser.add_argument
    add("--task_name", help=f"GLUE task: {', '.join(TASK_TO_KEYS)}. The data comes from the Hub or from the files.")
    add("--train_file", help="Training data: a parquet, csv, json or jsonl file with a column `label`.")
    add("--validation_file", help="Evaluation data, a file like --train_file.")
    add("--max_train_samples", type=int, help="Largest number of samples to train on. Default: all.")
    add("--max_eval_samples", type=int, help="Largest number of samples to evaluate. Default: all.")
    add(
        "--max_length",
        type=int,
        default=128,
        help="Largest number of tokens per sample; longer samples are truncated.",
    )
    add("--pad_to_max_length", action="store_true", help="Pad to --max_length, not to the longest sample of a batch.")
    add("--model_name_or_path", required=True, help="Pretrained model on the Hub or in a folder.")
    add("--trust_remote_code", action="store_true", help="Run model code from the model's repository. Read it first.")
    add("--ignore_mismatched_sizes", action="store_true", help="Start with a new head if its size differs.")
    add("--per_device_train_batch_size", type=int, default=8, help="Training samples per device and batch.")
    add("--per_device_eval_batch_size", type=int, default=8, help="Evaluation samples per device and batch.")
    add("--learning_rate", type=float, default=5e-5, help="Highest learning rate.")
    add("--weight_decay", type=float, default=0.0, help="Weight decay of all weights but biases and norms.")
    add("--max_grad_norm", type=float, default=1.0, help="Norm to which gradients are clipped.")
    add("--num_train_epochs", type=int, default=3, help="Passes over the training data.")
    add("--max_train_steps", type=int, help="Optimizer steps, instead of --num_train_epochs.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Batches per optimizer step.")
    add(
        "--lr_scheduler_type",
        type=SchedulerType,
        default="linear",
        choices=[kind.value for kind in SchedulerType],
        help="Learning rate schedule.",
    )
    add("--num_warmup_steps", type=int, default=0, help="Optimizer steps in which the learning rate rises.")
    add("--output_dir", required=True, help="Folder for the model, the metrics and the checkpoints.")
    add("--seed", type=int, default=42, help="Seed of the head's weights, the order of the samples and dropout.")
    add("--checkpointing_steps", help="Save a checkpoint every so many optimizer steps, or after each `epoch`.")
    add("--resume_from_checkpoint", help="Checkpoint folder to resume from.")
    add("--with_tracking", action="store_true", help="Log to the tracker in --report_to.")
    add("--report_to", default="all", help="Tracker of Accelerate, such as tensorboard, wandb or trackio.")
    add("--no_accelerate", action="store_true", help="Train in plain PyTorch, on one device.")
    add("--use_cpu", action="store_true", help="Train on the CPU, even if there is an accelerator.")
    smartfrz_args, options = parser.parse_args_into_dataclasses(args)

    options.task_name = check_task(options.task_name)
    files = {"train": options.train_file, "validation": options.validation_file}
    options.files = {split: path for split, path in files.items() if path is not None}
    check_extensions(options.files, tuple(EXTENSION_TO_BUILDER))
    if options.task_name is None and not options.files:
        raise ValueError("No data: pass --task_name for a GLUE task, or --train_file and --validation_file.")
    if options.checkpointing_steps not in (None, "epoch") and not options.checkpointing_steps.isdigit():
        raise ValueError(
            f"--checkpointing_steps is {options.checkpointing_steps!r}; it must be a number of steps, or 'epoch'."
        )
    if options.no_accelerate and options.with_tracking:
        raise ValueError("--with_tracking uses the trackers of Accelerate; pass it without --no_accelerate.")
    return smartfrz_args.to_config(), options


class PlainAccelerator:
    """The part of [`~accelerate.Accelerator`] that the training loop uses, in plain PyTorch on one device."""

    is_main_process, num_processes = True, 1

    def __init__(self, gradient_accumulation_steps: int, cpu: bool):
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
        self.sync_gradients, self._batches = True, 0

    def prepare(self, model, optimizer, train_loader, eval_loader, scheduler):
        self.model, self.optimizer, self.scheduler = model.to(self.device), optimizer, scheduler
        self._batches_per_epoch = len(train_loader)
        return self.model, optimizer, train_loader, eval_loader, scheduler

    @contextmanager
    def accumulate(self, model) -> Iterator[None]:
        self._batches += 1
        is_last = self._batches == self._batches_per_epoch
        self.sync_gradients = is_last or self._batches % self.gradient_accumulation_steps == 0
        if is_last:
            self._batches = 0
        yield

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.gradient_accumulation_steps).backward()

    def clip_grad_norm_(self, parameters, max_norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def gather_for_metrics(self, tensors):
        return tensors

    def unwrap_model(self, model):
        return model

    def skip_first_batches(self, loader: DataLoader, count: int) -> Iterator:
        self._batches = count % self._batches_per_epoch
        return islice(loader, count, None)

    def save_state(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
        }
        torch.save(state, Path(folder, "training_state.pt"))

    def load_state(self, folder: str) -> None:
        state = torch.load(Path(folder, "training_state.pt"), map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"].cpu())

    def wait_for_everyone(self) -> None:
        pass


def group_parameters(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with and without weight decay: biases and norms have none."""
    with_decay, without = [], []
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        (with_decay if parameter.ndim > 1 else without).append(parameter)
    return [{"params": with_decay, "weight_decay": weight_decay}, {"params": without, "weight_decay": 0.0}]


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    loader: DataLoader,
    accelerator: Any,
    metric: Callable[..., dict[str, float]],
    regression: bool,
) -> dict[str, float]:
    """The metrics of a model on a split."""
    model.eval()
    predictions, references = [], []
    for batch in loader:
        batch = batch.to(accelerator.device)
        logits, labels = accelerator.gather_for_metrics((model(**batch).logits, batch["labels"]))
        predictions.append(predictions_of(logits.float().cpu().numpy(), regression))
        references.append(labels.cpu().numpy())
    return metric(np.concatenate(predictions), np.concatenate(references))


def main(args: list[str] | None = None) -> None:
    """
    Run the script.

    Args:
        args (`list[str]`, *optional*): the command line; that of the process when it is not given.
    """
    config, options = parse_args(args)
    if options.no_accelerate:
        accelerator: Any = PlainAccelerator(options.gradient_accumulation_steps, options.use_cpu)
    else:
        accelerator = Accelerator(
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            cpu=options.use_cpu,
            log_with=options.report_to if options.with_tracking else None,
            project_dir=options.output_dir,
        )
    set_up_logging(logging.WARNING, logging.INFO if accelerator.is_main_process else logging.WARNING)
    set_seed(options.seed)

    # Data, model and metric
    raw_datasets = load_texts(options.files, None, options.task_name)
    eval_splits = evaluation_splits(raw_datasets, "validation")
    splits = {"train": first_samples(require_split(raw_datasets, "train", "Training"), options.max_train_samples)}
    for name in eval_splits:
        splits[name] = first_samples(require_split(raw_datasets, name, "Evaluation"), options.max_eval_samples)
    check_labels(splits)
    model, tokenizer, regression = load_model(
        options.model_name_or_path,
        raw_datasets["train"],
        options.task_name,
        has_labels=True,
        ignore_mismatched_sizes=options.ignore_mismatched_sizes,
        trust_remote_code=options.trust_remote_code,
    )
    columns = text_columns(raw_datasets["train"], options.task_name)
    splits = tokenize(
        splits, columns, tokenizer, model.config, regression, options.max_length, options.pad_to_max_length
    )
    metric = load_text_metric(options.task_name, regression)
    collator = DataCollatorWithPadding(tokenizer)
    # The order of the samples is a function of the seed and the epoch, as in the Trainer, and independent of dropout.
    order = torch.Generator()
    train_loader = DataLoader(
        splits["train"],
        options.per_device_train_batch_size,
        sampler=RandomSampler(splits["train"], generator=order),
        collate_fn=collator,
        generator=torch.Generator(),
    )
    eval_loaders = [
        DataLoader(splits[name], options.per_device_eval_batch_size, collate_fn=collator, generator=torch.Generator())
        for name in eval_splits
    ]

    # Optimizer, schedule and length of the run
    optimizer = torch.optim.AdamW(group_parameters(model, options.weight_decay), lr=options.learning_rate)
    steps_per_epoch = math.ceil(
        math.ceil(len(train_loader) / accelerator.num_processes) / options.gradient_accumulation_steps
    )
    total_steps = options.max_train_steps or options.num_train_epochs * steps_per_epoch
    # Accelerate steps a schedule once per process.
    lr_scheduler = get_scheduler(
        options.lr_scheduler_type,
        optimizer,
        num_warmup_steps=options.num_warmup_steps * accelerator.num_processes,
        num_training_steps=total_steps * accelerator.num_processes,
    )
    model, optimizer, train_loader, eval_loader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loaders[0], lr_scheduler
    )
    if options.with_tracking:
        accelerator.init_trackers("glue_no_trainer", {"learning_rate": options.learning_rate, **config.to_dict()})

    progress = {"epoch": 0, "batches": 0, "steps": 0}
    if options.resume_from_checkpoint:
        accelerator.load_state(options.resume_from_checkpoint)
        progress = json.loads(Path(options.resume_from_checkpoint, PROGRESS_FILE).read_text())
        logger.info(f"Resuming from {options.resume_from_checkpoint} at step {progress['steps']} of {total_steps}.")
    run = FreezingRun(
        model, optimizer, total_steps, config, lr_scheduler=lr_scheduler, steps_per_epoch=steps_per_epoch
    )
    if options.resume_from_checkpoint:
        run.load_state_dict(load_state(options.resume_from_checkpoint))

    def save_checkpoint(name: str, epoch: int, batches: int) -> None:
        folder = Path(options.output_dir, name)
        accelerator.save_state(str(folder))
        state = run.state_dict()
        if accelerator.is_main_process:
            save_state(state, folder)
            position = {"epoch": epoch, "batches": batches, "steps": run.steps_done}
            (folder / PROGRESS_FILE).write_text(json.dumps(position) + "\n")

    checkpoint_every = int(options.checkpointing_steps) if (options.checkpointing_steps or "").isdigit() else None
    metrics: dict[str, float] = {}
    bar = tqdm(total=total_steps, initial=progress["steps"], disable=not accelerator.is_main_process)
    with run:
        for epoch in range(progress["epoch"], math.ceil(total_steps / steps_per_epoch)):
            model.train()
            order.manual_seed(options.seed + epoch)
            skipped = progress["batches"] if epoch == progress["epoch"] else 0
            batches = accelerator.skip_first_batches(train_loader, skipped) if skipped else train_loader
            losses = []
            for index, batch in enumerate(batches, start=skipped + 1):
                batch = batch.to(accelerator.device)
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    losses.append(loss.detach())
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
                        optimizer.step()
                        lr_scheduler.step()
                        optimizer.zero_grad()
                run.step()  # decides and freezes when the optimizer has taken a step
                if accelerator.sync_gradients:
                    bar.update()
                    if checkpoint_every and run.steps_done % checkpoint_every == 0:
                        save_checkpoint(f"step_{run.steps_done}", epoch, index)
                if run.steps_done >= total_steps or run.should_stop:
                    break

            metrics = evaluate(model, eval_loader, accelerator, metric, regression)
            logger.info(f"Epoch {epoch}: {metrics}")
            if options.with_tracking:
                loss = {"train_loss": float(torch.stack(losses).mean())} if losses else {}
                accelerator.log(loss | metrics | run.ledger.logs(), step=run.steps_done)
            if options.checkpointing_steps == "epoch":
                save_checkpoint(f"epoch_{epoch}", epoch + 1, 0)
            if run.should_stop:
                break
    bar.close()

    for name, loader in zip(eval_splits[1:], eval_loaders[1:], strict=True):  # MNLI has a second one
        loader = loader if options.no_accelerate else accelerator.prepare(loader)
        others = evaluate(model, loader, accelerator, metric, regression)
        metrics |= {f"{name.removeprefix('validation_')}_{key}": value for key, value in others.items()}
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.output_dir)
        tokenizer.save_pretrained(options.output_dir)
        results = {f"eval_{key}": value for key, value in metrics.items()} | run.ledger.logs()
        Path(options.output_dir, "all_results.json").write_text(json.dumps(results, indent=2) + "\n")
    report_freezing(run.ledger, run.steps_done, options.output_dir, accelerator.is_main_process)
    if options.with_tracking:
        accelerator.end_training()


if __name__ == "__main__":
    main()
