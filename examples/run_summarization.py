"""Fine-tune an encoder-decoder to summarize, or train one from scratch, and freeze its blocks as they converge."""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from common import (
    CommonDataArguments,
    CommonModelArguments,
    check_columns,
    evaluate_split,
    load_metric,
    load_splits,
    new_config,
    publish,
    start,
    train,
)
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from smartfrz_hf import SmartFRZMixin


class FreezingSeq2SeqTrainer(SmartFRZMixin, Seq2SeqTrainer):
    """Evaluates by generating, and freezes."""


@dataclass
class ModelArguments(CommonModelArguments):
    """Arguments for the model."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Pretrained model on the Hub or in a folder. Leave it out to train from scratch."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Another tokenizer than the model's."})
    model_type: str = field(default="t5", metadata={"help": "Architecture to train from scratch."})
    config_overrides: str = field(
        default="", metadata={"help": "Changes to its configuration, such as 'd_model=128,num_layers=4'."}
    )


@dataclass
class DataTrainingArguments(CommonDataArguments):
    """Arguments for the data."""

    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    summary_column: str = field(default="summary", metadata={"help": "Column with the summary."})
    source_prefix: str = field(default="", metadata={"help": "Put in front of each text, such as 'summarize: '."})
    max_source_length: int = field(default=512, metadata={"help": "Most tokens of a text."})
    max_target_length: int = field(default=64, metadata={"help": "Most tokens of a summary."})


def rouge1(predictions: list[str], references: list[str]) -> dict[str, float]:
    """ROUGE-1 without stemming: F1 of the words that a summary shares with its reference."""

    def f1(prediction: str, reference: str) -> float:
        ours, theirs = Counter(prediction.lower().split()), Counter(reference.lower().split())
        return 2 * (ours & theirs).total() / max(1, ours.total() + theirs.total())

    return {"rouge1": float(np.mean([f1(*pair) for pair in zip(predictions, references, strict=True)]))}


def main(args: list[str] | None = None) -> None:
    """
    Run the script.

    Args:
        args (`list[str]`, *optional*): the command line; that of the process when it is not given.
    """
    model_args, data_args, training_args, config, checkpoint = start(
        ModelArguments, DataTrainingArguments, __doc__, args, Seq2SeqTrainingArguments
    )

    splits = load_splits(data_args, model_args, training_args)
    check_columns(splits, (data_args.text_column, data_args.summary_column))
    name = model_args.model_name_or_path
    if name is None and model_args.tokenizer_name is None:
        raise ValueError("No model: pass --model_name_or_path, or --tokenizer_name to train one from scratch.")
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, **model_args.hub_kwargs)
    if name is not None:
        model = AutoModelForSeq2SeqLM.from_pretrained(name, **model_args.hub_kwargs)
    else:
        tokens = {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
        tokens["eos_token_id"] = tokenizer.eos_token_id or tokenizer.sep_token_id
        options = {"vocab_size": len(tokenizer)} | tokens
        model = AutoModelForSeq2SeqLM.from_config(
            new_config(partial(AutoConfig.for_model, model_args.model_type), model_args.config_overrides, **options)
        )

    def encode(examples: dict[str, list]) -> dict[str, list]:
        texts = [data_args.source_prefix + text for text in examples[data_args.text_column]]
        inputs = tokenizer(texts, max_length=data_args.max_source_length, truncation=True)
        summaries = examples[data_args.summary_column]
        labels = tokenizer(text_target=summaries, max_length=data_args.max_target_length, truncation=True)
        names = ("input_ids", "attention_mask")
        return {key: inputs[key] for key in names} | {"labels": labels["input_ids"]}

    with training_args.main_process_first(desc="tokenization"):
        for split, dataset in splits.items():
            options = {"remove_columns": dataset.column_names, "desc": f"Tokenizing {split}"}
            splits[split] = dataset.map(encode, batched=True, **options)

    metric = load_metric("rouge", None, rouge1, model_args.cache_dir)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        made, wanted = (
            tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)
            for ids in (prediction.predictions, prediction.label_ids)
        )
        return {key: float(value) for key, value in metric(predictions=made, references=wanted).items()}

    training_args.generation_max_length = training_args.generation_max_length or data_args.max_target_length
    trainer = FreezingSeq2SeqTrainer(
        model=model,
        args=training_args,
        smartfrz=config,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        compute_metrics=compute_metrics if training_args.predict_with_generate else None,
    )
    if training_args.do_train:
        train(trainer, checkpoint)
    if training_args.do_eval:
        evaluate_split(trainer, splits["validation"])
    publish(trainer, tasks="summarization", dataset=data_args.dataset_name)


if __name__ == "__main__":
    main()
