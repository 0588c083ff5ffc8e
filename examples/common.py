"""What `run_glue.py` and `run_image_classification.py` share: the parts of a run that do not depend on the data."""

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
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import HfArgumentParser, PreTrainedConfig, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from smartfrz_hf import SmartFRZConfig, SmartFRZTrainer

logger = logging.getLogger(__name__)


@dataclass
class HubArguments:
    """Arguments that say how to reach the Hub; the model arguments of both scripts extend them."""

    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for what is downloaded or prepared. Default: the Hugging Face cache."}
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the model on the Hub to use."}
    )
    token: str | None = field(
        default=None,
        metadata={"help": "Token for private repositories. Default: the one that `hf auth login` has stored."},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run model code that comes with the model's repository. Read that code first."},
    )
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Start with a fresh head where the pretrained one has another number of labels."},
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


def parse_arguments(
    model_arguments: type, data_arguments: type, description: str, args: list[str] | None
) -> tuple[Any, Any, TrainingArguments, SmartFRZConfig]:
    """
    Read the four groups of arguments from a command line, or from one JSON file.

    Args:
        model_arguments (`type`): dataclass of the model arguments.
        data_arguments (`type`): dataclass of the data arguments.
        description (`str`): what `--help` says first.
        args (`list[str]`, *optional*): the command line; that of the process when it is `None`.

    Raises:
        ValueError: no action is asked for.
    """
    parser = HfArgumentParser(
        (model_arguments, data_arguments, TrainingArguments, SmartFRZConfig), description=description
    )
    args = sys.argv[1:] if args is None else args
    if len(args) == 1 and args[0].endswith(".json"):
        parsed = parser.parse_json_file(args[0])
    else:
        parsed = parser.parse_args_into_dataclasses(args)
    training_args = parsed[2]
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("Nothing to do: pass at least one of --do_train, --do_eval and --do_predict.")
    return parsed


def set_up_logging(training_args: TrainingArguments) -> None:
    """Log to stdout: these scripts and `smartfrz_hf` from INFO on, Transformers and Datasets from `--log_level` on."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    log_level = training_args.get_process_log_level()
    own_level = logging.INFO if training_args.should_log and training_args.log_level == "passive" else log_level
    for name in ("__main__", __name__, "smartfrz_hf"):
        logging.getLogger(name).setLevel(own_level)
    datasets.utils.logging.set_verbosity(log_level)
    transformers.utils.logging.set_verbosity(log_level)
    transformers.utils.logging.enable_default_handler()
    transformers.utils.logging.enable_explicit_format()
    logger.info(
        f"Process {training_args.process_index} of {training_args.world_size}, device: {training_args.device}, "
        f"16-bits training: {training_args.fp16 or training_args.bf16}"
    )
    logger.debug(f"Training/evaluation parameters {training_args}")


def find_checkpoint(training_args: TrainingArguments) -> str | None:
    """
    The checkpoint to go on from: the one asked for, else the last one in `output_dir`, else none.

    Raises:
        ValueError: `output_dir` holds files but no checkpoint, and training would write over them.
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
            "empty this one if what it holds may go."
        )
    logger.info(f"Resuming from {checkpoint}. To train from the start, pass another --output_dir or empty this one.")
    return checkpoint


def check_extensions(files: dict[str, str], extensions: tuple[str, ...]) -> None:
    """
    Refuse data files of an unknown kind.

    Args:
        files (`dict[str, str]`): option name to path.
        extensions (`tuple[str, ...]`): the legal ones, without the dot.

    Raises:
        ValueError: a file has another extension.
    """
    for option, path in files.items():
        if Path(path).suffix.lstrip(".") not in extensions:
            raise ValueError(
                f"--{option} {path} has the unknown extension {Path(path).suffix!r}; it must be one of "
                f"{', '.join('.' + extension for extension in extensions)}."
            )


def require_split(raw_datasets: DatasetDict, split: str, action: str) -> Dataset:
    """
    One split of the data.

    Raises:
        ValueError: it is not there, though `action` needs it.
    """
    if split not in raw_datasets:
        raise ValueError(
            f"{action} needs the split {split!r}, but the data has only {', '.join(map(repr, raw_datasets))}."
        )
    return raw_datasets[split]


def first_samples(dataset: Dataset, count: int | None) -> Dataset:
    """The first `count` samples; all of them when there are fewer or `count` is `None`."""
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def label_names(dataset: Dataset, column: str) -> list[str]:
    """The names of the classes, in the order of their ids: those of the data set, else its values sorted."""
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return feature.names
    return [str(value) for value in sorted(dataset.unique(column))]


