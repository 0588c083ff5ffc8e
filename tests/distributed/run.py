"""What each rank of a distributed test does: trains as the command line says and writes what it saw, one file a rank."""

import argparse
import copy
import json
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from ranks import FSDP, shard_on_the_cpu, tiny_bert, whole_weights, write_end
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from training import Rows, arguments, predictor_that_says
from transformers import Trainer, TrainerCallback

from smartfrz_hf import SmartFRZCallback, SmartFRZConfig, SmartFRZTrainer, find_blocks
from smartfrz_hf.policies import Decision
from smartfrz_hf.signals.weights import WeightSampler

STAGES = {5: 2, 9: 3, 13: 5}


class Counting:
    """A communication hook that averages as DDP does, and adds up the bytes of each step."""

    def __init__(self):
        self.bytes = 0

    def average(self, state, bucket):
        buffer = bucket.buffer()
        self.bytes += buffer.numel() * buffer.element_size()
        future = dist.all_reduce(buffer.div_(dist.get_world_size()), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])


class Sharding:
    """Counts what FSDP2 sends: the bytes of reduce-scatters, and how often weights are gathered in the backward pass."""

    def __init__(self):
        self.bytes = self.gathers = 0
        new = hasattr(dist, "reduce_scatter_single")  # the names that torch has given them since 2.7
        reduce, gather = (
            ("reduce_scatter_single", "all_gather_single")
            if new
            else ("reduce_scatter_tensor", "all_gather_into_tensor")
        )
        self.reduce_scatter, self.all_gather = getattr(dist, reduce), getattr(dist, gather)
        setattr(dist, reduce, self.reduce)
        setattr(dist, gather, self.gather)

    def reduce(self, *args, **kwargs):
        tensor = kwargs["input"] if "input" in kwargs else args[1]
        self.bytes += tensor.numel() * tensor.element_size()
        return self.reduce_scatter(*args, **kwargs)

    def gather(self, *args, **kwargs):
        self.gathers += torch._C._current_graph_task_id() >= 0
        return self.all_gather(*args, **kwargs)


