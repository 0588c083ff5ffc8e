"""Each rank trains twice with one Trainer: a front freezes in the first run only."""

import sys
from pathlib import Path

import torch
from architectures import TEXT
from safetensors.torch import save_file
from training import Rows, arguments, predictor_that_says
from transformers import BertConfig, BertForSequenceClassification

from smartfrz_hf import SmartFRZConfig, SmartFRZTrainer
from smartfrz_hf.policies import Decision

torch.set_num_threads(1)
torch.manual_seed(0)
args = arguments(sys.argv[1], max_steps=4, ddp_timeout=60, ddp_find_unused_parameters=False)
assert args.world_size == 2, f"{args.world_size} processes, not 2"
trainer = SmartFRZTrainer(
    BertForSequenceClassification(BertConfig(**TEXT | {"num_hidden_layers": 2})),
    args,
    train_dataset=Rows(48),
    smartfrz=SmartFRZConfig(first_decision=1, decide_every=1),
    predictor=predictor_that_says(0.5),
)
for depth in (2, 0):
    trainer.smartfrz.policy.decide = lambda seen, depth=depth: Decision(depth if seen.step else 0, "told")
    trainer.train()
    assert trainer.ledger.depth == depth
weights = {key: value.contiguous() for key, value in trainer.model.state_dict().items()}
save_file(weights, Path(sys.argv[1]) / f"end-{args.process_index}.safetensors")
