"""Fine-tune a causal language model on plain text, and freeze its blocks as they converge."""

import math
from dataclasses import dataclass, field
from itertools import chain

from common import (
    CommonDataArguments,
    CommonModelArguments,
    check_columns,
    evaluate_split,
    load_splits,
    publish,
    start,
    train,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

from smartfrz_hf import SmartFRZTrainer


@dataclass
class ModelArguments(CommonModelArguments):
    """Arguments for the model."""

    model_name_or_path: str = field(
        default="HuggingFaceTB/SmolLM2-135M", metadata={"help": "Pretrained model on the Hub or in a folder."}
    )


@dataclass
class DataTrainingArguments(CommonDataArguments):
    """Arguments for the data."""

    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    block_size: int = field(default=512, metadata={"help": "Tokens in a row: all texts are joined, and cut."})


def main(args: list[str] | None = None) -> None:
    """
    Run the script.

    Args:
        args (`list[str]`, *optional*): the command line; that of the process when it is not given.
    """
    model_args, data_args, training_args, config, checkpoint = start(
        ModelArguments, DataTrainingArguments, __doc__, args
    )

    splits = load_splits(data_args, model_args, training_args)
    check_columns(splits, (data_args.text_column,))
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **model_args.hub_kwargs)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **model_args.hub_kwargs)
    size = min(data_args.block_size, tokenizer.model_max_length)

    def cut(examples: dict[str, list]) -> dict[str, list]:
        texts = [f"{text}{tokenizer.eos_token or ''}" for text in examples[data_args.text_column]]
        tokens = list(chain.from_iterable(tokenizer(texts, add_special_tokens=False)["input_ids"]))
        rows = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
        return {"input_ids": rows, "labels": rows}

    with training_args.main_process_first(desc="tokenization"):
        for name, dataset in splits.items():
            options = {"remove_columns": dataset.column_names, "desc": f"Tokenizing {name}"}
            splits[name] = dataset.map(cut, batched=True, **options)

    trainer = SmartFRZTrainer(
        model=model,
        args=training_args,
        smartfrz=config,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    if training_args.do_train:
        train(trainer, checkpoint)
    if training_args.do_eval:
        metrics = evaluate_split(trainer, splits["validation"])
        perplexity = {"eval_perplexity": math.exp(metrics["eval_loss"])}
        trainer.log_metrics("eval", perplexity)
        trainer.save_metrics("eval", metrics | perplexity)
    publish(trainer, tasks="text-generation", dataset=data_args.dataset_name)


if __name__ == "__main__":
    main()
