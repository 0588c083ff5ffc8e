"""`run_glue.py`, run on tiny texts and tiny random models."""

import json
import logging
import math
import sys

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from example_scripts import FREEZE_TWO, TRAIN, pairs, read_json, run_script
from transformers import AutoConfig
from versions import accumulates


def test_trains_evaluates_and_predicts(run_glue, bert, texts, tmp_path, caplog):
    files = [
        word for split in ("train", "validation", "test") for word in (f"--{split}_file", f"{texts}/{split}.parquet")
    ]
    task = [
        "--model_name_or_path",
        bert,
        "--task_name",
        "MRPC",
        "--do_eval",
        "--do_predict",
        "--max_train_samples",
        "16",
    ]
    with caplog.at_level(logging.INFO):
        run_glue.main([*task, *files, *TRAIN, *FREEZE_TWO, "--output_dir", str(tmp_path)])
    assert read_json(tmp_path, "freeze_steps.json") == {"stem": 0, "bert.encoder.layer.0": 0}
    results = read_json(tmp_path, "all_results.json")
    assert results["freeze/depth"] == 2
    assert 0 < results["freeze/compute_saved"] < 1
    assert results["train_samples"] == 16
    assert results["eval_combined_score"] == pytest.approx((results["eval_accuracy"] + results["eval_f1"]) / 2)
    assert len((tmp_path / "predict_results_mrpc.txt").read_text().splitlines()) == 1 + 5
    assert "Freeze timeline of 2 steps: stem at 0, bert.encoder.layer.0 at 0;" in caplog.text
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "README.md").exists()


@pytest.mark.slow
def test_command_line(bert, texts, datasets_cache, tmp_path):
    words = ["--model_name_or_path", bert, "--train_file", f"{texts}/train.parquet", "--output_dir", str(tmp_path)]
    printed = run_script("run_glue.py", [*words, "--max_steps", "1", *TRAIN, *FREEZE_TWO], datasets_cache)
    assert "Freeze timeline of 1 steps: stem at 0, bert.encoder.layer.0 at 0;" in printed
    assert printed.count("Metrics: ") == 1


def test_json_config_with_named_labels_in_csv(run_glue, bert, tmp_path):
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
        "smartfrz_policy": "never",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    run_glue.main([str(tmp_path / "config.json")])
    assert read_json(tmp_path, "out", "freeze_steps.json") == {}
    assert "eval_accuracy" in read_json(tmp_path, "out", "all_results.json")
    assert AutoConfig.from_pretrained(tmp_path / "out").label2id == {"no": 0, "yes": 1}


def test_regression(run_glue, bert, tmp_path):
    table = pairs().assign(label=lambda t: np.linspace(0, 5, len(t)))
    table.to_json(tmp_path / "train.jsonl", orient="records", lines=True)
    data = ["--train_file", str(tmp_path / "train.jsonl"), "--validation_file", str(tmp_path / "train.jsonl")]
    model = ["--model_name_or_path", bert, "--do_eval", "--pad_to_max_length", "--max_seq_length", "16"]
    run_glue.main([*data, *model, *TRAIN, *FREEZE_TWO, "--output_dir", str(tmp_path / "out")])
    assert math.isfinite(read_json(tmp_path, "out", "all_results.json")["eval_mse"])
    assert AutoConfig.from_pretrained(tmp_path / "out").num_labels == 1


def test_resumes_from_last_checkpoint(run_glue, bert, texts, tmp_path, caplog):
    common = ["--model_name_or_path", bert, "--train_file", f"{texts}/train.parquet", *TRAIN, *FREEZE_TWO]
    common += ["--output_dir", str(tmp_path / "out"), "--save_steps", "2"]
    run_glue.main([*common, "--max_steps", "2"])
    with caplog.at_level(logging.INFO):
        run_glue.main([*common, "--max_steps", "3"])
    assert f"Resuming from {tmp_path / 'out' / 'checkpoint-2'}" in caplog.text
    assert read_json(tmp_path, "out", "trainer_state.json")["global_step"] == 3


@accumulates
def test_accumulating_gradients_leaves_them_as_large(run_glue, bert, texts, tmp_path):
    first_logs = []
    for batch, accumulated in ((8, 1), (2, 4)):
        out = tmp_path / f"out{batch}"
        data = ["--model_name_or_path", bert, "--train_file", f"{texts}/train.parquet"]
        batches = ["--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulated)]
        short = ["--max_steps", "1", "--logging_steps", "1", "--smartfrz_policy", "never", "--output_dir", str(out)]
        run_glue.main([*data, *TRAIN, *batches, *short])
        first_logs.append(read_json(out, "trainer_state.json")["log_history"][0])
    assert first_logs[1]["loss"] == pytest.approx(first_logs[0]["loss"], rel=1e-3)
    assert first_logs[1]["grad_norm"] == pytest.approx(first_logs[0]["grad_norm"], rel=1e-3)


def test_mnli_of_the_hub(run_glue, bert, tmp_path, monkeypatch):
    names = ["entailment", "neutral", "contradiction"]
    features = Features({"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=names)})

    def split(label):
        rows = pairs(9).rename(columns={"sentence1": "premise", "sentence2": "hypothesis"}).drop(columns="idx")
        rows["label"] = rows.index % 3 if label is None else label
        return Dataset.from_pandas(rows, features=features)

    hub = {"train": split(None)}
    for match in ("matched", "mismatched"):
        hub |= {f"validation_{match}": split(None), f"test_{match}": split(-1)}
    asked = []
    load = lambda *args, **kwargs: asked.append(args) or DatasetDict(hub)  # noqa: E731
    monkeypatch.setattr(sys.modules["text_classification"], "load_dataset", load)
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
def test_metrics_without_evaluate(run_glue, task, names):
    values = np.array([0, 1, 1, 0])
    assert sys.modules["text_classification"].glue_metrics(task, values, values) == {
        name: pytest.approx(1.0) for name in names
    }


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
def test_bad_arguments(run_glue, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_glue.main(["--model_name_or_path", "bert", *arguments])


def test_no_model(run_glue):
    with pytest.raises(ValueError, match="No model: pass --model_name_or_path"):
        run_glue.main(["--do_train", "--task_name", "cola"])


def test_bad_data(run_glue, bert, texts, tmp_path):
    pairs().assign(label=7).to_parquet(tmp_path / "other.parquet")
    pairs().drop(columns="label").to_parquet(tmp_path / "bare.parquet")

    def run(*arguments):
        run_glue.main(["--model_name_or_path", bert, "--use_cpu", "--output_dir", str(tmp_path / "out"), *arguments])

    train = ["--train_file", f"{texts}/train.parquet"]
    other, bare = (["--train_file", str(tmp_path / f"{name}.parquet")] for name in ("other", "bare"))
    with pytest.raises(ValueError, match="--do_eval needs the split 'validation'"):
        run(*train, "--do_eval")
    with pytest.raises(ValueError, match="has no text column 'sentence'"):
        run(*train, "--do_train", "--task_name", "sst2")
    with pytest.raises(ValueError, match="has no column 'label'"):
        run(*bare, "--do_train")
    with pytest.raises(ValueError, match="does not know the label '7'; it knows '0', '1'"):
        run(*train, "--validation_file", other[1], "--do_eval")


def test_output_dir_with_files_but_no_checkpoint(run_glue, bert, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds files but no checkpoint"):
        run_glue.main(
            ["--model_name_or_path", bert, "--task_name", "cola", "--do_train", "--output_dir", str(tmp_path)]
        )
