"""What each rank does to test the policies of other papers: trains with each of them, and writes what froze."""

import argparse
from pathlib import Path

import torch
from quick_policies import QUICK
from ranks import FSDP, shard_on_the_cpu, tiny_bert, whole_weights, write_end
from training import Rows, arguments

from smartfrz_hf import SmartFRZTrainer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--world_size", type=int, default=2)
    parser.add_argument("--policies", nargs="+", default=list(QUICK))
    parser.add_argument("--fsdp", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, weights = {"world_size": 0}, {}
    for name in options.policies:
        torch.manual_seed(0)
        model = tiny_bert()
        args = arguments(
            options.folder,
            per_device_train_batch_size=8 // options.world_size,
            logging_steps=1,
            ddp_timeout=20,
            ddp_find_unused_parameters=False,
            **(FSDP if options.fsdp else {}),
        )
        if options.fsdp:
            shard_on_the_cpu()
        trainer = SmartFRZTrainer(
            model,
            args,
            train_dataset=Rows(48),
            smartfrz={"first_decision": 3, "decide_every": 2, "activation_cache": False},
            policy=QUICK[name](),
        )
        trainer.train()
        found["world_size"] = args.world_size
        found[name] = [[stage.step, stage.depth] for stage in trainer.ledger.stages]
        weights |= {f"{name}.{key}": value for key, value in whole_weights(model).items()}
    write_end(options.folder, args.process_index, weights, **found)


if __name__ == "__main__":
    main()
