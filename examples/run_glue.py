"""Fine-tune a model for text classification on GLUE or on your own files, and freeze its blocks as they converge."""

import logging
from dataclasses import dataclass, field

from common import (
    CommonDataArguments,
    CommonModelArguments,
    average_gradients_in_trainer,
    check_extensions,
    evaluate_split,
    first_samples,
    publish,
    require_split,
    start,
    train,
    write_predictions,
)
from text_classification import (
    EXTENSION_TO_BUILDER,
    TASK_TO_KEYS,
    check_labels,
    check_task,
    evaluation_splits,
    load_model,
    load_text_metric,
    load_texts,
    predictions_of,
    text_columns,
    tokenize,
)
from transformers import DataCollatorWithPadding, EvalPrediction, default_data_collator

from smartfrz_hf import SmartFRZTrainer

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments(CommonModelArguments):
    """Arguments for the model."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained model on the Hub or in a folder. Required."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Another configuration than the model's, on the Hub or in a folder."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Another tokenizer than the model's, on the Hub or in a folder."}
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is None:
            raise ValueError("No model: pass --model_name_or_path with a name on the Hub or a folder.")


@dataclass
class DataTrainingArguments(CommonDataArguments):
    """Arguments for the texts and labels. Files are parquet, csv, json or jsonl files with a column `label`."""

    task_name: str | None = field(
        default=None,
        metadata={
            "help": "GLUE task: " + ", ".join(TASK_TO_KEYS) + ". The data comes from the Hub (nyu-mll/glue), or from "
            "--train_file, --validation_file and --test_file; the task gives their columns and the metric."
        },
    )
    max_seq_length: int = field(
        default=128, metadata={"help": "Largest number of tokens per sample; longer samples are truncated."}
    )
    pad_to_max_length: bool = field(
        default=False,
        metadata={"help": "Pad every sample to --max_seq_length. Default: to the longest one in its batch."},
    )
    overwrite_cache: bool = field(
        default=False, metadata={"help": "Tokenize again even if the result of an earlier run is cached."}
    )

    def __post_init__(self) -> None:
        self.task_name = check_task(self.task_name)
        check_extensions(self.files, tuple(EXTENSION_TO_BUILDER))
        if self.dataset_name is not None and (self.files or self.task_name is not None):
            raise ValueError("--dataset_name cannot be combined with --task_name or with files; pass one of them.")
        if self.task_name is None and self.dataset_name is None and not self.files:
            raise ValueError(
                "No data: pass --task_name for a GLUE task, --dataset_name for another dataset on the Hub, or "
                "--train_file, --validation_file and --test_file for your own files."
            )


def main(args: list[str] | None = None) -> None:
    """
    Run the script.

    Args:
        args (`list[str]`, *optional*): the command line; that of the process when it is not given.
    """
    model_args, data_args, training_args, smartfrz_config, checkpoint = start(
        ModelArguments, DataTrainingArguments, __doc__, args
    )

    raw_datasets = load_texts(
        data_args.files,
        data_args.dataset_name,
        data_args.dataset_config_name if data_args.task_name is None else data_args.task_name,
        model_args.cache_dir,
        model_args.token,
    )
    eval_splits = evaluation_splits(raw_datasets, "validation") if training_args.do_eval else []
    test_splits = evaluation_splits(raw_datasets, "test") if training_args.do_predict else []
    splits = {}
    for action, names, count in (
        ("--do_train", ["train"] if training_args.do_train else [], data_args.max_train_samples),
        ("--do_eval", eval_splits, data_args.max_eval_samples),
        ("--do_predict", test_splits, data_args.max_predict_samples),
    ):
        for name in names:
            splits[name] = first_samples(require_split(raw_datasets, name, action), count)
    check_labels({name: dataset for name, dataset in splits.items() if name not in test_splits})

    has_training_data = "train" in raw_datasets
    reference = raw_datasets["train"] if has_training_data else next(iter(splits.values()))
    model, tokenizer, regression = load_model(
        model_args.model_name_or_path,
        reference,
        data_args.task_name,
        has_training_data,
        model_args.config_name,
        model_args.tokenizer_name,
        model_args.ignore_mismatched_sizes,
        **model_args.hub_kwargs,
    )
    average_gradients_in_trainer(model)
    columns = text_columns(reference, data_args.task_name)
    kind = "regression" if regression else f"{model.config.num_labels} classes"
    logger.info(f"Text in {', '.join(columns)}; {kind}.")
    with training_args.main_process_first(desc="tokenization"):
        splits = tokenize(
            splits,
            columns,
            tokenizer,
            model.config,
            regression,
            data_args.max_seq_length,
            data_args.pad_to_max_length,
            tuple(test_splits),
            not data_args.overwrite_cache,
        )

    metric = load_text_metric(data_args.task_name, regression, model_args.cache_dir)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return metric(predictions_of(prediction.predictions, regression), prediction.label_ids)

    if data_args.pad_to_max_length:
        data_collator = default_data_collator
    else:
        # Lengths that are multiples of 8 suit tensor cores.
        half = training_args.fp16 or training_args.bf16
        data_collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if half else None)

    trainer = SmartFRZTrainer(
        model=model,
        args=training_args,
        smartfrz=smartfrz_config,
        train_dataset=splits.get("train"),
        eval_dataset=splits[eval_splits[0]] if eval_splits else None,
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=data_collator,
    )

    if training_args.do_train:
        train(trainer, checkpoint)

    for name, prefix in zip(eval_splits, ("eval", "eval_mm"), strict=False):
        evaluate_split(trainer, splits[name], prefix)

    for name in test_splits:
        logits = trainer.predict(splits[name], metric_key_prefix="predict").predictions
        values = predictions_of(logits, regression)
        predictions = [f"{value:.3f}" if regression else model.config.id2label[int(value)] for value in values]
        task = data_args.task_name or "text"
        write_predictions(trainer, predictions, f"predict_results_{task}{name.removeprefix('test')}.txt")

    task_name = data_args.task_name
    publish(
        trainer,
        tasks="text-classification",
        language="en" if task_name else None,
        dataset_tags="glue" if task_name else data_args.dataset_name,
        dataset_args=task_name,
        dataset=f"GLUE {task_name.upper()}" if task_name else data_args.dataset_name,
    )


if __name__ == "__main__":
    main()
