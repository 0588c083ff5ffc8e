"""`run_glue_no_trainer.py`, run on tiny texts and tiny random models, and against `run_glue.py`."""

from pathlib import Path

import pytest
import torch
from example_scripts import FREEZE_TWO, pairs, read_json, run_script
from launching import RECIPES
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel
from versions import accumulates

LINEAR = ["--smartfrz_policy", "linear", "--smartfrz_linear_depth", "1.0"]
LINEAR += ["--smartfrz_first_decision", "3", "--smartfrz_decide_every", "2"]
LOOPS = [[], ["--no_accelerate"]]


@pytest.fixture(scope="module")
def words(texts, tmp_path_factory):
    """Command line of the data: 22 samples, so that the last batch and the last accumulation of an epoch are short."""
    folder = tmp_path_factory.mktemp("words")
    pairs(22).to_parquet(folder / "train.parquet")
    return [
        *("--train_file", str(folder / "train.parquet"), "--validation_file", f"{texts}/validation.parquet"),
        *("--task_name", "mrpc", "--use_cpu", "--num_train_epochs", "2", "--per_device_train_batch_size", "4"),
    ]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def run_trainer(run_glue, common, out):
    run_glue.main([*common, "--do_train", "--do_eval", "--optim", "adamw_torch", "--output_dir", str(out)])


@pytest.mark.parametrize(("accumulation", "cache"), [("1", "true"), pytest.param("2", "false", marks=accumulates)])
def test_trains_and_freezes_as_the_trainer_does(
    run_glue, run_glue_no_trainer, bert, words, tmp_path, accumulation, cache
):
    common = ["--model_name_or_path", bert, *words, *LINEAR, "--gradient_accumulation_steps", accumulation]
    common += ["--smartfrz_activation_cache", cache]
    run_trainer(run_glue, common, tmp_path / "trainer")
    steps, results = (read_json(tmp_path, "trainer", f"{name}.json") for name in ("freeze_steps", "all_results"))
    assert len(set(steps.values())) > 1
    for loop in LOOPS:
        out = tmp_path / "_".join(["loop", *loop])
        run_glue_no_trainer.main([*common, *loop, "--output_dir", str(out)])
        assert read_json(out, "freeze_steps.json") == steps
        # How long the activation cache stays on, and so what it saves, depends on the time that it takes.
        saved = ["freeze/compute_saved"] if cache == "false" else []
        for key in ("eval_accuracy", "eval_f1", "eval_combined_score", "freeze/depth", *saved):
            assert read_json(out, "all_results.json")[key] == results[key]
        assert_same_weights(out, tmp_path / "trainer")


@pytest.mark.parametrize("loop", LOOPS, ids=["accelerate", "plain"])
def test_resumes_exactly(run_glue_no_trainer, bert_with_dropout, words, tmp_path, loop):
    common = ["--model_name_or_path", bert_with_dropout, *words, *loop, *LINEAR, "--gradient_accumulation_steps", "2"]
    whole = tmp_path / "whole"
    run_glue_no_trainer.main([*common, "--checkpointing_steps", "1", "--output_dir", str(whole)])
    steps = read_json(whole, "freeze_steps.json")
    assert set(steps.values()) == {3, 5}
    for step in (2, 3, 5):  # before, at and after freezes; 3 is the end of an epoch
        rest = tmp_path / f"from_{step}"
        checkpoint = str(whole / f"step_{step}")
        run_glue_no_trainer.main([*common, "--resume_from_checkpoint", checkpoint, "--output_dir", str(rest)])
        assert read_json(rest, "freeze_steps.json") == steps
        assert_same_weights(whole, rest)


def test_resumes_after_an_epoch(run_glue_no_trainer, bert_with_dropout, words, tmp_path):
    common = ["--model_name_or_path", bert_with_dropout, *words, *FREEZE_TWO]
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    run_glue_no_trainer.main([*common, "--checkpointing_steps", "epoch", "--output_dir", str(whole)])
    assert read_json(whole, "epoch_0", "progress.json") == {"epoch": 1, "batches": 0, "steps": 6}
    resume = ["--resume_from_checkpoint", str(whole / "epoch_0")]
    run_glue_no_trainer.main([*common, *resume, "--output_dir", str(rest)])
    assert_same_weights(whole, rest)


def test_tracks_losses_and_freezing(run_glue_no_trainer, bert, words, tmp_path):
    tracking = ["--with_tracking", "--report_to", "tensorboard", "--output_dir", str(tmp_path)]
    run_glue_no_trainer.main(["--model_name_or_path", bert, *words, *FREEZE_TWO, *tracking])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "glue_no_trainer"))
    events.Reload()
    assert {"train_loss", "accuracy", "freeze/depth"} <= set(events.Tags()["scalars"])
    assert [scalar.value for scalar in events.Scalars("freeze/depth")] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No data: pass --task_name"),
        (["--train_file", "a.xlsx"], "--train_file a.xlsx has the unknown extension '.xlsx'"),
        (["--task_name", "imdb"], "--task_name is 'imdb'; it must be one of 'cola'"),
        (["--task_name", "cola", "--checkpointing_steps", "often"], "a number of steps, or 'epoch'"),
        (["--task_name", "cola", "--no_accelerate", "--with_tracking"], "without --no_accelerate"),
    ],
)
def test_bad_arguments(run_glue_no_trainer, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_glue_no_trainer.main(["--model_name_or_path", "bert", "--output_dir", "out", *arguments])


@pytest.mark.slow
def test_two_processes_train_as_one(bert, words, datasets_cache, tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(RECIPES / "ddp_cpu.yaml"))
    common = ["--model_name_or_path", bert, *words, *LINEAR, "--max_train_samples", "16", "--max_grad_norm", "1e9"]
    batch = common.index("--per_device_train_batch_size") + 1
    common[batch] = "2"
    run_script("run_glue_no_trainer.py", [*common, "--output_dir", str(tmp_path / "two")], datasets_cache, launcher)
    common[batch] = "4"
    run_script("run_glue_no_trainer.py", [*common, "--output_dir", str(tmp_path / "one")], datasets_cache)
    steps = read_json(tmp_path, "two", "freeze_steps.json")
    assert len(set(steps.values())) > 1
    assert steps == read_json(tmp_path, "one", "freeze_steps.json")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-5), name


@pytest.mark.slow
def test_predictor_decides_as_in_the_trainer(run_glue, run_glue_no_trainer, minilm_dir, tokenizer, texts, tmp_path):
    folder = tmp_path / "minilm"
    config = AutoConfig.from_pretrained(minilm_dir, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    AutoModel.from_pretrained(minilm_dir, config=config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pairs(96).to_parquet(tmp_path / "train.parquet")
    common = [
        *("--model_name_or_path", str(folder), "--task_name", "mrpc", "--use_cpu", "--num_train_epochs", "5"),
        *("--train_file", str(tmp_path / "train.parquet"), "--validation_file", f"{texts}/validation.parquet"),
        *("--smartfrz_operating_point", "aggressive", "--smartfrz_freeze_threshold", "0.8"),
    ]
    run_trainer(run_glue, common, tmp_path / "trainer")
    steps = read_json(tmp_path, "trainer", "freeze_steps.json")
    assert len(set(steps.values())) > 1
    for loop in LOOPS:
        out = tmp_path / "_".join(["loop", *loop])
        run_glue_no_trainer.main([*common, *loop, "--output_dir", str(out)])
        assert read_json(out, "freeze_steps.json") == steps
        assert_same_weights(out, tmp_path / "trainer")
