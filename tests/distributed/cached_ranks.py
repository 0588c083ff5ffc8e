"""
What each rank of a test of the cache does: trains with or without it, from the last whole checkpoint in the folder if there is
one, and writes what it saw, one file a rank.
"""

import argparse
import json
import os
import signal
from pathlib import Path

import torch
from architectures import build
from ranks import tiny_bert, whole_weights, write_end
from training import Rows, arguments
from transformers import TrainerCallback

from smartfrz_hf import SmartFRZConfig, SmartFRZTrainer
from smartfrz_hf.activation_cache import sharing
from smartfrz_hf.activation_cache.monitor import CacheMonitor
from smartfrz_hf.policies import Decision


def collate(rows):
    """Dynamic padding."""
    length = max(int(row["attention_mask"].sum()) for row in rows)
    whole = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return whole | {key: whole[key][:, :length] for key in ("input_ids", "attention_mask")}


class Counting(TrainerCallback):
    """Notes the rows looked up and found in each epoch, and turns one rank's cache off on the way, or kills all ranks."""

    def __init__(self, off_at, killed_at):
        self.off_at, self.killed_at, self.trainer, self.resumed_at = off_at, killed_at, None, 0
        self.rows, self.hits, self.bytes, self.kept = [], [], [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.resumed_at = state.global_step

    def on_epoch_begin(self, args, state, control, **kwargs):
        cache = self.trainer.ledger.cache
        if cache is not None:
            self.before = cache.rows, cache.hits

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == self.off_at and args.process_index:
            self.trainer.smartfrz.run.front.cache._turn_off("this rank has had enough")

    def on_epoch_end(self, args, state, control, **kwargs):
        cache = self.trainer.smartfrz.run.front.cache
        if cache is not None:
            self.rows.append(cache.savings.rows - self.before[0])
            self.hits.append(cache.savings.hits - self.before[1])
            self.bytes.append(cache.savings.bytes_memory)
            self.kept.append(len(cache.store))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--world_size", type=int, default=2)
    parser.add_argument("--no_cache", action="store_true")
    parser.add_argument("--memory", type=float, default=2.0**26)
    parser.add_argument("--disk", type=float, default=0.0)
    parser.add_argument("--model", default="bert")
    parser.add_argument("--padding", choices=["fixed", "dynamic"], default="fixed")
    parser.add_argument("--stages", type=json.loads, default={"0": 3}, help="from step to depth")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--off_at", type=int, help="step before which rank 1 turns its cache off")
    parser.add_argument("--killed_at", type=int, help="step before which every rank kills itself")
    parser.add_argument("--save_steps", type=int)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--restarts", action="store_true", help="the learning rate rises again")
    parser.add_argument("--hosts", action="store_true", help="each rank takes itself for a host")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tiny_bert(options.dropout) if options.model == "bert" else build(options.model)
    model.accepts_loss_kwargs = False
    more = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}
    args = arguments(
        options.folder,
        max_steps=-1,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=8 // options.world_size,
        per_device_eval_batch_size=4,
        eval_strategy="epoch" if options.evaluate else "no",
        logging_steps=1,
        ddp_timeout=30,
        average_tokens_across_devices=False,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        **more if options.restarts else {},
        **{"save_strategy": "steps", "save_steps": options.save_steps} if options.save_steps else {},
    )
    assert args.world_size == options.world_size, f"{args.world_size} processes, not {options.world_size}"
    # Tiny models compute faster than anything can be looked up; keep their cache on nevertheless.
    CacheMonitor.loss = lambda self: None
    if options.hosts:
        sharing._host = lambda: (str(os.getpid()), 0)
    counting = Counting(options.off_at, options.killed_at)
    images = options.model != "bert"
    trainer = SmartFRZTrainer(
        model,
        args,
        train_dataset=Rows(48, images=images),
        eval_dataset=Rows(16, images=images),
        data_collator=collate if options.padding == "dynamic" else None,
        callbacks=[counting],
        smartfrz=SmartFRZConfig(
            policy="smartfrz" if options.restarts else "static",
            activation_cache=not options.no_cache,
            cache_memory=options.memory,
            cache_disk=options.disk,
            cache_folder=str(options.folder),
            first_decision=1,
            decide_every=1,
            record_every=1,
        ),
    )
    counting.trainer = trainer
    stages = {int(step): depth for step, depth in options.stages.items()}

    def decide(seen):
        return Decision(max(depth for step, depth in {0: 0, **stages}.items() if step <= seen.step), "told")

    trainer.smartfrz.policy.decide = decide
    trainer.train(resume_from_checkpoint=True)
    cache = trainer.ledger.cache
    write_end(
        options.folder,
        args.process_index,
        whole_weights(model),
        world_size=args.world_size,
        resumed_at=counting.resumed_at,
        stages=[[stage.step, stage.depth] for stage in trainer.ledger.stages],
        losses=[log[key] for log in trainer.state.log_history for key in ("loss", "eval_loss") if key in log],
        rows=counting.rows,
        hits=counting.hits,
        bytes=counting.bytes,
        kept=counting.kept,
        off=None if cache is None else cache.off,
    )


if __name__ == "__main__":
    main()