def agree_on_labels(config: PreTrainedConfig, names: list[str]) -> None:
    """Give the model the names of the classes, unless it was trained on the same ones in an order of its own."""
    own = {name.lower(): index for name, index in config.label2id.items()}
    if sorted(own) == sorted(name.lower() for name in names):
        config.label2id = {name: own[name.lower()] for name in names}
    else:
        config.label2id = {name: index for index, name in enumerate(names)}
    config.id2label = {index: name for name, index in config.label2id.items()}


def encode_labels(values: list[Any], feature: Any, label2id: dict[str, int]) -> list[int]:
    """
    Labels as the ids the model uses.

    Args:
        values (`list`): labels as the data set holds them.
        feature (`datasets.Features` entry): type of their column.
        label2id (`dict[str, int]`): `config.label2id`.

    Raises:
        ValueError: a label is not among the model's.
    """
    names = [feature.int2str(value) if isinstance(feature, ClassLabel) else str(value) for value in values]
    for name in names:
        if name not in label2id:
            raise ValueError(
                f"The label {name!r} is not among the model's: {', '.join(map(repr, label2id))}. They are taken from "
                "the training data where it is given; give it, or a model that was trained on these labels."
            )
    return [label2id[name] for name in names]


def load_metric(
    path: str, config_name: str | None, fallback: Callable[..., dict[str, float]], cache_dir: str | None
) -> Callable[..., dict[str, float]]:
    """
    A metric of `evaluate`, or `fallback` where that cannot be loaded; the log says which.

    Args:
        path (`str`): name of the metric in `evaluate`.
        config_name (`str`, *optional*): its configuration, such as a GLUE task.
        fallback (`Callable`): computes the same metrics from `predictions` and `references` by scikit-learn and SciPy.
        cache_dir (`str`, *optional*): folder for the downloaded metric.

    Returns:
        `Callable`: takes `predictions` and `references`, returns the metrics by name.
    """
    name = path if config_name is None else f"{path}/{config_name}"
    try:
        import evaluate

        metric = evaluate.load(path, config_name, cache_dir=cache_dir)
    # `evaluate` runs a script that it fetches from the Hub: no network, no Hub, a missing requirement and an old
    # version all raise something else, and in each case the same numbers can be had here.
    except Exception as error:
        logger.info(f"Metrics: {name} by scikit-learn and SciPy, since evaluate could not load its own.")
        logger.debug("evaluate.load failed", exc_info=error)
        return fallback
    logger.info(f"Metrics: evaluate's {name}")
    return metric.compute


def train(trainer: SmartFRZTrainer, checkpoint: str | None) -> None:
    """Train, save the model, and write the training metrics, what froze when, and the state of the Trainer."""
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics["train_samples"] = len(trainer.train_dataset)
    metrics.update(trainer.ledger.logs())
    report_freezing(trainer)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def report_freezing(trainer: SmartFRZTrainer) -> None:
    """Log what froze when, and write it to `freeze_steps.json` in the output folder."""
    ledger = trainer.ledger
    timeline = ", ".join(f"{unit} at {step}" for unit, step in ledger.freeze_steps.items()) or "nothing froze"
    logger.info(
        f"Freeze timeline of {trainer.state.global_step} steps: {timeline}; {ledger.compute_saved:.1%} of the training "
        "compute saved."
    )
    if trainer.is_world_process_zero():
        Path(trainer.args.output_dir, "freeze_steps.json").write_text(json.dumps(ledger.freeze_steps, indent=2) + "\n")


def evaluate_split(trainer: SmartFRZTrainer, dataset: Dataset, prefix: str = "eval") -> None:
    """Evaluate, and write the metrics under `prefix`."""
    metrics = trainer.evaluate(eval_dataset=dataset, metric_key_prefix=prefix)
    metrics[f"{prefix}_samples"] = len(dataset)
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)


def write_predictions(trainer: SmartFRZTrainer, predictions: list[Any], filename: str) -> None:
    """Write one line per sample, its index and its prediction, under a header."""
    if trainer.is_world_process_zero():
        lines = [f"{index}\t{prediction}" for index, prediction in enumerate(predictions)]
        Path(trainer.args.output_dir, filename).write_text("\n".join(["index\tprediction", *lines]) + "\n")


def publish(trainer: SmartFRZTrainer, **card: Any) -> None:
    """Push to the Hub with `--push_to_hub`; write the model card in any case."""
    card = {key: value for key, value in card.items() if value is not None}
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
