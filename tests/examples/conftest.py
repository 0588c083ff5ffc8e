"""What the tests of the example scripts share: the scripts, a tiny model and tiny data."""

import logging
from importlib import import_module

import datasets
import evaluate
import pytest
import torch
import transformers
from example_scripts import EXAMPLES, pairs, write_pictures
from transformers import AutoTokenizer, BertConfig, BertModel


@pytest.fixture(scope="session")
def datasets_cache(tmp_path_factory):
    """One cache of Datasets for all tests: what one has prepared, the others need not."""
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture
def examples(monkeypatch, datasets_cache):
    """
    Makes the scripts importable, spares the search for metrics on the Hub, and undoes what the scripts do to logging.
    """

    def unreachable(*args, **kwargs):
        raise FileNotFoundError("no Hub")

    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(evaluate, "load", unreachable)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", datasets_cache)
    names = ("__main__", "common", "text_classification", "smartfrz_hf")
    levels = {name: logging.getLogger(name).level for name in names}
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
    return import_module("run_glue")


@pytest.fixture
def run_glue_no_trainer(examples):
    return import_module("run_glue_no_trainer")


@pytest.fixture
def run_image_classification(examples):
    return import_module("run_image_classification")


def save_bert(folder, tokenizer, dropout: float) -> str:
    """Save a random BERT of 3 blocks without a head, and its tokenizer."""
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(minilm_dir):
    return AutoTokenizer.from_pretrained(minilm_dir)


@pytest.fixture(scope="session")
def bert(tokenizer, tmp_path_factory) -> str:
    """Folder of a tiny random BERT without dropout."""
    return save_bert(tmp_path_factory.mktemp("bert"), tokenizer, dropout=0.0)


@pytest.fixture(scope="session")
def bert_with_dropout(tokenizer, tmp_path_factory) -> str:
    """Folder of a tiny random BERT with dropout."""
    return save_bert(tmp_path_factory.mktemp("bert_with_dropout"), tokenizer, dropout=0.1)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Folder with the splits of a tiny MRPC; the test split has no labels."""
    folder = tmp_path_factory.mktemp("texts")
    pairs().to_parquet(folder / "train.parquet")
    pairs(10).to_parquet(folder / "validation.parquet")
    pairs(5).drop(columns="label").to_parquet(folder / "test.parquet")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Folder with the splits of a tiny CIFAR-10."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder / "train.parquet")
    write_pictures(folder / "validation.parquet", 9)
    return folder
