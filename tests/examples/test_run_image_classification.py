"""`run_image_classification.py`, run on tiny images and tiny random models."""

import logging
import runpy
import sys
from importlib import import_module

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from example_scripts import EXAMPLES, FREEZE_TWO, TRAIN, picture, read_json
from PIL import Image
from transformers import AutoConfig

TINY_VIT = "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=32,patch_size=8,image_size=16"
TINY_RESNET = "embedding_size=8,hidden_sizes=[8,16],depths=[1,1],layer_type=basic"


def test_from_scratch_as_a_script(examples, pictures, tmp_path, monkeypatch, caplog):
    words = ["--model_type", "vit", "--config_overrides", TINY_VIT, "--output_dir", str(tmp_path)]
    words += ["--train_file", f"{pictures}/train.parquet", "--validation_file", f"{pictures}/validation.parquet"]
    words += ["--do_eval", "--max_train_samples", "16", *TRAIN, *FREEZE_TWO]
    monkeypatch.setattr(sys, "argv", ["run_image_classification.py", *words])
    with caplog.at_level(logging.INFO):
        runpy.run_path(str(EXAMPLES / "run_image_classification.py"), run_name="__main__")
    freeze_steps = read_json(tmp_path, "freeze_steps.json")
    assert len(freeze_steps) == 2
    assert set(freeze_steps.values()) == {0}
    results = read_json(tmp_path, "all_results.json")
    assert results["freeze/depth"] == 2
    assert 0 < results["freeze/compute_saved"] < 1
    assert (results["train_samples"], results["eval_samples"]) == (16, 9)
    assert 0 <= results["eval_accuracy"] <= 1
    assert "Freeze timeline of 2 steps: stem at 0" in caplog.text
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.num_hidden_layers, config.num_labels) == (16, 3, 3)
    assert read_json(tmp_path, "preprocessor_config.json")["size"] == {"height": 16, "width": 16}


def test_image_folders_then_its_own_model(run_image_classification, tmp_path):
    for name, label in (("blue", 0), ("red", 1)):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "test").mkdir(exist_ok=True)
        for index in range(12):
            picture(label).save(tmp_path / "train" / name / f"{index}.png")
        picture(label).save(tmp_path / "test" / f"{name}.png")
    first, second = tmp_path / "first", tmp_path / "second"
    scratch = ["--model_type", "resnet", "--config_overrides", TINY_RESNET, "--image_size", "16"]
    data = ["--train_dir", str(tmp_path / "train"), "--random_flip", "--train_val_split", "0.25", "--do_eval"]
    run_image_classification.main([*scratch, *data, *TRAIN, *FREEZE_TWO, "--output_dir", str(first)])
    assert read_json(first, "freeze_steps.json")
    results = read_json(first, "all_results.json")
    assert (results["train_samples"], results["eval_samples"]) == (18, 6)
    config = AutoConfig.from_pretrained(first)
    assert (config.hidden_sizes, config.label2id) == ([8, 16], {"blue": 0, "red": 1})

    # Neither labels nor training data: the model knows its classes.
    data = ["--test_dir", str(tmp_path / "test"), "--do_predict", "--use_cpu"]
    run_image_classification.main(
        ["--model_name_or_path", str(first), *data, "--output_dir", str(second)] + FREEZE_TWO
    )
    lines = (second / "predict_results_images.txt").read_text().splitlines()
    assert len(lines) == 1 + 2
    assert {line.split("\t")[1] for line in lines[1:]} <= {"blue", "red"}


def test_data_set_of_the_hub(run_image_classification, tmp_path, monkeypatch):
    features = Features({"img": datasets.Image(), "fine_label": ClassLabel(names=["x", "y", "z"])})
    rows = {"img": [picture(i % 3) for i in range(12)], "fine_label": [i % 3 for i in range(12)]}
    hub = DatasetDict(train=Dataset.from_dict(rows, features), test=Dataset.from_dict(rows, features))
    monkeypatch.setattr(run_image_classification, "load_dataset", lambda *args, **kwargs: hub)
    model = ["--model_type", "vit", "--config_overrides", TINY_VIT, "--output_dir", str(tmp_path / "out")]
    data = ["--dataset_name", "some/set", "--eval_split_name", "test", "--do_eval", "--do_predict"]
    run_image_classification.main([*model, *data, *TRAIN, *FREEZE_TWO])
    results = read_json(tmp_path, "out", "all_results.json")
    assert (results["train_samples"], results["eval_samples"]) == (12, 12)


def test_flips_only_when_asked(run_image_classification):
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    pixels[:, 0] = 255
    examples = {"img": [Image.fromarray(pixels)] * 32}

    def process(images, return_tensors):
        return {"pixel_values": [int(np.asarray(image)[0, 0, 0]) for image in images]}

    plain = run_image_classification.make_transform(process, "img", None)
    flipped = run_image_classification.make_transform(process, "img", None, random_flip=True)
    assert set(plain(examples)["pixel_values"]) == {255}
    assert set(flipped(examples)["pixel_values"]) == {0, 255}


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("hidden_size=128,num_hidden_layers=6", {"hidden_size": 128, "num_hidden_layers": 6}),
        ("hidden_sizes=[64,128],depths=[2, 2]", {"hidden_sizes": [64, 128], "depths": [2, 2]}),
        ("layer_type=basic,qkv_bias=false,x=none", {"layer_type": "basic", "qkv_bias": False, "x": None}),
        ("layer_norm_eps=1e-6,hidden_act='quick-gelu'", {"layer_norm_eps": 1e-6, "hidden_act": "quick-gelu"}),
    ],
)
def test_overrides(run_image_classification, text, overrides):
    assert import_module("common").parse_overrides(text) == overrides


@pytest.mark.parametrize("text", ["hidden_size", "128", "hidden_size=", "a=f(1)", "a=1) or dict(b=2", "**a"])
def test_unreadable_overrides(run_image_classification, text):
    with pytest.raises(ValueError, match="--config_overrides is .* which cannot be read"):
        import_module("common").parse_overrides(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_type", "vit"], "No data: pass --dataset_name"),
        (["--model_type", "vit", "--train_file", "a.csv"], "--train_file a.csv has the unknown extension '.csv'"),
        (["--model_type", "vit", "--train_file", "a.parquet", "--train_dir", "b"], "image folders and files"),
        (["--train_dir", "b"], "No model: pass --model_name_or_path to fine-tune"),
        (["--model_type", "bert", "--train_dir", "b"], "--model_type is 'bert'; it must be one of"),
        (["--model_name_or_path", "m", "--config_overrides", "a=1", "--train_dir", "b"], "trained from scratch"),
    ],
)
def test_bad_arguments(run_image_classification, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_image_classification.main(["--do_train", *arguments])


def test_bad_data(run_image_classification, pictures, tmp_path):
    train = ["--train_file", f"{pictures}/train.parquet", "--output_dir", str(tmp_path / "out")]

    def run(*arguments):
        run_image_classification.main(["--model_type", "vit", "--do_train", "--use_cpu", *train, *arguments])

    with pytest.raises(ValueError, match="Found no image column .photo. among 'img', 'label'"):
        run("--image_column_name", "photo")
    with pytest.raises(ValueError, match="Found no label column .kind. among 'img', 'label'"):
        run("--label_column_name", "kind")
    with pytest.raises(ValueError, match="sets 'hiden_size', which ViTConfig does not have; it has .*hidden_size"):
        run("--config_overrides", "hiden_size=8")
