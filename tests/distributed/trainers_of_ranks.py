"""Each rank trains with Trainers of other libraries, and writes what froze and the final weights."""

import json
import sys
from pathlib import Path

import torch
import trainers
from safetensors.torch import save_file
from torch import distributed as dist

torch.set_num_threads(1)
trainers.ARGUMENTS |= {
    "ddp_timeout": 60,
    "num_train_epochs": 2,
    "gradient_checkpointing": False,
}
folder, names = Path(sys.argv[1]), sys.argv[2].split(",")
found, weights = {"world_size": 0}, {}
for name in names:
    one = trainers.run(getattr(trainers, name), folder / name, mixin=True)
    rank, found["world_size"] = one.trainer.args.process_index, one.trainer.args.world_size
    found[name] = [[stage.step, stage.depth] for stage in one.callback.ledger.stages]
    weights |= {f"{name} {key}": value.contiguous() for key, value in one.weights.items()}
    dist.barrier()
save_file(weights, folder / f"end-{rank}.safetensors")
(folder / f"end-{rank}.json").write_text(json.dumps(found))
one.trainer.accelerator.end_training()
