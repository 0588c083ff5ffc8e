"""
How many bytes do two processes exchange in each step?

Trains MiniLM on two processes under DDP, and counts with a communication hook the bytes that are all-reduced before and after
each freezing stage, and the bytes of the active gradients. Starts the processes with `accelerate launch` and
`examples/accelerate_configs/ddp_cpu.yaml`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainingArguments

from benchmarks.utils import ROOT, markdown_table, provenance, read_json, write_json
from smartfrz_hf import SmartFRZConfig, SmartFRZTrainer
from smartfrz_hf.predictor_training.tasks import MINILM, resolve_model

RESULTS = Path(__file__).parent / "results" / "ddp_bytes.json"
STEPS = 8


class CountingCallback(TrainerCallback):
    """Averages gradients as DDP does, in a communication hook that counts the bytes of each step."""

    def __init__(self):
        self.bytes = 0
        self.trainer: SmartFRZTrainer | None = None
        self.stages: dict[int, dict[str, int]] = {}

    def average(self, state, bucket):
        buffer = bucket.buffer()
        self.bytes += buffer.numel() * buffer.element_size()
        future = dist.all_reduce(buffer.div_(dist.get_world_size()), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.model_wrapped.register_comm_hook(None, self.average)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        active = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        depth = self.trainer.ledger.depth
        self.stages[depth] = {"depth": depth, "active_parameter_bytes": active, "all_reduced_bytes": self.bytes}
        self.bytes = 0


def train(out: Path) -> None:
    """What each process runs."""
    rows = [{"input_ids": torch.arange(16) + row, "labels": row % 2} for row in range(8 * STEPS)]
    counting = CountingCallback()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=4, save_strategy="no", use_cpu=True
        )
        assert args.world_size == 2, f"{args.world_size} processes were started, not 2"
        counting.trainer = SmartFRZTrainer(
            AutoModelForSequenceClassification.from_pretrained(resolve_model(MINILM)),
            args,
            train_dataset=rows,
            callbacks=[counting],
            smartfrz=SmartFRZConfig(policy="linear", linear_depth=1.0, first_decision=1, decide_every=1),
        )
        counting.trainer.train()
    if args.process_index == 0:
        results = {"model": MINILM, "world_size": args.world_size, "stages": list(counting.stages.values())}
        write_json(out, results | provenance())


def table(results: dict) -> str:
    """The results as a Markdown table."""
    keys = ("active_parameter_bytes", "all_reduced_bytes")
    rows = [[stage["depth"], *(f"{stage[key] / 1e6:.1f} MB" for key in keys)] for stage in results["stages"]]
    return markdown_table(["frozen units", "active gradients", "sent in a step"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train(options.out)
        return
    launch = ["-m", "accelerate.commands.launch", "--config_file", "examples/accelerate_configs/ddp_cpu.yaml"]
    script = ["--module", "benchmarks.speed.ddp_bytes", "--worker", "--out", str(options.out.resolve())]
    subprocess.run([sys.executable, *launch, *script], check=True, cwd=ROOT)
    print(table(read_json(options.out)))


if __name__ == "__main__":
    main()
