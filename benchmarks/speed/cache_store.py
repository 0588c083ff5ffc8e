"""
How many bytes per second does the activation store write and read? `make bench-step`.

Compares memory, LMDB, and a plain arena file: rows one after the other in one file, with the same checksum, read with `pread`.
The arena cannot replace or free a row. Disk figures are those of the page cache where memory allows.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
import xxhash
from tqdm.auto import tqdm

from benchmarks.utils import provenance, write_json
from smartfrz_hf.activation_cache import ActivationStore

RESULTS = Path(__file__).parent / "results" / "cache_store.json"
BATCH = 32
SHAPES = {"64x384": (64, 384), "197x768": (197, 768), "16x64": (16, 64)}


class Arena:
    """Rows of one shape in one file."""

    def __init__(self, folder: str, shape: Sequence[int]):
        self.shape, self.size, self.places = shape, 4 * torch.Size(shape).numel(), {}
        self.file = os.open(os.path.join(folder, "arena"), os.O_RDWR | os.O_CREAT)

    def put(self, keys: Sequence[bytes], depth: int, rows: torch.Tensor) -> None:
        for key, row in zip(keys, rows, strict=True):
            view = row.contiguous().view(-1).numpy().view("u1").data
            place = self.places.setdefault(key, (len(self.places) * self.size, xxhash.xxh3_64_digest(view)))
            os.pwrite(self.file, view, place[0])

    def get(self, keys: Sequence[bytes]) -> list[tuple[int, torch.Tensor]]:
        rows = []
        for key in keys:
            start, checksum = self.places[key]
            blob = bytearray(self.size)
            os.preadv(self.file, [blob], start)
            if xxhash.xxh3_64_digest(blob) != checksum:
                raise OSError("The checksum of a row does not match.")
            rows.append((1, torch.frombuffer(blob, dtype=torch.float32).view(self.shape)))
        return rows

    def close(self) -> None:
        os.close(self.file)


def bandwidth(store, shape: Sequence[int], count: int) -> dict[str, float]:
    """Bytes per second for batches of rows, written in order and read in random order."""
    keys = [key.to_bytes(16, "little") for key in range(count)]
    batch = torch.randn(BATCH, *shape)
    write, read = [], []
    for start in range(0, count, BATCH):
        began = time.perf_counter()
        store.put(keys[start : start + BATCH], 1, batch)
        write.append(time.perf_counter() - began)
    random.Random(0).shuffle(keys)
    whole = torch.empty_like(batch)
    for start in range(0, count, BATCH):
        began = time.perf_counter()
        for place, (_, row) in enumerate(store.get(keys[start : start + BATCH])):
            whole[place] = row
        read.append(time.perf_counter() - began)
    store.close()
    return {"write": batch.nbytes / median(write), "read": batch.nbytes / median(read)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="folder for the files; default: the one for temporary files")
    parser.add_argument("--megabytes", type=int, default=512, help="size of the rows in each store")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")
    options = parser.parse_args()
    by_shape: dict[str, dict] = {}
    for name, shape in tqdm(SHAPES.items(), desc="shapes"):
        size = 4 * torch.Size(shape).numel()
        count = max(BATCH * 8, options.megabytes * 2**20 // size // BATCH * BATCH)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            stores = {
                "memory": ActivationStore(2**40),
                "lmdb": ActivationStore(0, 2 * count * (size + 2**13), folder),
                "arena": Arena(folder, shape),
            }
            by_shape[name] = {tier: bandwidth(store, shape, count) for tier, store in stores.items()}
    write_json(options.out, {"bytes_per_second": by_shape} | provenance("torch", "lmdb", "xxhash"))
    print(json.dumps(by_shape, indent=2))


if __name__ == "__main__":
    main()
