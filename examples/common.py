"""What the example scripts share: arguments, data files, labels, metrics, logging and the steps of a run."""

import ast
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from transformers import HfArgumentParser, PreTrainedConfig, PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from smartfrz_hf import Ledger, SmartFRZArguments, SmartFRZConfig, SmartFRZMixin

logger = logging.getLogger(__name__)

TEXT_BUILDERS = {"csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet", "txt": "text"}


@dataclass
class CommonModelArguments:
    """Arguments for the model that both Trainer scripts have."""

    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for downloaded and prepared files. Default: the Hugging Face cache."}
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the model on the Hub to use."}
    )
    token: str | None = field(
        default=None,
        metadata={"help": "Token for private repositories. Default: the one that `hf auth login` stored."},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run model code from the model's repository. Read that code first."},
    )
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Start with a new head if the pretrained one has another number of labels."},
    )

    @property
    def hub_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for every `from_pretrained`."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass
class CommonDataArguments:
    """Arguments for the data that both Trainer scripts have."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of --dataset_name."})
    train_file: str | None = field(default=None, metadata={"help": "File with the training data."})
    validation_file: str | None = field(default=None, metadata={"help": "File with the evaluation data."})
    test_file: str | None = field(default=None, metadata={"help": "File with the data to predict; needs no labels."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Largest number of samples to train on. Default: all."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Largest number of samples to evaluate. Default: all."}
    )
    max_predict_samples: int | None = field(
        default=None, metadata={"help": "Largest number of samples to predict. Default: all."}
    )

    @property
    def files(self) -> dict[str, str]:
        """The given files by split."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in files.items() if path is not None}


def start(
    model_arguments: type,
    data_arguments: type,
    description: str,
    args: list[str] | None,
    training_arguments: type = TrainingArguments,
) -> tuple[Any, Any, Any, SmartFRZConfig, str | None]:
    """
    Start a script with a Trainer: read its arguments from the command line or from one JSON file, set up the log, find the
    checkpoint to resume from, and seed.

    Args:
        model_arguments (`type`): dataclass of the model arguments.
        data_arguments (`type`): dataclass of the data arguments.
        description (`str`): first paragraph of `--help`.
        args (`list[str]`, *optional*): the command line; that of the process when it is `None`.
        training_arguments (`type`, *optional*): class of the training arguments. Defaults to that of Transformers.

    Returns:
        `tuple`: arguments for the model, for the data and for the training, the configuration of the freezing, and the
        checkpoint, which is `None` where there is none.

    Raises:
        ValueError: none of `--do_train`, `--do_eval` and `--do_predict` is given, or `--output_dir` holds files but no
            checkpoint.
    """
    parser = HfArgumentParser(
        (model_arguments, data_arguments, training_arguments, SmartFRZArguments), description=description
    )
    args = sys.argv[1:] if args is None else args
    if len(args) == 1 and args[0].endswith(".json"):
        parsed = parser.parse_json_file(args[0])
    else:
        parsed = parser.parse_args_into_dataclasses(args)
    model_args, data_args, training_args, smartfrz_args = parsed
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("Nothing to do: pass at least one of --do_train, --do_eval and --do_predict.")
    set_up_trainer_logging(training_args)
    checkpoint = find_checkpoint(training_args)
    set_seed(training_args.seed)
    return model_args, data_args, training_args, smartfrz_args.to_config(), checkpoint


def set_up_logging(log_level: int, own_level: int) -> None:
    """
    Log to stdout.

    Args:
        log_level (`int`): level of Transformers and Datasets.
        own_level (`int`): level of the scripts and of `smartfrz_hf`.
    """
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    for name in ("__main__", "common", "text_classification", "smartfrz_hf"):
        logging.getLogger(name).setLevel(own_level)
    datasets.utils.logging.set_verbosity(log_level)
    transformers.utils.logging.set_verbosity(log_level)
    transformers.utils.logging.enable_default_handler()
    transformers.utils.logging.enable_explicit_format()


