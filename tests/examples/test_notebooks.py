"""
The notebooks run, word for word but for the cell of parameters.

Models and data sets of the Hub are folders of the same names in the working directory, with tiny content.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from architectures import build
from datasets import Dataset, Features, Image, Value
from hub_server import TOKEN, HubServer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"
WORDS = [f"w{i}" for i in range(90)]

pytestmark = pytest.mark.slow


def cells(name):
    """Source and tags of the code cells."""
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    return [
        ("".join(cell["source"]), cell["metadata"].get("tags", []))
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


def script(name, parameters):
    """The cells as a script. `!smartfrz ...`, a command of the shell in Jupyter, runs in the same process."""
    parts = ["import shlex", "from smartfrz_hf.cli import app"]
    for source, tags in cells(name):
        call = r"app(shlex.split(f'\1'), standalone_mode=False)"
        parts.append(re.sub(r"^!smartfrz (.*)$", call, source, flags=re.MULTILINE))
        if "parameters" in tags:
            parts.append(parameters)
    return "\n".join(parts)


def run(name, folder, parameters="", **environment):
    environment["HF_HOME"] = str(folder / "home")
    done = subprocess.run(
        [sys.executable, "-c", script(name, parameters)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_parquet(folder, splits, config=None):
    """A data set with its splits, in a folder that `load_dataset` takes for the one of the Hub."""
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        rows.to_parquet(folder / f"{split}.parquet")
    files = "".join(f"\n  - split: {split}\n    path: {split}.parquet" for split in splits)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config or 'default'}\n  data_files:{files}\n---\n"
    )


def pictures(count):
    import io

    from PIL import Image as Picture

    def encoded(pixels):
        buffer = io.BytesIO()
        Picture.fromarray(pixels).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    pixels = np.random.default_rng(0).integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)
    rows = {"img": [encoded(p) for p in pixels], "label": [int(p.mean() > 127) for p in pixels]}
    return Dataset.from_dict(rows, features=Features({"img": Image(), "label": Value("int64")}))


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_clean(path):
    """No outputs, short, and the code parses."""
    notebook = json.loads(path.read_text())
    assert len(notebook["cells"]) <= 12
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert sum("parameters" in tags for _, tags in cells(path.stem)) == 1
    ast.parse(script(path.stem, ""))
    assert path.name in (NOTEBOOKS.parent / "README.md").read_text()


def test_text_classification(tmp_path):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    model = tmp_path / "google-bert" / "bert-base-uncased"
    build("bert").save_pretrained(model)
    tokenizer.save_pretrained(model)
    sentences = [" ".join(WORDS[i : i + 5]) for i in range(80)]
    rows = Dataset.from_dict(
        {"sentence1": sentences, "sentence2": sentences[::-1], "label": [i % 2 for i in range(80)]}
    )
    write_parquet(tmp_path / "nyu-mll" / "glue", {"train": rows, "validation": rows}, "mrpc")
    printed = run("text_classification", tmp_path, "epochs = 10")
    assert "frozen now" in printed and (tmp_path / "report.html").stat().st_size > 10_000


def test_image_classification(tmp_path):
    model = tmp_path / "google" / "vit-base-patch16-224-in21k"
    build("vit").vit.save_pretrained(model)  # without a head, as on the Hub
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(model)
    write_parquet(tmp_path / "uoft-cs" / "cifar10", {"train": pictures(64), "test": pictures(8)})
    printed = run("image_classification", tmp_path, "train_rows, eval_rows, epochs = 64, 8, 4")
    assert "rows found in the cache" in printed and (tmp_path / "timeline.png").is_file()


def test_sentence_encoder(tmp_path, minilm_dir):
    (tmp_path / "sentence-transformers").mkdir()
    (tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2").symlink_to(minilm_dir)
    sentences = [" ".join(WORDS[i : i + 3]) for i in range(12)]
    columns = {"sentence1": sentences, "sentence2": sentences[::-1], "score": [i / 12 for i in range(12)]}
    rows = Dataset.from_dict(columns)
    write_parquet(tmp_path / "sentence-transformers" / "stsb", {"train": rows, "validation": rows})
    assert "after:" in run("sentence_encoder", tmp_path, "epochs, batch_size = 2, 4")


def test_your_own_predictor(tmp_path):
    for data in ("cifar10", "fashion_mnist"):
        write_parquet(tmp_path / "data" / data, {"train": pictures(96), "test": pictures(96)})
    parameters = (
        'common |= {"train_rows": 64, "epochs": 10, "batch_size": 16, "learning_rate": 3e-3}\n'
        'vit = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}\n'
        'resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}\n'
        'vit |= {"image_size": 32, "patch_size": 8}\n'
        'kinds = (("vit", vit, "cifar10"), ("resnet", resnet, "fashion_mnist"))\n'
        'runs = [{"name": name, "model": name, "config": config, "data": data, **common} for name, config, data in kinds]\n'
        'repo, harvest_options, evaluate_options = "me/mine", "--data-dir data", "--epochs 2 --label cka-0.98"'
    )
    with HubServer() as server:
        environment = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        printed = run("your_own_predictor", tmp_path, parameters, HF_HUB_OFFLINE="0", **environment)
        assert "me/mine" in server.repos
    assert "balanced" in printed
