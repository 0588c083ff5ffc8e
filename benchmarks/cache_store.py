"""
Bytes per second of the activation store: in memory, on disk through LMDB, and on disk in one arena file of our own.

`make bench-step`. The arena is the simplest that could do: rows one after the other in one file, with the same checksum, read
with `pread`; it cannot replace or free a row. Disk figures are those of the page cache where memory allows.
"""

import argparse
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import xxhash
from tqdm.auto import tqdm

from smartfrz_hf.activation_cache import ActivationStore

ROOT = Path(__file__).parents[1]
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
                raise OSError("a row was damaged")
            rows.append((1, torch.frombuffer(blob, dtype=torch.float32).view(self.shape)))
        return rows

    def close(self) -> None:
        os.close(self.file)


def bandwidth(store, shape: Sequence[int], count: int) -> dict[str, float]:
    """Bytes per second of batches of rows, written in order and read at random."""
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="where the files are written; that for temporary files when not given")
    parser.add_argument("--megabytes", type=int, default=512, help="of rows in each store")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "cache_store.json", help="results file"
    )
    options = parser.parse_args()
    found: dict[str, dict] = {}
    for name, shape in tqdm(SHAPES.items(), desc="shapes"):
        size = 4 * torch.Size(shape).numel()
        count = max(BATCH * 8, options.megabytes * 2**20 // size // BATCH * BATCH)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            stores = {
                "memory": ActivationStore(2**40),
                "lmdb": ActivationStore(0, 2 * count * (size + 2**13), folder),
                "arena": Arena(folder, shape),
            }
            found[name] = {tier: bandwidth(store, shape, count) for tier, store in stores.items()}
    result = {
        "bytes_per_second": found,
        "versions": {name: version(name) for name in ("torch", "lmdb", "xxhash")},
        "machine": {"architecture": platform.machine(), "python": platform.python_version()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
