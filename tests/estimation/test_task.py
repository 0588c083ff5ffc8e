"""`smartfrz estimate`: models and data in local folders, and what it says where it cannot work."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging
from typer.testing import CliRunner

from smartfrz_hf.cli import app
from smartfrz_hf.estimation.task import task_trainer

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "mat", "far", "away", "good", "bad"]


@pytest.fixture(autouse=True)
def quiet_for_the_command_only():
    """The command silences Transformers, and runs in the process of the tests here."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


def save_tokenizer(folder):
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(vocab_size=20, **sizes)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def sentence(number):
    return " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 7))


def write_table(file, columns, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(columns), *(",".join(map(str, row)) for row in rows)]
    file.write_text("\n".join(lines) + "\n")


def run(*words):
    options = [f"--{key}={value}" for key, value in {"epochs": 4, "batch_size": 4, "seconds": 1}.items()]
    return CliRunner().invoke(app, ["estimate", *map(str, words), *options])


def test_a_folder_of_data(bert, tmp_path):
    rows = [(sentence(i), sentence(i + 3), i % 3) for i in range(60)]
    write_table(tmp_path / "mrpc" / "train.csv", ("sentence1", "sentence2", "label"), rows)
    write_table(tmp_path / "mrpc" / "validation.csv", ("sentence1", "sentence2", "label"), rows[:4])
    done = run("--model", bert, "--task", "mrpc", "--data_dir", tmp_path)
    assert done.exit_code == 0, done.output
    assert "BertForSequenceClassification: 4 units" in done.output
    assert "60 steps of 4 rows, 4 epochs of 60 rows" in done.output
    assert "Does it pay? No: the model's blocks are as a library initializes them." in done.output
    done = run("--model", bert, "--task", tmp_path / "mrpc", "--train_rows", 40)
    assert "40 steps of 4 rows, 4 epochs of 40 rows" in done.output


def test_floats_are_scored_and_words_are_classes(bert, tmp_path):
    write_table(tmp_path / "scores.csv", ("text", "label"), [(sentence(i), i / 7) for i in range(8)])
    write_table(tmp_path / "words.csv", ("text", "label"), [(sentence(i), ("a", "b", "c")[i % 3]) for i in range(8)])
    options = {"output_dir": tmp_path / "out", "use_cpu": True, "report_to": "none"}
    trainer, rows = task_trainer(str(bert), str(tmp_path / "scores.csv"), **options)
    assert (trainer.model.config.num_labels, rows) == (1, 8)
    assert sorted(trainer.train_dataset["labels"]) == pytest.approx([i / 7 for i in range(8)])
    trainer, _ = task_trainer(str(bert), str(tmp_path / "words.csv"), **options)
    assert trainer.model.config.num_labels == 3 and set(trainer.train_dataset["labels"]) == {0, 1, 2}


def test_texts_without_labels_train_a_language_model(tmp_path):
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(vocab_size=20, **sizes)).save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2")
    (tmp_path / "texts.txt").write_text("\n".join(map(sentence, range(50))) + "\n")
    done = run("--model", tmp_path / "gpt2", "--task", tmp_path / "texts.txt")
    assert done.exit_code == 0 and "GPT2LMHeadModel: 4 units" in done.output, done.output


