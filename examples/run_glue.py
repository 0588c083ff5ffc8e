"""Fine-tune a model for text classification, on GLUE or on your own files, freezing its blocks as they settle."""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from common import (
    HubArguments,
    agree_on_labels,
    check_extensions,
    encode_labels,
    evaluate_split,
    find_checkpoint,
    first_samples,
    label_names,
    load_metric,
    parse_arguments,
    publish,
    require_split,
    set_up_logging,
    train,
    write_predictions,
)
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from smartfrz_hf import SmartFRZTrainer

logger = logging.getLogger(__name__)

TASK_TO_KEYS = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
EXTENSION_TO_BUILDER = {"csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}


@dataclass
class ModelArguments(HubArguments):
    """Arguments that say which model to fine-tune."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the pretrained model. Required."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the configuration, if not that of the model."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the tokenizer, if not that of the model."}
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is None:
            raise ValueError("No model: pass --model_name_or_path with a Hub id or a folder.")


@dataclass
class DataTrainingArguments:
    """Arguments that say which texts and labels to use."""

    task_name: str | None = field(
        default=None,
        metadata={
            "help": "GLUE task: " + ", ".join(TASK_TO_KEYS) + ". Its data comes from the Hub (nyu-mll/glue), or from "
            "the files below if they are given; then it names the columns and the metric."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id of another data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of --dataset_name."})
    train_file: str | None = field(
        default=None, metadata={"help": "Training data: a parquet, csv, json or jsonl file with a column `label`."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Evaluation data, a file like --train_file."})
    test_file: str | None = field(
        default=None, metadata={"help": "Data to predict, a file like --train_file; it needs no labels."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Most tokens per sample; longer ones are truncated."})
    pad_to_max_length: bool = field(
        default=False,
        metadata={"help": "Pad every sample to --max_seq_length. Default: to the longest one in its batch."},
    )
    overwrite_cache: bool = field(
        default=False, metadata={"help": "Tokenize again even where the result of an earlier run is cached."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many samples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate the first so many samples only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict the first so many samples only."})

    def __post_init__(self) -> None:
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in TASK_TO_KEYS:
                raise ValueError(
                    f"--task_name is {self.task_name!r}; it must be one of {', '.join(map(repr, TASK_TO_KEYS))}."
                )
        check_extensions({f"{split}_file": path for split, path in self.files.items()}, tuple(EXTENSION_TO_BUILDER))
        if self.dataset_name is not None and (self.files or self.task_name is not None):
            raise ValueError("--dataset_name cannot be combined with --task_name or with files; pass one of them.")
        if self.task_name is None and self.dataset_name is None and not self.files:
            raise ValueError(
                "No data: pass --task_name for a GLUE task, --dataset_name for another data set of the Hub, or "
                "--train_file, --validation_file and --test_file for your own."
            )

    @property
    def files(self) -> dict[str, str]:
        """The given files by split."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in files.items() if path is not None}


def load_data(data_args: DataTrainingArguments, model_args: ModelArguments) -> DatasetDict:
    """The splits, from files where they are given, else from the Hub."""
    if data_args.files:
        return DatasetDict(
            {
                split: load_dataset(
                    EXTENSION_TO_BUILDER[Path(path).suffix.lstrip(".")],
                    data_files=path,
                    split="train",
                    cache_dir=model_args.cache_dir,
                )
                for split, path in data_args.files.items()
            }
        )
    if data_args.dataset_name is None:
        name, config_name = "nyu-mll/glue", data_args.task_name
    else:
        name, config_name = data_args.dataset_name, data_args.dataset_config_name
    return load_dataset(name, config_name, cache_dir=model_args.cache_dir, token=model_args.token)


def text_columns(dataset: Dataset, task_name: str | None) -> tuple[str, ...]:
    """
    The one or two columns that hold the text: those of the task, else the first of type string.

    Raises:
        ValueError: they are not there.
    """
    strings = [
        name
        for name, feature in dataset.features.items()
        if name != "label" and isinstance(feature, Value) and feature.dtype in ("string", "large_string")
    ]
    if task_name is not None:
        columns = TASK_TO_KEYS[task_name]
    elif {"sentence1", "sentence2"} <= set(strings):
        columns = ("sentence1", "sentence2")
    else:
        columns = tuple(strings[:2])
    missing = [name for name in columns if name not in dataset.column_names]
    if missing or not columns:
        raise ValueError(
            f"The data lacks the text column {', '.join(map(repr, missing or ['sentence1']))}; it has "
            f"{', '.join(map(repr, dataset.column_names))}. Rename yours, or pass another --task_name or none."
        )
    return columns


def glue_metrics(task_name: str | None, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The metrics of a GLUE task by scikit-learn and SciPy, under the names of `evaluate`; accuracy without a task."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if task_name == "stsb":
        pearson, spearman = pearsonr(predictions, references), spearmanr(predictions, references)
        return {"pearson": float(pearson.statistic), "spearmanr": float(spearman.statistic)}
    if task_name == "cola":
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
    metrics = {"accuracy": float(accuracy_score(references, predictions))}
    if task_name in ("mrpc", "qqp"):
        metrics["f1"] = float(f1_score(references, predictions))
    return metrics


def squared_error(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The mean squared error, for a regression that is not of GLUE."""
    return {"mse": float(np.mean((predictions - references) ** 2))}


def add_padding_token(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Let decoders such as Llama, which know no padding, pad with their end-of-text token."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def main(args: list[str] | None = None) -> None:
    """
    Run the script.

    Args:
        args (`list[str]`, *optional*): the command line; that of the process when it is not given.
    """
    model_args, data_args, training_args, smartfrz_config = parse_arguments(
        ModelArguments, DataTrainingArguments, __doc__, args
    )
    set_up_logging(training_args)
    checkpoint = find_checkpoint(training_args)
    set_seed(training_args.seed)

    raw_datasets = load_data(data_args, model_args)
    # MNLI has two sets to evaluate and two to predict; the first is the one that counts.
    suffixes = ["_matched", "_mismatched"] if "validation_matched" in raw_datasets else [""]
    eval_splits = [f"validation{suffix}" for suffix in suffixes]
    test_splits = [f"test{suffix}" for suffix in suffixes]
    splits = {}
    if training_args.do_train:
        splits["train"] = first_samples(
            require_split(raw_datasets, "train", "--do_train"), data_args.max_train_samples
        )
    for name in eval_splits if training_args.do_eval else []:
        splits[name] = first_samples(require_split(raw_datasets, name, "--do_eval"), data_args.max_eval_samples)
    for name in test_splits if training_args.do_predict else []:
        splits[name] = first_samples(require_split(raw_datasets, name, "--do_predict"), data_args.max_predict_samples)

    config = AutoConfig.from_pretrained(
        model_args.config_name or model_args.model_name_or_path, **model_args.hub_kwargs
    )
    reference = raw_datasets["train"] if "train" in raw_datasets else next(iter(splits.values()))
    label_feature = reference.features.get("label")
    for name, dataset in splits.items():
        if name not in test_splits and "label" not in dataset.column_names:
            columns = ", ".join(map(repr, dataset.column_names))
            raise ValueError(f"The split {name!r} lacks the column 'label'; it has {columns}.")
    if data_args.task_name is not None:
        is_regression = data_args.task_name == "stsb"
    elif label_feature is not None:
        is_regression = label_feature.dtype.startswith("float")
    else:
        is_regression = config.num_labels == 1
    if is_regression:
        config.num_labels = 1
    elif "train" in raw_datasets:
        agree_on_labels(config, label_names(raw_datasets["train"], "label"))

    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path, **model_args.hub_kwargs
    )
    add_padding_token(tokenizer, config)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_args.model_name_or_path,
        config=config,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        **model_args.hub_kwargs,
    )
    # Most classification heads accept `num_items_in_batch` and ignore it, so the Trainer believes that the loss is
    # already averaged over accumulation steps and ranks, and the gradient comes out that many times too large
    # (huggingface/transformers#47688). This makes the Trainer do the averaging.
    model.accepts_loss_kwargs = False

    columns = text_columns(reference, data_args.task_name)
    logger.info(f"Text in {', '.join(columns)}; {'regression' if is_regression else f'{config.num_labels} classes'}.")
    max_length = min(data_args.max_seq_length, tokenizer.model_max_length)

    def preprocess(examples: dict[str, list], label_feature: Value | ClassLabel | None) -> dict[str, list]:
        features = tokenizer(
            *(examples[column] for column in columns),
            padding="max_length" if data_args.pad_to_max_length else False,
            max_length=max_length,
            truncation=True,
        )
        if label_feature is not None and is_regression:
            features["labels"] = [float(label) for label in examples["label"]]
        elif label_feature is not None:
            features["labels"] = encode_labels(examples["label"], label_feature, config.label2id)
        return features

    with training_args.main_process_first(desc="tokenization"):
        for name, dataset in splits.items():
            splits[name] = dataset.map(
                preprocess,
                batched=True,
                # The test sets of GLUE hide their labels behind -1.
                fn_kwargs={"label_feature": None if name in test_splits else dataset.features["label"]},
                remove_columns=dataset.column_names,
                load_from_cache_file=not data_args.overwrite_cache,
                desc=f"Tokenizing {name}",
            )

    def predicted(logits: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
        # Encoder-decoders return hidden states after the logits.
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits[:, 0] if is_regression else np.argmax(logits, axis=1)

    if data_args.task_name is not None:
        fallback = partial(glue_metrics, data_args.task_name)
        metric = load_metric("glue", data_args.task_name, fallback, model_args.cache_dir)
    elif is_regression:
        metric = load_metric("mse", None, squared_error, model_args.cache_dir)
    else:
        metric = load_metric("accuracy", None, partial(glue_metrics, None), model_args.cache_dir)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        metrics = metric(predictions=predicted(prediction.predictions), references=prediction.label_ids)
        if len(metrics) > 1:
            metrics["combined_score"] = float(np.mean(list(metrics.values())))
        return metrics

    if data_args.pad_to_max_length:
        data_collator = default_data_collator
    else:
        # Tensor cores want lengths that are multiples of 8.
        half = training_args.fp16 or training_args.bf16
        data_collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if half else None)

    trainer = SmartFRZTrainer(
        model=model,
        args=training_args,
        smartfrz=smartfrz_config,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get(eval_splits[0]),
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=data_collator,
    )

    if training_args.do_train:
        train(trainer, checkpoint)

    for name, prefix in zip(eval_splits, ("eval", "eval_mm"), strict=False):
        if training_args.do_eval:
            evaluate_split(trainer, splits[name], prefix)

    for name in test_splits if training_args.do_predict else []:
        values = predicted(trainer.predict(splits[name], metric_key_prefix="predict").predictions)
        predictions = [f"{value:.3f}" if is_regression else config.id2label[int(value)] for value in values]
        task = data_args.task_name or "text"
        write_predictions(trainer, predictions, f"predict_results_{task}{name.removeprefix('test')}.txt")

    publish(
        trainer,
        tasks="text-classification",
        language="en" if data_args.task_name else None,
        dataset_tags="glue" if data_args.task_name else data_args.dataset_name,
        dataset_args=data_args.task_name,
        dataset=f"GLUE {data_args.task_name.upper()}" if data_args.task_name else data_args.dataset_name,
    )


if __name__ == "__main__":
    main()
