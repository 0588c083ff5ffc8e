"""Trains in a folder, from its last whole checkpoint if there is one; kills itself at a moment named on the command line."""

import json
import os
import signal
import sys
from pathlib import Path

from resuming import STAGES, undecided_predictor
from safetensors.torch import save_file
from training import Rows, arguments, build
from transformers import TrainerCallback

from smartfrz_hf import SmartFRZConfig, SmartFRZTrainer


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


class Noting(TrainerCallback):
    resumed_at = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.resumed_at = state.global_step


class DyingTrainer(SmartFRZTrainer):
    writing = -1

    def _save_rng_state(self, output_dir):
        if self.state.global_step == self.writing:
            die()
        super()._save_rng_state(output_dir)


folder, moment = Path(sys.argv[1]), sys.argv[2:]
noting = Noting()
trainer = DyingTrainer(
    model=build("bert"),
    args=arguments(folder, max_steps=20, save_strategy="steps", save_steps=2),
    train_dataset=Rows(40),
    callbacks=[noting],
    smartfrz=SmartFRZConfig(record_every=1, freeze_threshold=0.5, **STAGES),
    predictor=undecided_predictor(),
)
if moment[:1] == ["step"]:
    trainer.add_callback(DieAt(int(moment[1])))
elif moment:
    trainer.writing = int(moment[1])
trainer.train(resume_from_checkpoint=True)
save_file({key: value.contiguous() for key, value in trainer.model.state_dict().items()}, folder / "end.safetensors")
stages = [[stage.step, stage.depth] for stage in trainer.ledger.stages]
(folder / "end.json").write_text(json.dumps({"stages": stages, "resumed_at": noting.resumed_at}))
