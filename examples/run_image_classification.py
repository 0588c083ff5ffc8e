"""Fine-tune an image classifier or train one from scratch, and freeze its blocks as they converge."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common import (
    CommonDataArguments,
    CommonModelArguments,
    agree_on_labels,
    average_gradients_in_trainer,
    check_extensions,
    encode_labels,
    evaluate_split,
    first_samples,
    label_names,
    load_files,
    load_metric,
    new_config,
    publish,
    require_split,
    start,
    train,
    write_predictions,
)
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from PIL import ImageOps
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    DefaultDataCollator,
    EvalPrediction,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from smartfrz_hf import SmartFRZTrainer

logger = logging.getLogger(__name__)

MODEL_TYPES = tuple(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
IMAGE_COLUMNS = ("img", "image", "images", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label")


@dataclass
class ModelArguments(CommonModelArguments):
    """Arguments for the model to fine-tune or to build."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Pretrained model on the Hub or in a folder. Leave it out to train from scratch."},
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Architecture to train from scratch: " + ", ".join(MODEL_TYPES) + "."}
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Configuration on the Hub or in a folder: another one than the model's, or of a model to train from "
            "scratch."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Changes to the configuration of a model to train from scratch, such as "
            "'hidden_size=128,num_hidden_layers=6' or 'hidden_sizes=[64,128],depths=[2,2],layer_type=basic'."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Height and width in pixels of the images for a model to train from scratch. Default: the size in "
            "its configuration, or 224."
        },
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Another image processor than the model's, on the Hub or in a folder."}
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is None and self.model_type is None and self.config_name is None:
            raise ValueError(
                "No model: pass --model_name_or_path to fine-tune a model, or --model_type or --config_name to train one "
                "from scratch."
            )
        if self.model_type is not None and self.model_type not in MODEL_TYPES:
            raise ValueError(f"--model_type is {self.model_type!r}; it must be one of {', '.join(MODEL_TYPES)}.")
        if self.model_type is not None and self.config_name is not None:
            raise ValueError("--model_type and --config_name both name a configuration; pass one of them.")
        scratch_only = [name for name in ("model_type", "config_overrides", "image_size") if getattr(self, name)]
        if self.model_name_or_path is not None and scratch_only:
            raise ValueError(
                f"--{scratch_only[0]} is for a model that is trained from scratch and cannot be combined with "
                "--model_name_or_path; pass one of them."
            )


@dataclass
class DataTrainingArguments(CommonDataArguments):
    """Arguments for the images and labels. Files are parquet files with a column of images and one of labels."""

    eval_split_name: str = field(
        default="validation", metadata={"help": "Split of --dataset_name to evaluate, such as `test` for CIFAR-10."}
    )
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder with the training images, one subfolder per class."}
    )
    validation_dir: str | None = field(
        default=None, metadata={"help": "Folder with the evaluation images, one subfolder per class."}
    )
    test_dir: str | None = field(
        default=None, metadata={"help": "Folder with the images to predict; needs no subfolders."}
    )
    image_column_name: str | None = field(
        default=None,
        metadata={
            "help": "Column with the images: encoded bytes, a path, or a struct of both. Default: the column of type "
            "Image, or one named " + ", ".join(IMAGE_COLUMNS) + "."
        },
    )
    label_column_name: str | None = field(
        default=None,
        metadata={
            "help": "Column with the labels. Default: one named "
            + ", ".join(LABEL_COLUMNS)
            + ", or the only column of "
            "type ClassLabel."
        },
    )
    train_val_split: float = field(
        default=0.15, metadata={"help": "Fraction of the training data to evaluate if there is no evaluation data."}
    )
    random_flip: bool = field(
        default=False,
        metadata={
            "help": "Mirror half of the training images, drawn anew in each epoch. Off by default, because the "
            "activation cache cannot serve images that change."
        },
    )

    def __post_init__(self) -> None:
        check_extensions(self.files, ("parquet",))
        sources = {
            "--dataset_name": self.dataset_name is not None,
            "image folders": bool(self.folders),
            "files": bool(self.files),
        }
        if sum(sources.values()) == 0:
            raise ValueError(
                "No data: pass --dataset_name for a dataset on the Hub, --train_dir, --validation_dir and --test_dir "
                "for image folders, or --train_file, --validation_file and --test_file for parquet files."
            )
        if sum(sources.values()) > 1:
            given = " and ".join(name for name, is_given in sources.items() if is_given)
            raise ValueError(f"The data comes from {given}; pass only one of them.")
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"--train_val_split is {self.train_val_split}; it must be between 0 and 1.")

    @property
    def folders(self) -> dict[str, str]:
        """The given image folders by split."""
        folders = {"train": self.train_dir, "validation": self.validation_dir, "test": self.test_dir}
        return {split: path for split, path in folders.items() if path is not None}


