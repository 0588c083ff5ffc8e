"""Fine-tune a speech model to classify recordings, or train one from scratch, and freeze its blocks as they converge."""

from dataclasses import dataclass, field
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    CommonModelArguments,
    agree_on_labels,
    average_gradients_in_trainer,
    evaluate_split,
    first_samples,
    load_metric,
    new_config,
    publish,
    start,
    train,
)
from datasets import Dataset
from scipy.io import wavfile
from scipy.signal import resample_poly
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    EvalPrediction,
    Wav2Vec2FeatureExtractor,
)

from smartfrz_hf import SmartFRZTrainer


@dataclass
class ModelArguments(CommonModelArguments):
    """Arguments for the model."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Pretrained model on the Hub or in a folder. Leave it out to train from scratch."},
    )
    model_type: str = field(default="wav2vec2", metadata={"help": "Architecture to train from scratch."})
    config_overrides: str = field(
        default="", metadata={"help": "Changes to its configuration, such as 'hidden_size=64,num_hidden_layers=4'."}
    )


@dataclass
class DataTrainingArguments:
    """Arguments for the data."""

    train_dir: str | None = field(
        default=None, metadata={"help": "Folder with the recordings to train on (.wav), one subfolder per class."}
    )
    validation_dir: str | None = field(
        default=None, metadata={"help": "Folder with the recordings to evaluate. Default: every fifth of --train_dir."}
    )
    max_seconds: float = field(default=4.0, metadata={"help": "Longer recordings are cut."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Largest number of samples to train on."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Largest number of samples to evaluate."})


def recordings(folder: str) -> Dataset:
    """
    Paths of the recordings and the names of their classes.

    Raises:
        ValueError: there are none.
    """
    files = sorted(Path(folder).glob("*/**/*.wav"))
    if not files:
        raise ValueError(f"There are no .wav files in subfolders of {folder}.")
    names = [file.relative_to(folder).parts[0] for file in files]
    return Dataset.from_dict({"path": [str(file) for file in files], "name": names})


def read(path: str, rate: int, seconds: float) -> np.ndarray:
    """The first channel of a recording, between -1 and 1, at `rate` samples per second."""
    own, sound = wavfile.read(path)
    sound = sound[:, 0] if sound.ndim > 1 else sound
    scale = np.iinfo(sound.dtype).max if np.issubdtype(sound.dtype, np.integer) else 1
    sound = sound[: int(seconds * own)].astype(np.float32) / scale
    common = gcd(rate, own)
    return resample_poly(sound, rate // common, own // common).astype(np.float32)


def main(args: list[str] | None = None) -> None:
    """
    Run the script.

    Args:
        args (`list[str]`, *optional*): the command line; that of the process when it is not given.
    """
    model_args, data_args, training_args, config, checkpoint = start(
        ModelArguments, DataTrainingArguments, __doc__, args
    )
    if data_args.train_dir is None:
        raise ValueError("No data: pass --train_dir, a folder with one subfolder of .wav files per class.")

    data = recordings(data_args.train_dir)
    if data_args.validation_dir is not None:
        splits = {"train": data, "validation": recordings(data_args.validation_dir)}
    else:
        fifth = [i for i in range(len(data)) if i % 5 == 0]
        splits = {"train": data.select(sorted({*range(len(data))} - {*fifth})), "validation": data.select(fifth)}
    names = sorted(set(splits["train"]["name"]))
    for split, count in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
        splits[split] = first_samples(splits[split].shuffle(seed=training_args.seed), count)

    name = model_args.model_name_or_path
    if name is not None:
        extractor = AutoFeatureExtractor.from_pretrained(name, **model_args.hub_kwargs)
        model = AutoModelForAudioClassification.from_pretrained(name, num_labels=len(names), **model_args.hub_kwargs)
    else:
        extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
        model = AutoModelForAudioClassification.from_config(
            new_config(
                partial(AutoConfig.for_model, model_args.model_type),
                model_args.config_overrides,
                num_labels=len(names),
            )
        )
    agree_on_labels(model.config, names)
    average_gradients_in_trainer(model)
    rate = extractor.sampling_rate

    def encode(example: dict[str, Any]) -> dict[str, Any]:
        sound = read(example["path"], rate, data_args.max_seconds)
        values = extractor(sound, sampling_rate=rate)[extractor.model_input_names[0]][0]
        return {extractor.model_input_names[0]: values, "labels": model.config.label2id[example["name"]]}

    with training_args.main_process_first(desc="reading"):
        splits = {
            split: dataset.map(encode, remove_columns=dataset.column_names, desc=f"Reading {split}")
            for split, dataset in splits.items()
        }

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        labels = [row.pop("labels") for row in rows]
        return {**extractor.pad(rows, return_tensors="pt"), "labels": torch.tensor(labels)}

    def accuracy(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(np.mean(predictions == references))}

    metric = load_metric("accuracy", None, accuracy, model_args.cache_dir)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return metric(predictions=np.argmax(prediction.predictions, axis=1), references=prediction.label_ids)

    trainer = SmartFRZTrainer(
        model=model,
        args=training_args,
        smartfrz=config,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=extractor,
        data_collator=collate,
        compute_metrics=compute_metrics,
    )
    if training_args.do_train:
        train(trainer, checkpoint)
    if training_args.do_eval:
        evaluate_split(trainer, splits["validation"])
    publish(trainer, tasks="audio-classification")


if __name__ == "__main__":
    main()
