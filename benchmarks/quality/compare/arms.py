"""How each method trains: what it does to the model, and the callbacks that it adds to the Trainer."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from benchmarks.quality.compare.plan import Arm
from benchmarks.tasks import Task
from smartfrz_hf import SmartFRZCallback, SmartFRZConfig, find_blocks
from smartfrz_hf.cost.ledger import Ledger
from smartfrz_hf.policies import PEERS

LEARNING_RATE = "learning_rate_factor"  # an option of any method: times the task's learning rate


@dataclass
class Method:
    """
    A method that is ready for a run.

    Attributes:
        callbacks (`list[TrainerCallback]`): for the Trainer.
        freezing ([`SmartFRZCallback`], *optional*): the one among them that counts the FLOPs itself.
    """

    callbacks: list[TrainerCallback] = field(default_factory=list)
    freezing: SmartFRZCallback | None = None


def missing_package(arm: Arm) -> str | None:
    """What has to be installed for an arm, if it is not there."""
    return "grades" if arm.method == "grades" and find_spec("grades") is None else None


def make_method(arm: Arm, task: Task, ratio: float | None = None) -> Method:
    """
    Get a method ready.

    Args:
        arm ([`Arm`]): which.
        task ([`Task`]): its model may be wrapped.
        ratio (`float`, *optional*): for the policy `random`.
    """
    options = {name: value for name, value in arm.options.items() if name != LEARNING_RATE}
    if arm.method in ("freezing", "lora+freezing"):
        if arm.method == "lora+freezing":
            add_lora(task, **options)
        if ratio is not None:
            options["ratio"] = ratio
        policy = PEERS[arm.policy](**options) if arm.policy else None
        callback = SmartFRZCallback(SmartFRZConfig(**arm.config), policy=policy)
        return Method([callback], callback)
    makers: dict[str, Callable[..., Method]] = {"full": Method, "lora": add_lora, "lisa": lisa, "grades": grades}
    return Method() if arm.method == "full" else makers[arm.method](task, **options)


def add_lora(task: Task, r: int, alpha: int | None = None) -> Method:
    """LoRA on all linear layers; the head trains as a whole. `alpha` is twice `r` unless it is given."""
    from peft import LoraConfig, TaskType, get_peft_model  # takes a second, which most runs need not spend

    kinds = {"labels": TaskType.SEQ_CLS, "tags": TaskType.TOKEN_CLS, "language": TaskType.CAUSAL_LM}
    kind: TaskType | None = kinds[task.objective]
    head = None
    if task.model.main_input_name == "pixel_values":
        kind, head = None, ["classifier"]
    config = LoraConfig(
        task_type=kind, r=r, lora_alpha=alpha or 2 * r, target_modules="all-linear", modules_to_save=head
    )
    task.model = get_peft_model(task.model, config)  # type: ignore[arg-type, assignment]
    return Method()


def lisa(task: Task, layers: int, interval: int) -> Method:
    """LISA (Pan et al., 2024, arXiv 2403.17919)."""
    return Method([LISACallback(task.model, layers, interval)])


def grades(task: Task, **options: Any) -> Method:
    """GradES as its authors publish it: the package `grades`."""
    from grades import GradEarlyStoppingCallback, GradEarlyStoppingConfig

    return Method([GradEarlyStoppingCallback(GradEarlyStoppingConfig(**options))])


class LISACallback(TrainerCallback):
    """
    Trains the stem, the head and a few random blocks, others after each interval (LISA, Algorithm 1).

    Optimizer state of blocks that rest is dropped, as the paper's memory figures suppose.

    Args:
        model ([`~transformers.PreTrainedModel`]): what is trained.
        layers (`int`): blocks that train at a time.
        interval (`int`): steps between two draws.
        seed (`int`, *optional*, defaults to 0): of the draws.
    """

    def __init__(self, model: PreTrainedModel, layers: int, interval: int, seed: int = 0):
        self.blocks = find_blocks(model).blocks
        self.layers, self.interval, self.random = layers, interval, random.Random(seed)

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step % self.interval:
            return
        chosen = set(self.random.sample(range(len(self.blocks)), min(self.layers, len(self.blocks))))
        for number, block in enumerate(self.blocks):
            for parameter in block.parameters():
                parameter.requires_grad_(number in chosen)
                if number not in chosen:
                    parameter.grad = None
                    getattr(optimizer, "optimizer", optimizer).state.pop(parameter, None)


def frozen_share(ledger: Ledger) -> float:
    """Mean fraction of the units that was frozen over a run."""
    spans = [end - begin for spans in ledger.frozen_spans.values() for begin, end in spans]
    return sum(spans) / (len(ledger.units) * ledger.max_steps)