def load_data(data_args: DataTrainingArguments, model_args: ModelArguments) -> DatasetDict:
    """Load the splits from the Hub, from parquet files or from image folders."""
    if data_args.dataset_name is not None:
        raw_datasets = load_dataset(
            data_args.dataset_name,
            data_args.dataset_config_name,
            cache_dir=model_args.cache_dir,
            token=model_args.token,
        )
        if data_args.eval_split_name in raw_datasets:
            raw_datasets["validation"] = raw_datasets[data_args.eval_split_name]
        return raw_datasets
    if data_args.files:
        return load_files(data_args.files, {"parquet": "parquet"}, model_args.cache_dir)
    folders = {split: str(Path(path, "**")) for split, path in data_args.folders.items()}
    test_folder = folders.pop("test", None)
    # One call for both splits, so that classes have the same ids in both.
    raw_datasets = DatasetDict()
    if folders:
        raw_datasets = load_dataset(
            "imagefolder", data_files=folders, drop_labels=False, cache_dir=model_args.cache_dir
        )
    if test_folder is not None:
        raw_datasets["test"] = load_dataset(
            "imagefolder", data_files=test_folder, split="train", drop_labels=True, cache_dir=model_args.cache_dir
        )
    return raw_datasets


def find_column(dataset: Dataset, kind: str, name: str | None, candidates: list[str]) -> str:
    """
    The column with the images (`kind="image"`) or with the labels (`kind="label"`).

    Args:
        dataset (`Dataset`): any split.
        kind (`str`): `"image"` or `"label"`.
        name (`str`, *optional*): name of the column, if it was given.
        candidates (`list[str]`): names to try otherwise, in this order.

    Raises:
        ValueError: there is no such column.
    """
    candidates = candidates if name is None else [name]
    for candidate in candidates:
        if candidate in dataset.column_names:
            return candidate
    raise ValueError(
        f"Found no {kind} column ({', '.join(candidates)}) among {', '.join(map(repr, dataset.column_names))}; "
        f"pass --{kind}_column_name."
    )


def find_image_column(dataset: Dataset, name: str | None) -> str:
    """The column with the images: one of type Image, or one with a usual name."""
    images = [column for column, feature in dataset.features.items() if isinstance(feature, Image)]
    return find_column(dataset, "image", name, [*images, *IMAGE_COLUMNS])


