"""The example scripts, run on tiny data and tiny random models."""

import dataclasses
import io
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pandas as pd
import pytest
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_VIT = "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=32,patch_size=8,image_size=16"
TINY_RESNET = "embedding_size=8,hidden_sizes=[8,16],depths=[1,1],layer_type=basic"
TRAIN = ["--do_train", "--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--use_cpu"]
FREEZE_TWO = ["--policy", "static", "--static_depth", "2"]


@pytest.fixture
def examples(monkeypatch, tmp_path):
    """
    Makes the scripts importable, keeps their caches in `tmp_path`, spares the search for metrics on the Hub, and undoes
    what the scripts do to logging.
    """

    def unreachable(*args, **kwargs):
        raise FileNotFoundError("no Hub")

    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(evaluate, "load", unreachable)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    levels = {name: logging.getLogger(name).level for name in ("common", "smartfrz_hf")}
    handlers = logging.getLogger("transformers").handlers
    formatters = [handler.formatter for handler in handlers]
    verbosities = transformers.utils.logging.get_verbosity(), datasets.utils.logging.get_verbosity()
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for handler, formatter in zip(handlers, formatters, strict=False):
        handler.setFormatter(formatter)
    transformers.utils.logging.set_verbosity(verbosities[0])
    datasets.utils.logging.set_verbosity(verbosities[1])


@pytest.fixture
def run_glue(examples):
    import run_glue

    return run_glue


@pytest.fixture
def run_image_classification(examples):
    import run_image_classification

    return run_image_classification


@pytest.fixture(scope="module")
def bert(minilm_dir, tmp_path_factory) -> str:
    """Folder of a random BERT of 3 blocks, without head and dropout, with a real tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def pairs(count: int = 24) -> pd.DataFrame:
    words = ["red", "green", "blue"]
    return pd.DataFrame(
        {
            "idx": range(count),
            "sentence1": [f"the {words[i % 3]} house" for i in range(count)],
            "sentence2": [f"a house in {words[i % 2]}" for i in range(count)],
            "label": [int(i % 3 == i % 2) for i in range(count)],
        }
    )


def picture(label: int) -> Image.Image:
    return Image.fromarray(np.full((16, 20, 3), (60 * label, 200 - 60 * label, 90), dtype=np.uint8))


def write_pictures(path: Path, count: int = 24) -> Path:
    """A parquet file like the Hub's `uoft-cs/cifar10`: structs of bytes, and labels that are plain numbers."""
    rows = []
    for index in range(count):
        buffer = io.BytesIO()
        picture(index % 3).save(buffer, format="PNG")
        rows.append({"img": {"bytes": buffer.getvalue(), "path": None}, "label": index % 3})
    pd.DataFrame(rows).to_parquet(path)
    return path


def run_script(name: str, args: list[str], tmp_path: Path) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *args],
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def read_json(*path: str | Path):
    return json.loads(Path(*path).read_text())


