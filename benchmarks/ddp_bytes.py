"""
How many bytes do two processes send in each step? Counts, with a communication hook of DDP, what is reduced before and after each
freezing stage of MiniLM, beside the bytes of the gradients that are active.

Starts its two processes with `accelerate launch` and the recipe in `examples/accelerate_configs`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainingArguments
from workers import provenance

from smartfrz_hf import SmartFRZConfig, SmartFRZTrainer
from smartfrz_hf.predictor_training.tasks import MINILM, resolve_model

ROOT = Path(__file__).parents[1]
STEPS = 8


class CountingCallback(TrainerCallback):
    """Puts a hook on DDP that averages gradients as DDP does, and notes what it was given in each step."""

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
    """Body of each process."""
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
        result = {"model": MINILM, "world_size": args.world_size, "stages": list(counting.stages.values())}
        result |= provenance("torch", "transformers", "accelerate")
        out.write_text(json.dumps(result, indent=2) + "\n")


def table(results: dict) -> str:
    """The results as a Markdown table."""
    lines = ["| frozen units | active gradients | sent in a step |", "|---|---|---|"]
    for stage in results["stages"]:
        sizes = (f"{stage[key] / 1e6:.1f} MB" for key in ("active_parameter_bytes", "all_reduced_bytes"))
        lines.append(f"| {stage['depth']} | {' | '.join(sizes)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "ddp_bytes.json", help="results file"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train(options.out)
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    config = ROOT / "examples" / "accelerate_configs" / "ddp_cpu.yaml"
    words = ["-m", "accelerate.commands.launch", "--config_file", config, __file__, "--worker", "--out", options.out]
    subprocess.run([sys.executable, *map(str, words)], check=True)
    print(table(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