def find_label_column(dataset: Dataset, name: str | None) -> str:
    """The column with the labels: one with a usual name, or the only one of type ClassLabel."""
    labels = [column for column, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    return find_column(dataset, "label", name, [*LABEL_COLUMNS, *(labels if len(labels) == 1 else [])])


def config_from_scratch(model_args: ModelArguments, num_labels: int) -> PreTrainedConfig:
    """
    The configuration of a model that is trained from scratch.

    Raises:
        ValueError: an override names something that the configuration does not have.
    """
    if model_args.config_name is not None:
        build = partial(AutoConfig.from_pretrained, model_args.config_name, **model_args.hub_kwargs)
    else:
        build = partial(AutoConfig.for_model, model_args.model_type)
    sizes = {}
    if model_args.image_size is not None and hasattr(build(), "image_size"):
        sizes["image_size"] = model_args.image_size
    return new_config(build, model_args.config_overrides, num_labels=num_labels, **sizes)


def new_image_processor(model_args: ModelArguments, config: PreTrainedConfig) -> BaseImageProcessor:
    """A processor that resizes to what the model takes, scales to [0, 1] and normalizes to [-1, 1]."""
    size = model_args.image_size or getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    # Both are saved under the same name. The one of torchvision is faster, but its import warns without torchvision.
    name = "ViTImageProcessor" if is_torchvision_available() else "ViTImageProcessorPil"
    # Earlier versions have the one without torchvision only, under the shorter name.
    ImageProcessor = getattr(transformers, name, None) or transformers.ViTImageProcessor
    return ImageProcessor(size={"height": height, "width": width})


def make_transform(
    image_processor: BaseImageProcessor,
    image_column: str,
    encode: Callable[[dict[str, list]], list[int]] | None,
    random_flip: bool = False,
) -> Callable[[dict[str, list]], dict[str, Any]]:
    """
    A function that turns samples into inputs of the model each time they are read.

    Args:
        image_processor (`BaseImageProcessor`): resizes and normalizes.
        image_column (`str`): column with the images.
        encode (`Callable`, *optional*): returns the label ids of samples.
        random_flip (`bool`, *optional*, defaults to `False`): whether to mirror half of the images.
    """

    def transform(examples: dict[str, list]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in examples[image_column]]
        if random_flip:
            # The generator of torch is seeded in every dataloader worker, and restored when a run is resumed.
            images = [ImageOps.mirror(image) if torch.rand(()) < 0.5 else image for image in images]
        inputs = {"pixel_values": image_processor(images, return_tensors="pt")["pixel_values"]}
        if encode is not None:
            inputs["labels"] = encode(examples)
        return inputs

    return transform


def accuracy(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The accuracy by scikit-learn, under its name in `evaluate`."""
    from sklearn.metrics import accuracy_score

    return {"accuracy": float(accuracy_score(references, predictions))}


def main(args: list[str] | None = None) -> None:
    """
    Run the script.

    Args:
        args (`list[str]`, *optional*): the command line; that of the process when it is not given.
    """
    model_args, data_args, training_args, smartfrz_config, checkpoint = start(
        ModelArguments, DataTrainingArguments, __doc__, args
    )
    # The Trainer would remove the column with the images before the transform reads it.
    training_args.remove_unused_columns = False

    raw_datasets = load_data(data_args, model_args)
    if training_args.do_eval and "validation" not in raw_datasets and "train" in raw_datasets:
        parts = raw_datasets["train"].train_test_split(data_args.train_val_split, seed=training_args.seed)
        raw_datasets["train"], raw_datasets["validation"] = parts["train"], parts["test"]
        logger.info(
            f"There is no evaluation data: {data_args.train_val_split:.0%} of the training data is evaluated instead."
        )
    splits = {}
    for action, split, is_wanted, count in (
        ("--do_train", "train", training_args.do_train, data_args.max_train_samples),
        ("--do_eval", "validation", training_args.do_eval, data_args.max_eval_samples),
        ("--do_predict", "test", training_args.do_predict, data_args.max_predict_samples),
    ):
        if is_wanted:
            dataset = require_split(raw_datasets, split, action)
            # Files are often sorted by class, so the samples are shuffled. Predictions keep the order of the file.
            if count is not None and split != "test":
                dataset = dataset.shuffle(seed=training_args.seed)
            splits[split] = first_samples(dataset, count)

    reference = raw_datasets["train"] if "train" in raw_datasets else next(iter(splits.values()))
    image_column = find_image_column(reference, data_args.image_column_name)
    label_column = names = None
    if training_args.do_train or training_args.do_eval:
        label_column = find_label_column(reference, data_args.label_column_name)
    if label_column is not None and "train" in raw_datasets:
        names = label_names(raw_datasets["train"], label_column)

    if model_args.model_name_or_path is not None:
        config = AutoConfig.from_pretrained(
            model_args.config_name or model_args.model_name_or_path, **model_args.hub_kwargs
        )
        if names is not None:
            agree_on_labels(config, names)
        model = AutoModelForImageClassification.from_pretrained(
            model_args.model_name_or_path,
            config=config,
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
            **model_args.hub_kwargs,
        )
    else:
        if names is None:
            raise ValueError("Training from scratch needs training data, because the labels come from it.")
        config = config_from_scratch(model_args, len(names))
        agree_on_labels(config, names)
        model = AutoModelForImageClassification.from_config(config, trust_remote_code=model_args.trust_remote_code)
        logger.info(f"Training {type(model).__name__} from scratch: {model.num_parameters() / 1e6:.2f} M parameters.")
    average_gradients_in_trainer(model)

    processor_name = model_args.image_processor_name or model_args.model_name_or_path
    if processor_name is not None:
        image_processor = AutoImageProcessor.from_pretrained(processor_name, **model_args.hub_kwargs)
    else:
        image_processor = new_image_processor(model_args, config)

    for split, dataset in splits.items():
        encode = None
        if split != "test":
            feature = dataset.features[label_column]

            def encode(examples: dict[str, list], feature: Any = feature) -> list[int]:
                return encode_labels(examples[label_column], feature, config.label2id)

        dataset = dataset.cast_column(image_column, Image())
        flip = data_args.random_flip and split == "train"
        splits[split] = dataset.with_transform(make_transform(image_processor, image_column, encode, flip))

    metric = load_metric("accuracy", None, accuracy, model_args.cache_dir)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return metric(predictions=np.argmax(prediction.predictions, axis=1), references=prediction.label_ids)

    trainer = SmartFRZTrainer(
        model=model,
        args=training_args,
        smartfrz=smartfrz_config,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        compute_metrics=compute_metrics,
        processing_class=image_processor,
        data_collator=DefaultDataCollator(),
    )

    if training_args.do_train:
        train(trainer, checkpoint)

    if training_args.do_eval:
        evaluate_split(trainer, splits["validation"])

    if training_args.do_predict:
        logits = trainer.predict(splits["test"], metric_key_prefix="predict").predictions
        predictions = [config.id2label[int(index)] for index in np.argmax(logits, axis=1)]
        write_predictions(trainer, predictions, "predict_results_images.txt")

    publish(
        trainer,
        tasks="image-classification",
        dataset=data_args.dataset_name,
        tags=["image-classification", "vision"],
    )


if __name__ == "__main__":
    main()