class TestRunGlue:
    def test_command_line(self, bert, tmp_path):
        pairs().to_parquet(tmp_path / "train.parquet")
        pairs(10).to_parquet(tmp_path / "validation.parquet")
        pairs(5).drop(columns="label").to_parquet(tmp_path / "test.parquet")
        out = tmp_path / "out"
        printed = run_script(
            "run_glue.py",
            [
                *("--model_name_or_path", bert, "--task_name", "MRPC", "--output_dir", str(out)),
                *("--train_file", str(tmp_path / "train.parquet")),
                *("--validation_file", str(tmp_path / "validation.parquet")),
                *("--test_file", str(tmp_path / "test.parquet")),
                *("--do_eval", "--do_predict", "--max_train_samples", "16", *TRAIN, *FREEZE_TWO),
            ],
            tmp_path,
        )
        assert read_json(out, "freeze_steps.json") == {"stem": 0, "bert.encoder.layer.0": 0}
        results = read_json(out, "all_results.json")
        assert results["freeze/depth"] == 2
        assert 0 < results["freeze/compute_saved"] < 1
        assert results["train_samples"] == 16
        assert results["eval_combined_score"] == pytest.approx((results["eval_accuracy"] + results["eval_f1"]) / 2)
        assert len((out / "predict_results_mrpc.txt").read_text().splitlines()) == 1 + 5
        assert "Freeze timeline of 2 steps: stem at 0, bert.encoder.layer.0 at 0;" in printed
        assert printed.count("Metrics: ") == 1
        assert (out / "model.safetensors").exists()
        assert (out / "README.md").exists()

    def test_json_config_with_named_labels_in_csv(self, run_glue, bert, tmp_path):
        table = pairs()[["sentence1", "label"]].replace({"label": {0: "no", 1: "yes"}})
        table.rename(columns={"sentence1": "text"}).to_csv(tmp_path / "train.csv", index=False)
        config = {
            "model_name_or_path": bert,
            "train_file": str(tmp_path / "train.csv"),
            "validation_file": str(tmp_path / "train.csv"),
            "output_dir": str(tmp_path / "out"),
            "do_train": True,
            "do_eval": True,
            "max_steps": 1,
            "use_cpu": True,
            "policy": "never",
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        run_glue.main([str(tmp_path / "config.json")])
        assert read_json(tmp_path, "out", "freeze_steps.json") == {}
        assert "eval_accuracy" in read_json(tmp_path, "out", "all_results.json")
        assert AutoConfig.from_pretrained(tmp_path / "out").label2id == {"no": 0, "yes": 1}

    def test_regression(self, run_glue, bert, tmp_path):
        table = pairs().assign(label=lambda t: np.linspace(0, 5, len(t)))
        table.to_json(tmp_path / "train.jsonl", orient="records", lines=True)
        data = ["--train_file", str(tmp_path / "train.jsonl"), "--validation_file", str(tmp_path / "train.jsonl")]
        model = ["--model_name_or_path", bert, "--do_eval", "--pad_to_max_length", "--max_seq_length", "16"]
        run_glue.main([*data, *model, *TRAIN, *FREEZE_TWO, "--output_dir", str(tmp_path / "out")])
        assert math.isfinite(read_json(tmp_path, "out", "all_results.json")["eval_mse"])
        assert AutoConfig.from_pretrained(tmp_path / "out").num_labels == 1

    def test_resumes_from_last_checkpoint(self, run_glue, bert, tmp_path, caplog):
        pairs().to_parquet(tmp_path / "train.parquet")
        common = ["--model_name_or_path", bert, "--train_file", str(tmp_path / "train.parquet"), *TRAIN, *FREEZE_TWO]
        common += ["--output_dir", str(tmp_path / "out"), "--save_steps", "2"]
        run_glue.main([*common, "--max_steps", "2"])
        with caplog.at_level(logging.INFO):
            run_glue.main([*common, "--max_steps", "3"])
        assert f"Resuming from {tmp_path / 'out' / 'checkpoint-2'}" in caplog.text
        assert read_json(tmp_path, "out", "trainer_state.json")["global_step"] == 3

    def test_accumulating_gradients_leaves_them_as_large(self, run_glue, bert, tmp_path):
        pairs().to_parquet(tmp_path / "train.parquet")
        first_logs = []
        for batch, accumulated in ((8, 1), (2, 4)):
            out = tmp_path / f"out{batch}"
            data = ["--model_name_or_path", bert, "--train_file", str(tmp_path / "train.parquet")]
            batches = ["--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulated)]
            short = ["--max_steps", "1", "--logging_steps", "1", "--policy", "never", "--output_dir", str(out)]
            run_glue.main([*data, *TRAIN, *batches, *short])
            first_logs.append(read_json(out, "trainer_state.json")["log_history"][0])
        assert first_logs[1]["loss"] == pytest.approx(first_logs[0]["loss"], rel=1e-3)
        assert first_logs[1]["grad_norm"] == pytest.approx(first_logs[0]["grad_norm"], rel=1e-3)

    def test_mnli_of_the_hub(self, run_glue, bert, tmp_path, monkeypatch):
        names = ["entailment", "neutral", "contradiction"]
        features = Features(
            {"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=names)}
        )

        def split(label):
            rows = pairs(9).rename(columns={"sentence1": "premise", "sentence2": "hypothesis"}).drop(columns="idx")
            rows["label"] = rows.index % 3 if label is None else label
            return Dataset.from_pandas(rows, features=features)

        hub = {"train": split(None)}
        for match in ("matched", "mismatched"):
            hub |= {f"validation_{match}": split(None), f"test_{match}": split(-1)}
        asked = []
        monkeypatch.setattr(run_glue, "load_dataset", lambda *args, **kwargs: asked.append(args) or DatasetDict(hub))
        arguments = ["--model_name_or_path", bert, "--task_name", "mnli", "--do_eval", "--do_predict"]
        arguments += ["--output_dir", str(tmp_path / "out"), *TRAIN, *FREEZE_TWO]
        run_glue.main(arguments)
        assert asked == [("nyu-mll/glue", "mnli")]
        results = read_json(tmp_path, "out", "all_results.json")
        assert {"eval_accuracy", "eval_mm_accuracy"} <= set(results)
        for match in ("matched", "mismatched"):
            lines = (tmp_path / "out" / f"predict_results_mnli_{match}.txt").read_text().splitlines()
            assert len(lines) == 1 + 9
            assert lines[1].split("\t")[1] in names

    @pytest.mark.parametrize(
        ("task", "names"),
        [
            ("cola", {"matthews_correlation"}),
            ("mrpc", {"accuracy", "f1"}),
            ("qqp", {"accuracy", "f1"}),
            ("sst2", {"accuracy"}),
            ("stsb", {"pearson", "spearmanr"}),
            (None, {"accuracy"}),
        ],
    )
    def test_metrics_without_evaluate(self, run_glue, task, names):
        values = np.array([0, 1, 1, 0])
        assert run_glue.glue_metrics(task, values, values) == {name: pytest.approx(1.0) for name in names}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--do_train"], "No data: pass --task_name"),
            (["--do_train", "--train_file", "a.xlsx"], "--train_file a.xlsx has the unknown extension '.xlsx'"),
            (["--do_train", "--task_name", "imdb"], "--task_name is 'imdb'; it must be one of 'cola'"),
            (["--do_train", "--task_name", "cola", "--dataset_name", "imdb"], "pass one of them"),
            (["--task_name", "cola"], "Nothing to do"),
        ],
    )
    def test_bad_arguments(self, run_glue, arguments, message):
        with pytest.raises(ValueError, match=message):
            run_glue.main(["--model_name_or_path", "bert", *arguments])

    def test_no_model(self, run_glue):
        with pytest.raises(ValueError, match="No model: pass --model_name_or_path"):
            run_glue.main(["--do_train", "--task_name", "cola"])

    def test_bad_data(self, run_glue, bert, tmp_path):
        pairs().to_parquet(tmp_path / "train.parquet")
        pairs().assign(label=7).to_parquet(tmp_path / "other.parquet")
        pairs().drop(columns="label").to_parquet(tmp_path / "bare.parquet")

        def run(*arguments):
            run_glue.main(
                ["--model_name_or_path", bert, "--use_cpu", "--output_dir", str(tmp_path / "out"), *arguments]
            )

        train, other, bare = (["--train_file", str(tmp_path / f"{n}.parquet")] for n in ("train", "other", "bare"))
        with pytest.raises(ValueError, match="--do_eval needs the split 'validation'"):
            run(*train, "--do_eval")
        with pytest.raises(ValueError, match="lacks the text column 'sentence'"):
            run(*train, "--do_train", "--task_name", "sst2")
        with pytest.raises(ValueError, match="lacks the column 'label'"):
            run(*bare, "--do_train")
        with pytest.raises(ValueError, match="The label '7' is not among the model's: '0', '1'"):
            run(*train, "--validation_file", other[1], "--do_eval")

    def test_output_dir_with_files_but_no_checkpoint(self, run_glue, bert, tmp_path):
        (tmp_path / "notes.txt").touch()
        with pytest.raises(ValueError, match="holds files but no checkpoint"):
            run_glue.main(
                ["--model_name_or_path", bert, "--task_name", "cola", "--do_train", "--output_dir", str(tmp_path)]
            )


class TestRunImageClassification:
    def test_command_line(self, tmp_path):
        out = tmp_path / "out"
        printed = run_script(
            "run_image_classification.py",
            [
                *("--model_type", "vit", "--config_overrides", TINY_VIT, "--output_dir", str(out)),
                *("--train_file", str(write_pictures(tmp_path / "train.parquet"))),
                *("--validation_file", str(write_pictures(tmp_path / "validation.parquet", 9))),
                *("--do_eval", "--max_train_samples", "16", *TRAIN, *FREEZE_TWO),
            ],
            tmp_path,
        )
        freeze_steps = read_json(out, "freeze_steps.json")
        assert len(freeze_steps) == 2
        assert set(freeze_steps.values()) == {0}
        results = read_json(out, "all_results.json")
        assert results["freeze/depth"] == 2
        assert 0 < results["freeze/compute_saved"] < 1
        assert (results["train_samples"], results["eval_samples"]) == (16, 9)
        assert 0 <= results["eval_accuracy"] <= 1
        assert "Freeze timeline of 2 steps: stem at 0" in printed
        config = AutoConfig.from_pretrained(out)
        assert (config.hidden_size, config.num_hidden_layers, config.num_labels) == (16, 3, 3)
        assert read_json(out, "preprocessor_config.json")["size"] == {"height": 16, "width": 16}

    def test_image_folders_then_its_own_model(self, run_image_classification, tmp_path):
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

    def test_data_set_of_the_hub(self, run_image_classification, tmp_path, monkeypatch):
        features = Features({"img": datasets.Image(), "fine_label": ClassLabel(names=["x", "y", "z"])})
        rows = {"img": [picture(i % 3) for i in range(12)], "fine_label": [i % 3 for i in range(12)]}
        hub = DatasetDict(train=Dataset.from_dict(rows, features), test=Dataset.from_dict(rows, features))
        monkeypatch.setattr(run_image_classification, "load_dataset", lambda *args, **kwargs: hub)
        model = ["--model_type", "vit", "--config_overrides", TINY_VIT, "--output_dir", str(tmp_path / "out")]
        data = ["--dataset_name", "some/set", "--eval_split_name", "test", "--do_eval", "--do_predict"]
        run_image_classification.main([*model, *data, *TRAIN, *FREEZE_TWO])
        results = read_json(tmp_path, "out", "all_results.json")
        assert (results["train_samples"], results["eval_samples"]) == (12, 12)

    def test_flips_only_when_asked(self, run_image_classification):
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
    def test_overrides(self, run_image_classification, text, overrides):
        assert run_image_classification.parse_overrides(text) == overrides

    @pytest.mark.parametrize("text", ["hidden_size", "128", "hidden_size=", "a=f(1)", "a=1) or dict(b=2", "**a"])
    def test_unreadable_overrides(self, run_image_classification, text):
        with pytest.raises(ValueError, match="--config_overrides is .* which cannot be read"):
            run_image_classification.parse_overrides(text)

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
    def test_bad_arguments(self, run_image_classification, arguments, message):
        with pytest.raises(ValueError, match=message):
            run_image_classification.main(["--do_train", *arguments])

    def test_bad_data(self, run_image_classification, tmp_path):
        train = [
            "--train_file",
            str(write_pictures(tmp_path / "train.parquet", 4)),
            "--output_dir",
            str(tmp_path / "o"),
        ]

        def run(*arguments):
            run_image_classification.main(["--model_type", "vit", "--do_train", "--use_cpu", *train, *arguments])

        with pytest.raises(ValueError, match="Found no image column .photo. among 'img', 'label'"):
            run("--image_column_name", "photo")
        with pytest.raises(ValueError, match="Found no label column .kind. among 'img', 'label'"):
            run("--label_column_name", "kind")
        with pytest.raises(ValueError, match="sets 'hiden_size', which ViTConfig does not have; it has .*hidden_size"):
            run("--config_overrides", "hiden_size=8")


def test_metrics_of_evaluate_come_first(examples, monkeypatch):
    from common import load_metric

    class Metric:
        def compute(self, predictions, references):
            return {"accuracy": 0.5}

    def fallback(predictions, references):
        return {"accuracy": 0.25}

    assert load_metric("accuracy", None, fallback, None)([1], [1]) == {"accuracy": 0.25}
    monkeypatch.setattr(evaluate, "load", lambda *args, **kwargs: Metric())
    assert load_metric("accuracy", None, fallback, None)([1], [1]) == {"accuracy": 0.5}


@pytest.mark.parametrize("script", ["run_glue", "run_image_classification"])
def test_every_option_is_explained(script, request):
    module = request.getfixturevalue(script)
    for arguments in (module.ModelArguments, module.DataTrainingArguments):
        for field in dataclasses.fields(arguments):
            assert field.metadata["help"].endswith("."), field.name


@pytest.mark.parametrize("script", ["run_glue", "run_image_classification"])
def test_help(script, request, capsys):
    with pytest.raises(SystemExit, match="0"):
        request.getfixturevalue(script).main(["--help"])
    printed = capsys.readouterr().out
    assert "--freeze_threshold" in printed
    assert "--max_train_samples" in printed
