"""Each rank trains with a loop of its own: under FSDP2 with a checkpoint on the way, or within DDP's `join()`."""

import argparse
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from ranks import tiny_bert, whole_weights, write_end
from torch.utils.data import DataLoader
from training import Rows

from smartfrz_hf import Decision, FreezingRun, Policy, SmartFRZConfig
from smartfrz_hf.checkpoint import frozen_as_saved, load_state, save_state

STEPS = 12
SETTINGS = SmartFRZConfig(first_decision=1, decide_every=1, activation_cache=False)


class InStages(Policy):
    def decide(self, observation):
        return Decision(max(depth for step, depth in {0: 0, 4: 2, 7: 3}.items() if observation.step >= step), "told")


def sharding(kind):
    """Accelerate shards on accelerators only, and takes the CPU for one when it is told so."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        state_dict_type=kind,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--world_size", type=int)
    parser.add_argument("--state_dict_type")
    parser.add_argument("--save_at", type=int, default=0)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--join", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    accelerator = sharding(options.state_dict_type) if options.state_dict_type else Accelerator(cpu=True)
    assert accelerator.num_processes == options.world_size == 2
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(Rows(8 * STEPS), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    state, done = None, 0
    if options.resume:
        state = load_state(options.resume)
        done = state["step"]
        with frozen_as_saved(model, state, SETTINGS):
            accelerator.load_state(options.resume)
    with FreezingRun(model, optimizer, STEPS, SETTINGS, policy=InStages(), timeout=30) as run:
        if state is not None:
            run.load_state_dict(state)
        with model.join() if options.join else nullcontext():
            for number, batch in enumerate(loader):
                if number < done:
                    continue
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
                if options.join:
                    with pytest.raises(ValueError, match="within `join"):
                        run.step()
                    break
                run.step()
                if run.steps_done == options.save_at:
                    accelerator.save_state(options.folder / "saved")
                    if accelerator.is_main_process:
                        save_state(run.state_dict(), options.folder / "saved")
        weights = whole_weights(model)
        write_end(
            options.folder,
            accelerator.process_index,
            weights,
            world_size=accelerator.num_processes,
            stages=[[stage.step, stage.depth] for stage in run.ledger.stages],
        )
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
