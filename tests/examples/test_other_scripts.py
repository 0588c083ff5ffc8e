"""The scripts for language models, summaries, speech and sentence encoders, run in small form."""

from importlib import import_module

import numpy as np
import pandas as pd
import pytest
from example_scripts import FREEZE_TWO, TRAIN, read_json
from scipy.io import wavfile
from trainers import bert, llama, saved, sentences
from transformers import BertModel

# TRL sets an argument by the name that it had before Transformers 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
OPTIONS = ["--do_eval", "--report_to", "none", "--disable_tqdm", "true", *TRAIN, *FREEZE_TWO]


@pytest.fixture
def script(examples):
    """Runs a script, and returns the results that it wrote."""

    def run(name, folder, *words):
        import_module(name).main([*words, *OPTIONS, "--output_dir", str(folder / "out")])
        results = read_json(folder, "out", "all_results.json")
        assert results["freeze/depth"] == 2 and 0 < results["freeze/compute_saved"] < 1
        return results

    return run


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    return saved(llama(), tmp_path_factory.mktemp("llama"))


def files(folder, table):
    table.to_json(folder / "data.jsonl", orient="records", lines=True)
    return ["--train_file", str(folder / "data.jsonl"), "--validation_file", str(folder / "data.jsonl")]


def test_run_clm(script, llama_folder, tmp_path):
    data = files(tmp_path, pd.DataFrame({"text": sentences()["first"]}))
    results = script("run_clm", tmp_path, "--model_name_or_path", llama_folder, "--block_size", "16", *data)
    assert results["eval_perplexity"] == pytest.approx(np.exp(results["eval_loss"]))
    assert list(read_json(tmp_path, "out", "freeze_steps.json")) == ["stem", "model.layers.0"]


def test_run_summarization(script, llama_folder, tmp_path):
    data = files(tmp_path, sentences().rename(columns={"first": "text", "second": "summary"}))
    sizes = "d_model=16,d_kv=8,d_ff=32,num_layers=2,num_heads=2"
    words = [
        "--tokenizer_name",
        llama_folder,
        "--config_overrides",
        sizes,
        "--predict_with_generate",
        "--max_eval_samples",
    ]
    results = script("run_summarization", tmp_path, *words, "4", "--max_target_length", "8", *data)
    assert 0 <= results["eval_rouge1"] <= 1
    assert list(read_json(tmp_path, "out", "freeze_steps.json")) == ["stem", "encoder.block.0"]


def test_run_speech_classification(script, tmp_path):
    noise = np.random.default_rng(0)
    for i in range(20):  # a low tone or a high one, at 8 kHz in two channels
        wave = np.sin(np.arange(2000) * (0.1, 0.8)[i % 2]) + 0.1 * noise.standard_normal(2000)
        (tmp_path / "data" / ("low", "high")[i % 2]).mkdir(parents=True, exist_ok=True)
        sound = np.stack([wave, wave], axis=1) * 2**14
        wavfile.write(tmp_path / "data" / ("low", "high")[i % 2] / f"{i}.wav", 8000, sound.astype(np.int16))
    sizes = "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=32"
    convolutions = "conv_dim=[16,16],conv_kernel=[10,8],conv_stride=[8,8],num_conv_pos_embeddings=16"
    words = ["--train_dir", str(tmp_path / "data"), "--config_overrides"]
    results = script(
        "run_speech_classification", tmp_path, *words, f"{sizes},{convolutions},num_conv_pos_embedding_groups=4"
    )
    assert 0 <= results["eval_accuracy"] <= 1 and results["train_samples"] == 16
    assert list(read_json(tmp_path, "out", "freeze_steps.json")) == ["stem", "wav2vec2.encoder.layers.0"]


def test_train_sentence_encoder(script, tmp_path):
    data = files(tmp_path, sentences())
    columns = ["--first_column", "first", "--second_column", "second", "--score_column", "score"]
    words = ["--model_name_or_path", saved(bert(BertModel), tmp_path), *columns]
    results = script("train_sentence_encoder", tmp_path, *words, *data)
    assert -1 <= results["eval_dev_spearman_cosine"] <= 1


@pytest.mark.parametrize("lora", ["0", "4"])
def test_run_sft(script, llama_folder, tmp_path, lora):
    table = sentences().rename(columns={"first": "prompt", "second": "completion"}).drop(columns="score")
    words = ["--model_name_or_path", llama_folder, "--bf16", "false", "--max_length", "32", "--lora_r", lora]
    results = script("run_sft", tmp_path, *words, *files(tmp_path, table))
    assert np.isfinite(results["eval_loss"])


def test_what_is_missing_is_told(script, llama_folder, tmp_path):
    with pytest.raises(ValueError, match="No data: pass --train_file"):
        script("run_clm", tmp_path, "--model_name_or_path", llama_folder)
    with pytest.raises(ValueError, match="has no column 'text'"):
        script("run_clm", tmp_path, "--model_name_or_path", llama_folder, *files(tmp_path, sentences()))
    with pytest.raises(ValueError, match="No model: pass --model_name_or_path"):
        script(
            "run_summarization",
            tmp_path,
            *files(tmp_path, sentences().rename(columns={"first": "text", "second": "summary"})),
        )
    with pytest.raises(ValueError, match=r"no \.wav files"):
        script("run_speech_classification", tmp_path, "--train_dir", str(tmp_path))