def bytes_sent(parameter):
    """Of its gradient. FSDP2 makes up the rows to a multiple of the ranks."""
    shape = list(parameter.shape)
    if isinstance(parameter, DTensor):
        shape[0] = -(-shape[0] // dist.get_world_size()) * dist.get_world_size()
    return 4 * torch.Size(shape).numel()


class Watching(TrainerCallback):
    """Puts the hook on DDP, and notes what each step sent, and the bytes of the gradients that there were."""

    def __init__(self, sharded, copied):
        self.hook = Sharding() if sharded else Counting()
        self.copied, self.callback = copied, None
        self.trainer, self.sent, self.active, self.gathers, self.states = None, [], [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert isinstance(model, FSDPModule) == isinstance(self.hook, Sharding)
        if isinstance(self.trainer.model_wrapped, DistributedDataParallel):
            self.trainer.model_wrapped.register_comm_hook(None, self.hook.average)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.sent.append(self.hook.bytes)
        self.active.append(sum(bytes_sent(p) for p in model.parameters() if p.grad is not None))
        self.hook.bytes = 0
        if isinstance(self.hook, Sharding):
            self.gathers.append(self.hook.gathers)
            self.hook.gathers = 0

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        names = {p: name for name, p in model.named_parameters()}
        self.states.append(sorted(names[p] for p in optimizer.state))
        if isinstance(self.hook, Sharding):
            self.copied.load_state_dict(whole_weights(model))
            units = find_blocks(self.copied).units
            every = range(len(units))
            sampler = self.callback.run.observer.sampler
            samples = WeightSampler(units, sampler.weights_per_unit, lora_products=True).read(every)
            assert torch.equal(sampler.read(every), samples), "shards give other samples"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--world_size", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--unlike", action="store_true", help="ranks other than 0 would freeze sooner")
    parser.add_argument("--alone", choices=["find", "do not find"], help="the callback in a plain Trainer")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--fsdp", choices=["launcher", "arguments"], help="FSDP2, and who asks for it")
    parser.add_argument("--arguments", type=json.loads, default={}, help="of training, more of them")
    parser.add_argument("--stages", type=json.loads, default=STAGES, help="which depth from which step on")
    parser.add_argument("--apart", type=json.loads, default={}, help="which units freeze apart from which step on")
    parser.add_argument("--front", action="store_true", help="look at the front probe, too")
    parser.add_argument("--lora", action="store_true", help="train LoRA")
    parser.add_argument("--pilot", type=float, default=0.0, help="fraction of the run that is the pilot")
    parser.add_argument("--dies_at", type=int, help="rank 1 leaves before the freezing stage of this step")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tiny_bert()
    if options.lora:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], r=4))
    args = arguments(
        options.folder,
        max_steps=options.steps,
        per_device_train_batch_size=8 // options.world_size,
        gradient_accumulation_steps=options.accumulation,
        logging_steps=1,
        ddp_timeout=20,
        average_tokens_across_devices=False,
        ddp_find_unused_parameters={"find": True, None: False}.get(options.alone, False),
        dataloader_num_workers=0,
        **{"save_strategy": "steps", "save_steps": 4}
        | (FSDP if options.fsdp == "arguments" else {})
        | options.arguments,
    )
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    if options.fsdp is not None:
        shard_on_the_cpu()
    assert args.world_size == options.world_size, f"{args.world_size} processes, not {options.world_size}"
    rank = args.process_index
    order = "independent" if options.apart else "front"
    config = SmartFRZConfig(order=order, first_decision=1, decide_every=1, record_every=1)
    predictor = predictor_that_says(0.9, front_probe=options.front)
    watching = Watching(options.fsdp, copy.deepcopy(model))
    if options.alone:
        callback = SmartFRZCallback(config, predictor)
        trainer = Trainer(model, args, train_dataset=Rows(48), eval_dataset=Rows(8), callbacks=[callback, watching])
    else:
        trainer = SmartFRZTrainer(
            model,
            args,
            train_dataset=Rows(48),
            eval_dataset=Rows(8),
            callbacks=[watching],
            smartfrz=config,
            predictor=predictor,
        )
        callback = trainer.smartfrz
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()},
        options.folder / f"start-{rank}.safetensors",
    )
    watching.trainer, watching.callback = trainer, callback
    stages = {int(step): depth for step, depth in options.stages.items()}

    changes, pilots = {}, []

    def decide(seen):
        if seen.probe is not None and seen.probe.changes is not None:
            changes[seen.step] = seen.probe.changes.tolist()
        if seen.pilot is not None:
            pilots.append({key: torch.as_tensor(value).tolist() for key, value in vars(seen.pilot).items()})
        if options.dies_at == seen.step and rank == 1:
            raise SystemExit(3)
        now = seen.step + (2 if options.unlike and rank else 0)
        depth = max((step, depth) for step, depth in {0: 0, **stages}.items() if step <= now)[1]
        apart = {unit for step, units in options.apart.items() if int(step) <= now for unit in units}
        return Decision(depth, "told", apart=apart)

    callback.policy.decide, callback.policy.pilot = decide, options.pilot
    callback.policy.min_probe_examples = 4
    trainer.train(resume_from_checkpoint=str(options.resume) if options.resume else None)
    weights = whole_weights(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    save_file({"history": callback.run.observer.history.snapshots()}, options.folder / f"history-{rank}.safetensors")
    write_end(
        options.folder,
        rank,
        weights,
        world_size=args.world_size,
        stages=[[stage.step, stage.depth] for stage in callback.ledger.stages],
        apart=[[stage.step, stage.depth, len(stage.apart)] for stage in callback.ledger.stages],
        losses=[log["loss"] for log in trainer.state.log_history if "loss" in log],
        sent=watching.sent,
        active=watching.active,
        gathers=watching.gathers,
        states=watching.states,
        changes=changes,
        pilots=pilots,
        spent=callback.ledger.to_dict()["spent"],
    )
    # Left to the interpreter's exit, threads of gloo may still run, and abort the process.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