def set_up_trainer_logging(training_args: TrainingArguments) -> None:
    """Log to stdout: the scripts and `smartfrz_hf` at INFO, Transformers and Datasets at `--log_level`."""
    log_level = training_args.get_process_log_level()
    is_default = training_args.should_log and training_args.log_level == "passive"
    set_up_logging(log_level, logging.INFO if is_default else log_level)
    logger.info(
        f"Process {training_args.process_index} of {training_args.world_size}, device: {training_args.device}, "
        f"16-bit training: {training_args.fp16 or training_args.bf16}"
    )
    logger.debug(f"Training arguments: {training_args}")


def find_checkpoint(training_args: TrainingArguments) -> str | None:
    """
    The checkpoint to resume from: `--resume_from_checkpoint`, otherwise the last one in `--output_dir`, if there is one.

    Raises:
        ValueError: `--output_dir` holds files but no checkpoint, and training would overwrite them.
    """
    output_dir = training_args.output_dir
    if training_args.resume_from_checkpoint is not None or not training_args.do_train:
        return training_args.resume_from_checkpoint
    if not os.path.isdir(output_dir) or not os.listdir(output_dir):
        return None
    checkpoint = get_last_checkpoint(output_dir)
    if checkpoint is None:
        raise ValueError(
            f"--output_dir {output_dir} holds files but no checkpoint to resume from. Pass another --output_dir, or "
            "delete the files."
        )
    logger.info(f"Resuming from {checkpoint}. To train from the start, pass another --output_dir or empty this one.")
    return checkpoint


def check_extensions(files: dict[str, str], extensions: tuple[str, ...]) -> None:
    """
    Refuse data files with an unknown extension.

    Args:
        files (`dict[str, str]`): path by split.
        extensions (`tuple[str, ...]`): the legal extensions, without the dot.

    Raises:
        ValueError: a file has another extension.
    """
    for split, path in files.items():
        if Path(path).suffix.lstrip(".") not in extensions:
            raise ValueError(
                f"--{split}_file {path} has the unknown extension {Path(path).suffix!r}; it must be one of "
                f"{', '.join('.' + extension for extension in extensions)}."
            )


def load_files(files: dict[str, str], builders: dict[str, str], cache_dir: str | None) -> DatasetDict:
    """
    Load data files.

    Args:
        files (`dict[str, str]`): path by split.
        builders (`dict[str, str]`): builder of Datasets by extension.
        cache_dir (`str`, *optional*): folder for prepared data.
    """
    return DatasetDict(
        {
            split: load_dataset(
                builders[Path(path).suffix.lstrip(".")], data_files=path, split="train", cache_dir=cache_dir
            )
            for split, path in files.items()
        }
    )


def load_splits(
    data_args: CommonDataArguments, model_args: Any, training_args: TrainingArguments
) -> dict[str, Dataset]:
    """
    The splits to train and to evaluate, cut to the largest number of samples: from files where they are given, otherwise from the
    Hub.

    Raises:
        ValueError: there is no data, or not all that was asked for.
    """
    if data_args.files:
        check_extensions(data_args.files, tuple(TEXT_BUILDERS))
        raw_datasets = load_files(data_args.files, TEXT_BUILDERS, model_args.cache_dir)
    elif data_args.dataset_name is not None:
        where = {"cache_dir": model_args.cache_dir, "token": model_args.token}
        raw_datasets = load_dataset(data_args.dataset_name, data_args.dataset_config_name, **where)
    else:
        raise ValueError("No data: pass --train_file and --validation_file, or --dataset_name.")
    splits = {}
    if training_args.do_train:
        splits["train"] = first_samples(
            require_split(raw_datasets, "train", "--do_train"), data_args.max_train_samples
        )
    if training_args.do_eval:
        whole = require_split(raw_datasets, "validation", "--do_eval")
        splits["validation"] = first_samples(whole, data_args.max_eval_samples)
    return splits


