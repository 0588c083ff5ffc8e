"""What `run_glue.py` and `run_glue_no_trainer.py` share: texts, labels, the model and the metrics."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from common import agree_on_labels, encode_labels, label_names, load_files, load_metric
from datasets import Dataset, DatasetDict, Value, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

logger = logging.getLogger("text_classification")

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


def check_task(task_name: str | None) -> str | None:
    """
    The name of a GLUE task in lower case.

    Raises:
        ValueError: there is no such task.
    """
    if task_name is not None and task_name.lower() not in TASK_TO_KEYS:
        raise ValueError(f"--task_name is {task_name!r}; it must be one of {', '.join(map(repr, TASK_TO_KEYS))}.")
    return None if task_name is None else task_name.lower()


def load_texts(
    files: dict[str, str],
    dataset_name: str | None,
    config_name: str | None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> DatasetDict:
    """
    Load the splits from files where they are given, otherwise from the Hub.

    Args:
        files (`dict[str, str]`): path by split.
        dataset_name (`str`, *optional*): dataset on the Hub; GLUE when it is `None`.
        config_name (`str`, *optional*): configuration of the dataset; for GLUE, the task.
        cache_dir (`str`, *optional*): folder for downloaded and prepared data.
        token (`str`, *optional*): token for private repositories.
    """
    if files:
        return load_files(files, EXTENSION_TO_BUILDER, cache_dir)
    return load_dataset(dataset_name or "nyu-mll/glue", config_name, cache_dir=cache_dir, token=token)


def evaluation_splits(raw_datasets: DatasetDict, split: str) -> list[str]:
    """Names of the splits to evaluate (`split="validation"`) or to predict (`split="test"`): MNLI has two of each."""
    if "validation_matched" in raw_datasets:
        return [f"{split}_matched", f"{split}_mismatched"]
    return [split]


def check_labels(splits: dict[str, Dataset]) -> None:
    """
    Refuse splits without labels.

    Raises:
        ValueError: a split has no column `label`.
    """
    for name, dataset in splits.items():
        if "label" not in dataset.column_names:
            columns = ", ".join(map(repr, dataset.column_names))
            raise ValueError(f"The split {name!r} has no column 'label'; it has {columns}.")


def text_columns(dataset: Dataset, task_name: str | None) -> tuple[str, ...]:
    """
    The one or two columns with the text: those of the task, otherwise the first ones of type string.

    Raises:
        ValueError: the dataset does not have them.
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
            f"The data has no text column {', '.join(map(repr, missing or ['sentence1']))}; it has "
            f"{', '.join(map(repr, dataset.column_names))}. Rename your columns, or pass another --task_name or none."
        )
    return columns


def is_regression(task_name: str | None, dataset: Dataset, config: PreTrainedConfig) -> bool:
    """Whether the labels are numbers to predict: by the task, otherwise by the type of the labels or by the model."""
    if task_name is not None:
        return task_name == "stsb"
    if "label" in dataset.features:
        return dataset.features["label"].dtype.startswith("float")
    return config.num_labels == 1


def load_model(
    name_or_path: str,
    dataset: Dataset,
    task_name: str | None,
    has_labels: bool,
    config_name: str | None = None,
    tokenizer_name: str | None = None,
    ignore_mismatched_sizes: bool = False,
    **hub_kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """
    Load a model with a classification or regression head, and its tokenizer.

    Args:
        name_or_path (`str`): model on the Hub or in a folder.
        dataset (`Dataset`): decides between classification and regression, and gives the labels.
        task_name (`str`, *optional*): GLUE task.
        has_labels (`bool`): whether the labels of `dataset` are all labels there are, as those of training data.
        config_name (`str`, *optional*): another configuration than the model's.
        tokenizer_name (`str`, *optional*): another tokenizer than the model's.
        ignore_mismatched_sizes (`bool`, *optional*, defaults to `False`): start with a new head if its size differs.
        hub_kwargs: for every `from_pretrained`.

    Returns:
        `tuple`: the model, the tokenizer, and whether the task is a regression.
    """
    config = AutoConfig.from_pretrained(config_name or name_or_path, **hub_kwargs)
    regression = is_regression(task_name, dataset, config)
    if regression:
        config.num_labels = 1
    elif has_labels:
        agree_on_labels(config, label_names(dataset, "label"))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or name_or_path, **hub_kwargs)
    # Decoders such as Llama have no padding token.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForSequenceClassification.from_pretrained(
        name_or_path, config=config, ignore_mismatched_sizes=ignore_mismatched_sizes, **hub_kwargs
    )
    return model, tokenizer, regression


