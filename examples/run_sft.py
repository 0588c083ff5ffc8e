"""Fine-tune a causal language model with TRL on texts or on prompts and completions, and freeze its blocks as they converge."""

from dataclasses import dataclass, field

import trl
from common import (
    CommonDataArguments,
    evaluate_split,
    load_splits,
    publish,
    start,
    train,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from smartfrz_hf import SmartFRZMixin


class FreezingSFTTrainer(SmartFRZMixin, trl.SFTTrainer):
    """TRL's trainer, which freezes."""


@dataclass
class ModelArguments:
    """Arguments for the model. `--trust_remote_code` is one of TRL's."""

    model_name_or_path: str = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "Pretrained model on the Hub or in a folder."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloaded and prepared files."})
    token: str | None = field(default=None, metadata={"help": "Token for private repositories."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA on all linear layers; 0 trains all weights."})


def main(args: list[str] | None = None) -> None:
    """
    Run the script.

    Args:
        args (`list[str]`, *optional*): the command line; that of the process when it is not given.
    """
    model_args, data_args, training_args, config, checkpoint = start(
        ModelArguments, CommonDataArguments, __doc__, args, trl.SFTConfig
    )

    # Columns `text`, or `prompt` and `completion`, or `messages`: TRL knows them by their names.
    splits = load_splits(data_args, model_args, training_args)
    peft_config = None
    if model_args.lora_r:
        from peft import LoraConfig

        peft_config = LoraConfig(r=model_args.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
    hub = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": getattr(training_args, "trust_remote_code", False),  # new in TRL 1.0
    }
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **hub)
    trainer = FreezingSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **hub),
        args=training_args,
        smartfrz=config,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    if training_args.do_train:
        train(trainer, checkpoint)
    if training_args.do_eval:
        evaluate_split(trainer, trainer.eval_dataset)
    publish(trainer, model_name=model_args.model_name_or_path, dataset_name=data_args.dataset_name)


if __name__ == "__main__":
    main()