def check_columns(splits: dict[str, Dataset], columns: tuple[str, ...]) -> None:
    """
    Refuse data without the columns that are needed.

    Raises:
        ValueError: a column is missing.
    """
    for name, dataset in splits.items():
        missing = [column for column in columns if column not in dataset.column_names]
        if missing:
            raise ValueError(
                f"The split {name!r} has no column {', '.join(map(repr, missing))}; it has "
                f"{', '.join(map(repr, dataset.column_names))}."
            )


def require_split(raw_datasets: DatasetDict, split: str, action: str) -> Dataset:
    """
    One split of the data.

    Raises:
        ValueError: it is missing, but `action` needs it.
    """
    if split not in raw_datasets:
        raise ValueError(
            f"{action} needs the split {split!r}, but the data has only {', '.join(map(repr, raw_datasets))}."
        )
    return raw_datasets[split]


def first_samples(dataset: Dataset, count: int | None) -> Dataset:
    """The first `count` samples; all of them if there are fewer or `count` is `None`."""
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def label_names(dataset: Dataset, column: str) -> list[str]:
    """The names of the classes in the order of their ids: those of the dataset, otherwise its values in sorted order."""
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return feature.names
    return [str(value) for value in sorted(dataset.unique(column))]


def agree_on_labels(config: PreTrainedConfig, names: list[str]) -> None:
    """Give the model the names of the classes. A model that knows the same names in another order keeps its order."""
    own = {name.lower(): index for name, index in config.label2id.items()}
    if sorted(own) == sorted(name.lower() for name in names):
        config.label2id = {name: own[name.lower()] for name in names}
    else:
        config.label2id = {name: index for index, name in enumerate(names)}
    config.id2label = {index: name for name, index in config.label2id.items()}


def encode_labels(values: list[Any], feature: Any, label2id: dict[str, int]) -> list[int]:
    """
    Labels as the ids that the model uses.

    Args:
        values (`list`): labels as the dataset holds them.
        feature (`datasets.Features` entry): type of their column.
        label2id (`dict[str, int]`): `config.label2id`.

    Raises:
        ValueError: the model does not know a label.
    """
    names = [feature.int2str(value) if isinstance(feature, ClassLabel) else str(value) for value in values]
    for name in names:
        if name not in label2id:
            raise ValueError(
                f"The model does not know the label {name!r}; it knows {', '.join(map(repr, label2id))}. The labels "
                "come from the training data. Pass training data with this label, or a model that was trained on it."
            )
    return [label2id[name] for name in names]


def load_metric(
    path: str, config_name: str | None, fallback: Callable[..., dict[str, float]], cache_dir: str | None
) -> Callable[..., dict[str, float]]:
    """
    A metric of `evaluate`, or `fallback` if `evaluate` cannot load it. The log says which.

    Args:
        path (`str`): name of the metric in `evaluate`.
        config_name (`str`, *optional*): its configuration, such as a GLUE task.
        fallback (`Callable`): computes the same metrics from `predictions` and `references`.
        cache_dir (`str`, *optional*): folder for the downloaded metric.

    Returns:
        `Callable`: takes `predictions` and `references`, returns the metrics by name.
    """
    name = path if config_name is None else f"{path}/{config_name}"
    try:
        import evaluate

        metric = evaluate.load(path, config_name, cache_dir=cache_dir)
    # `evaluate` runs a script from the Hub. Without a network, without a requirement of the script or with an old
    # version it raises different errors, and the fallback gives the same numbers in every case.
    except Exception as error:
        logger.info(f"Metrics: {name}, computed by scikit-learn and SciPy because evaluate could not load it.")
        logger.debug("evaluate.load failed", exc_info=error)
        return fallback
    logger.info(f"Metrics: {name} of evaluate")
    return metric.compute


