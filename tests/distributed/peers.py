"""What each rank does to test the policies of other papers: trains with each of them, and writes what froze."""

import argparse
import json
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from architectures import TEXT
from run import FSDP, whole
from safetensors.torch import save_file
from training import Rows, arguments
from transformers import BertConfig, BertForSequenceClassification

from smartfrz_hf import SmartFRZTrainer
from smartfrz_hf.policies import (
    AutoFreezePolicy,
    EgeriaPolicy,
    FreezeOutPolicy,
    GradESPolicy,
    RandomPolicy,
    SelfCKAPolicy,
)

QUICK = {
    "autofreeze": lambda: AutoFreezePolicy(percentile=80),
    "egeria": lambda: EgeriaPolicy(window=2, tolerance=0.9, renew_every=3),
    "freezeout": lambda: FreezeOutPolicy(start=0.3, power=1),
    "grades": lambda: GradESPolicy(tau=1.0, alpha=0.3),
    "random": lambda: RandomPolicy(0.6, seed=2),
    "self_cka": lambda: SelfCKAPolicy(0.01),
}


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
        nothing = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForSequenceClassification(BertConfig(**TEXT | nothing))
        model.accepts_loss_kwargs = False  # its head ignores `num_items_in_batch` (transformers#47688)
        args = arguments(
            options.folder,
            per_device_train_batch_size=8 // options.world_size,
            logging_steps=1,
            ddp_timeout=20,
            ddp_find_unused_parameters=False,
            **(FSDP if options.fsdp else {}),
        )
        if options.fsdp:  # Accelerate shards on accelerators only, and takes the CPU for one when it is told so
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
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
        weights |= {f"{name}.{key}": whole(value) for key, value in model.state_dict().items()}
    save_file(weights, options.folder / f"end-{args.process_index}.safetensors")
    (options.folder / f"end-{args.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