@pytest.mark.slow
def test_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = ViTConfig(image_size=16, patch_size=8, **sizes)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    datasets = pytest.importorskip("datasets")
    pictures = [image.new("RGB", (20, 20), (i, 2 * i, 3 * i)) for i in range(40)]
    data = datasets.Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(40)]})
    data.to_parquet(tmp_path / "pictures" / "train.parquet")
    done = run("--model", tmp_path / "vit", "--task", tmp_path / "pictures")
    assert done.exit_code == 0 and "ViTForImageClassification: 4 units" in done.output, done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "mrpc", "--data_dir", "{folder}"], "There is no mrpc in {folder}"),
        (["--task", "no/such-data"], "The data no/such-data cannot be loaded from the Hub"),
        (["--task", "{folder}"], "{folder} holds no file of training data"),
        (["--task", "{folder}/../numbers.csv"], "has no column of texts or images, but x, label"),
        (["--task", "mrpc", "--operating-point", "bold"], "`operating_point` is 'bold'"),
        (["--task", "mrpc", "--data_dir", "{folder}"], "not found: {folder}/mrpc, {folder}/glue/mrpc."),
        (["--task", "no/such-data"], "(OfflineModeIsEnabled). Check the name"),
        (["--task", "nofile.csv"], "There is no file or folder nofile.csv."),
        (["--task", "./nowhere"], "There is no file or folder ./nowhere."),
        (["--task", "{folder}/../nothing.csv"], "The data in {folder}/../nothing.csv is empty."),
        (["--task", "{folder}/../nothing.txt"], "The data in {folder}/../nothing.txt is empty."),
        (["--task", "{folder}/../header.csv"], "The data in {folder}/../header.csv has no rows."),
        (["--task", "{folder}/../blank.jsonl"], "The data in {folder}/../blank.jsonl has no rows."),
        (["--task", "{folder}/../broken.json"], "in row 1. Mend the file"),
        (
            ["--task", "{folder}/../same.csv"],
            "The 8 rows of {folder}/../same.csv have only one class in column `label`.",
        ),
        (
            ["--task", "{folder}/../yes.csv"],
            "The 8 rows of {folder}/../yes.csv have only one class in column `label`.",
        ),
        (["--task", "{folder}/../broken.json"], "broken.json cannot be read"),
        (["--task", "{folder}/../gaps.csv"], "2 of 8 rows of {folder}/../gaps.csv have no `label`"),
        (["--task", "{folder}/../silent.csv"], "1 of 8 rows of {folder}/../silent.csv have no `text`"),
    ],
)
def test_what_cannot_work(bert, tmp_path, words, said):
    folder = tmp_path / "empty"
    folder.mkdir()
    write_table(tmp_path / "numbers.csv", ("x", "label"), [(i, i % 2) for i in range(8)])
    write_table(tmp_path / "gaps.csv", ("text", "label"), [(sentence(i), i % 2 if i > 1 else "") for i in range(8)])
    write_table(tmp_path / "silent.csv", ("text", "label"), [(sentence(i) if i else "", i % 2) for i in range(8)])
    write_table(tmp_path / "header.csv", ("text", "label"), [])
    write_table(tmp_path / "same.csv", ("text", "label"), [(sentence(i), 0) for i in range(8)])
    write_table(tmp_path / "yes.csv", ("text", "label"), [(sentence(i), "yes") for i in range(8)])
    for name, content in {"nothing.csv": "", "nothing.txt": "", "blank.jsonl": "\n"}.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "broken.json").write_text('{"text": "a", "label": 0}\n{"text": \n')
    done = run("--model", bert, *(word.format(folder=folder) for word in words))
    assert done.exit_code != 0 and said.format(folder=folder) in " ".join(done.output.split()).replace("│ ", ""), (
        done.output
    )


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("/nonexist", "There is no folder /nonexist with a model."),
        ("../nonexist", "There is no folder ../nonexist with a model."),
        ("{folder}", "The folder {folder} holds no model: it has no config.json"),
    ],
)
def test_a_folder_without_a_model_is_told_before_the_data_is_read(tmp_path, model, said):
    done = run("--model", model.format(folder=tmp_path), "--task", "nofile.csv")
    assert done.exit_code == 1 and done.output.startswith(said.format(folder=tmp_path)), done.output


def test_numbers_are_classes_whatever_they_begin_with(bert, tmp_path):
    write_table(tmp_path / "signs.csv", ("text", "label"), [(sentence(i), i % 2 * 2 - 1) for i in range(8)])
    options = {"output_dir": tmp_path / "out", "use_cpu": True, "report_to": "none"}
    trainer, _ = task_trainer(str(bert), str(tmp_path / "signs.csv"), **options)
    assert trainer.model.config.num_labels == 2 and set(trainer.train_dataset["labels"]) == {0, 1}