def tokenize(
    splits: dict[str, Dataset],
    columns: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    regression: bool,
    max_length: int,
    pad_to_max_length: bool = False,
    unlabelled: tuple[str, ...] = (),
    load_from_cache_file: bool = True,
) -> dict[str, Dataset]:
    """
    Turn texts and labels into inputs of the model.

    Args:
        splits (`dict[str, Dataset]`): data by split.
        columns (`tuple[str, ...]`): the one or two columns with the text.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        config (`PreTrainedConfig`): of the model; its `label2id` encodes the labels.
        regression (`bool`): whether the labels are numbers to predict.
        max_length (`int`): most tokens per sample.
        pad_to_max_length (`bool`, *optional*, defaults to `False`): whether to pad each sample to that.
        unlabelled (`tuple[str, ...]`, *optional*): splits without labels; the test sets of GLUE have only -1.
        load_from_cache_file (`bool`, *optional*, defaults to `True`): whether to use the result of an earlier run.
    """

    def preprocess(examples: dict[str, list], feature: Any) -> dict[str, list]:
        inputs = tokenizer(
            *(examples[column] for column in columns),
            padding="max_length" if pad_to_max_length else False,
            max_length=min(max_length, tokenizer.model_max_length),
            truncation=True,
        )
        if feature is not None and regression:
            inputs["labels"] = [float(label) for label in examples["label"]]
        elif feature is not None:
            inputs["labels"] = encode_labels(examples["label"], feature, config.label2id)
        return inputs

    return {
        name: dataset.map(
            preprocess,
            batched=True,
            fn_kwargs={"feature": None if name in unlabelled else dataset.features["label"]},
            remove_columns=dataset.column_names,
            load_from_cache_file=load_from_cache_file,
            desc=f"Tokenizing {name}",
        )
        for name, dataset in splits.items()
    }


def predictions_of(logits: np.ndarray | tuple[np.ndarray, ...], regression: bool) -> np.ndarray:
    """Predicted values or class ids, of shape `(samples,)`."""
    # Encoder-decoders return hidden states after the logits.
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits[:, 0] if regression else np.argmax(logits, axis=1)


def glue_metrics(task_name: str | None, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The metrics of a GLUE task by scikit-learn and SciPy, under the names of `evaluate`. Accuracy without a task."""
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
    """The mean squared error, for a regression outside GLUE."""
    return {"mse": float(np.mean((predictions - references) ** 2))}


def load_text_metric(
    task_name: str | None, regression: bool, cache_dir: str | None = None
) -> Callable[..., dict[str, float]]:
    """
    The metric of a task. It takes `predictions` and `references`, and adds `combined_score`, the mean, where there are several
    values.
    """
    if task_name is not None:
        metric = load_metric("glue", task_name, partial(glue_metrics, task_name), cache_dir)
    elif regression:
        metric = load_metric("mse", None, squared_error, cache_dir)
    else:
        metric = load_metric("accuracy", None, partial(glue_metrics, None), cache_dir)

    def compute(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        metrics = metric(predictions=predictions, references=references)
        if len(metrics) > 1:
            metrics["combined_score"] = float(np.mean(list(metrics.values())))
        return metrics

    return compute