def parse_overrides(text: str) -> dict[str, Any]:
    """
    Parse `--config_overrides`. Words need no quotes.

    Raises:
        ValueError: the text is not of the form `name=value,name=value`.

    Example:

    ```python
    >>> parse_overrides("hidden_sizes=[64,128],hidden_dropout_prob=0.1,hidden_act=gelu,qkv_bias=false")
    {'hidden_sizes': [64, 128], 'hidden_dropout_prob': 0.1, 'hidden_act': 'gelu', 'qkv_bias': False}
    ```
    """
    words = {"true": True, "false": False, "none": None}
    overrides = {}
    try:
        call = ast.parse(f"dict({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not call.keywords:
            raise ValueError("it must be a list of assignments")
        for keyword in call.keywords:
            if keyword.arg is None:
                raise ValueError("it must be a list of assignments")
            if isinstance(keyword.value, ast.Name):
                overrides[keyword.arg] = words.get(keyword.value.id.lower(), keyword.value.id)
            else:
                overrides[keyword.arg] = ast.literal_eval(keyword.value)
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"--config_overrides is {text!r}, which cannot be read ({error}); write it as "
            "'hidden_size=128,hidden_act=gelu,depths=[2,2]'."
        ) from error
    return overrides


def new_config(build: Callable[..., PreTrainedConfig], overrides: str | None, **fields: Any) -> PreTrainedConfig:
    """
    The configuration of a model that is trained from scratch.

    Args:
        build (`Callable`): makes one, such as `partial(AutoConfig.for_model, "t5")`.
        overrides (`str`, *optional*): `--config_overrides`.
        fields: what else differs from the default.

    Raises:
        ValueError: an override names something that the configuration does not have.
    """
    default, changes = build(), parse_overrides(overrides) if overrides else {}
    for name in changes:
        if not hasattr(default, name):
            raise ValueError(
                f"--config_overrides sets {name!r}, which {type(default).__name__} does not have; it has "
                f"{', '.join(sorted(default.to_dict()))}."
            )
    return build(**changes | fields)


def average_gradients_in_trainer(model: PreTrainedModel) -> None:
    """
    Let the Trainer average the loss over accumulation steps and processes.

    Most classification heads accept `num_items_in_batch` and ignore it. The Trainer then takes their loss as averaged already,
    and gradients come out too large (huggingface/transformers#47688).
    """
    model.accepts_loss_kwargs = False


def train(trainer: SmartFRZMixin, checkpoint: str | None) -> None:
    """Train, and save the model, the training metrics, the freeze steps and the state of the Trainer."""
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics["train_samples"] = len(trainer.train_dataset)
    metrics.update(trainer.ledger.logs())
    report_freezing(
        trainer.ledger, trainer.state.global_step, trainer.args.output_dir, trainer.is_world_process_zero()
    )
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def report_freezing(ledger: Ledger, steps: int, output_dir: str, is_main_process: bool) -> None:
    """Log when each unit froze, and write it to `freeze_steps.json` in the output folder."""
    timeline = ", ".join(f"{unit} at {step}" for unit, step in ledger.freeze_steps.items()) or "nothing froze"
    logger.info(
        f"Freeze timeline of {steps} steps: {timeline}; {ledger.compute_saved:.1%} of the training compute saved."
    )
    if is_main_process:
        Path(output_dir, "freeze_steps.json").write_text(json.dumps(ledger.freeze_steps, indent=2) + "\n")


def evaluate_split(trainer: SmartFRZMixin, dataset: Dataset, prefix: str = "eval") -> dict[str, float]:
    """Evaluate, write the metrics under `prefix`, and return them."""
    metrics = trainer.evaluate(eval_dataset=dataset, metric_key_prefix=prefix)
    metrics[f"{prefix}_samples"] = len(dataset)
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)
    return metrics


def write_predictions(trainer: SmartFRZMixin, predictions: list[Any], filename: str) -> None:
    """Write one line per sample with its index and its prediction, under a header."""
    if trainer.is_world_process_zero():
        lines = [f"{index}\t{prediction}" for index, prediction in enumerate(predictions)]
        Path(trainer.args.output_dir, filename).write_text("\n".join(["index\tprediction", *lines]) + "\n")


def publish(trainer: SmartFRZMixin, **card: Any) -> None:
    """Write the model card, and with `--push_to_hub` push it and the model to the Hub."""
    card = {key: value for key, value in card.items() if value is not None}
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
