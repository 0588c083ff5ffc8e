"""The activation store: what was put comes back, within its budgets, whatever befalls the disk."""

import math
import os
import sys
import tempfile

import lmdb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import logging

from smartfrz_hf.activation_cache import memory_tier
from smartfrz_hf.activation_cache.memory_tier import DeviceTier
from smartfrz_hf.activation_cache.store import ActivationStore

PAGE = 4096
AMPLE = 2**24
TIERS = {"memory": {"memory_bytes": AMPLE}, "disk": {"memory_bytes": 0, "disk_bytes": AMPLE}}
CPU = torch.device("cpu")


def with_device(store, budget):
    """The store with a tier for an accelerator, which is the CPU here."""
    store._device = DeviceTier(CPU, budget)
    store._device.budget = budget
    return store


def keys(count, first=0):
    return [index.to_bytes(16, "big") for index in range(first, first + count)]


def assert_same(row, expected):
    assert row.dtype == expected.dtype and row.shape == expected.shape
    assert row.device.type == "cpu"
    # Bit for bit, NaN included.
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (row, expected))
    assert torch.equal(one, other)


@pytest.fixture(params=[*TIERS, "device"])
def store(request, tmp_path):
    if request.param == "device":
        store = with_device(ActivationStore(0), AMPLE)
    else:
        store = ActivationStore(**TIERS[request.param], folder=tmp_path)
    yield store
    store.close()


@pytest.mark.parametrize(
    "row",
    [
        torch.randn(3, 5),
        torch.randn(2, 4, 4, dtype=torch.float64),
        torch.randn(7).bfloat16(),
        torch.randn(7).half(),
        torch.tensor([math.nan, math.inf, -0.0]),
        torch.arange(6),
        torch.tensor([True, False]),
        torch.tensor(3.0),
        torch.empty(0, 4),
        torch.randn(4, 6).t(),
        torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last)[0],
        torch.randn(3, requires_grad=True),
    ],
    ids=lambda row: f"{row.dtype}{tuple(row.shape)}".removeprefix("torch."),
)
def test_gives_back_what_was_put(store, row):
    assert store.put(keys(1), 3, [row]) == 1
    [(depth, found)] = store.get(keys(1))
    assert depth == 3
    assert_same(found, row)


def test_unknown_keys_give_none(store):
    store.put(keys(1), 1, torch.ones(1, 2))
    assert store.get(keys(2))[1] is None
    assert store.fronts(keys(2)) == [1, None]
    assert len(store) == 1


def test_rows_are_copies(store):
    batch = torch.ones(2, 3)
    store.put(keys(2), 1, batch)
    batch.zero_()
    assert all(row.eq(1).all() for _, row in store.get(keys(2)))


def test_disk_takes_what_memory_cannot(tmp_path):
    batch = torch.randn(10, 700)  # too long for two of them to share a page
    store = ActivationStore(4 * 2800, 5 * PAGE, tmp_path)
    assert store.put(keys(10), 2, batch) == 7
    assert store.memory_used == 4 * 2800
    assert 3 * PAGE < store.disk_used <= 5 * PAGE
    found = store.get(keys(10))
    for row, expected in zip(found[:7], batch[:7], strict=True):
        assert_same(row[1], expected)
    assert found[7:] == [None] * 3
    assert store.trouble is None
    store.close()
    assert (len(store), store.memory_used, store.disk_used) == (0, 0, 0)


def test_memory_takes_what_the_accelerator_cannot(tmp_path):
    batch = torch.randn(10, 700)
    store = with_device(ActivationStore(3 * 2800, 9 * PAGE), 2 * 2800)
    assert store.put(keys(10), 2, batch) == 10
    assert (store.device_used, store.memory_used) == (2 * 2800, 3 * 2800) and store.disk_used > 0
    assert store.put(keys(10), 3, -batch) == 10  # each where it was
    assert (store.device_used, store.memory_used) == (2 * 2800, 3 * 2800)
    for (front, row), expected in zip(store.get(keys(10)), -batch, strict=True):
        assert front == 3
        assert_same(row, expected)
    store.close()
    assert (len(store), store.used, store.put(keys(2), 1, batch[:2])) == (0, 0, 0)


@pytest.mark.parametrize(("share", "budget"), [(0.25, 250), (1.0, 1), (400.0, 400), (5000.0, 1000), (0.0, 0)])
def test_the_accelerators_share_follows_what_is_free(monkeypatch, share, budget):
    """Rows that are there count as free, so that they do not crowd themselves out."""
    tier = DeviceTier(CPU, share)
    monkeypatch.setattr(memory_tier, "free_bytes", lambda device: 1000 - tier.used)
    tier.look()
    assert tier.budget == budget
    tier.used = budget
    tier.look()
    assert tier.budget == budget
    monkeypatch.setattr(memory_tier, "free_bytes", lambda device: 0)  # training takes the rest
    tier.look()
    assert tier.budget <= budget and not tier.has_room(1)


def test_a_batch_stays_on_its_accelerator_while_there_is_room(monkeypatch):
    """Here that is the device of tensors without values."""
    batch = torch.ones(4, 25, device="meta")  # 400 bytes
    monkeypatch.setattr(memory_tier, "free_bytes", lambda device: 1000)
    assert ActivationStore(AMPLE, device_memory=0.5).place_for(batch) == batch.device
    assert ActivationStore(AMPLE, device_memory=0.25).place_for(batch) == CPU
    assert ActivationStore(AMPLE).place_for(batch) == CPU
    store = ActivationStore(AMPLE, device_memory=0.5)
    assert store.place_for(batch) == batch.device
    store.close()
    assert store.place_for(batch) == CPU


def test_a_cpu_has_no_accelerator(tmp_path):
    store = ActivationStore(AMPLE, device_memory=0.5)
    assert store.place_for(torch.ones(2, 3)) == CPU and not store.device_used and memory_tier.free_bytes(CPU) == 0
    with pytest.raises(ValueError, match="`device_memory` is -1"):
        ActivationStore(AMPLE, device_memory=-1)


def test_no_budget_stores_nothing_and_makes_no_file(tmp_path):
    store = ActivationStore(0, 0, tmp_path)
    assert store.put(keys(2), 1, torch.ones(2, 3)) == 0
    assert store.get(keys(2)) == [None, None]
    assert not os.listdir(tmp_path)
    store.close()


@pytest.mark.parametrize(("before", "after"), [(100, 10), (100, 5000), (5000, 100), (10000, 20000)])
def test_replacing_frees_the_old_room(store, before, after):
    old, new = torch.randn(before), torch.randn(after)
    store.put(keys(1), 1, [new])
    used = store.memory_used, store.disk_used
    store.put(keys(1), 1, [old])
    store.put(keys(1), 2, [new])
    assert (store.memory_used, store.disk_used) == used
    [(depth, found)] = store.get(keys(1))
    assert depth == 2
    assert_same(found, new)
    assert len(store) == 1


def test_a_refused_row_leaves_the_one_before(tmp_path):
    store = ActivationStore(400, 2 * PAGE, tmp_path)
    rows = torch.randn(2, 100)
    store.put(keys(2), 1, rows)
    assert store.put(keys(2), 2, torch.randn(2, 2000)) == 0
    for (depth, row), expected in zip(store.get(keys(2)), rows, strict=True):
        assert depth == 1
        assert_same(row, expected)
    store.close()


ROWS = st.builds(
    lambda size, seed, dtype: torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.integers(1, 1200),
    st.integers(0, 9),
    st.sampled_from([torch.float32, torch.float16, torch.int64]),
)


@given(
    st.none() | st.integers(0, 12000),
    st.integers(0, 12000),
    st.integers(0, 8 * PAGE),
    st.lists(st.dictionaries(st.sampled_from(keys(8)), ROWS, max_size=8), max_size=12),
)
@settings(max_examples=40, deadline=None)
def test_behaves_like_a_dict_within_its_budgets(device_bytes, memory_bytes, disk_bytes, steps):
    with tempfile.TemporaryDirectory() as folder:
        store = ActivationStore(memory_bytes, disk_bytes, folder)
        if device_bytes is not None:
            with_device(store, device_bytes)
        model: dict[bytes, tuple[int, torch.Tensor]] = {}
        for front, rows in enumerate(steps, start=1):
            kept = store.put(list(rows), front, list(rows.values()))
            stored = [key for key, found in zip(rows, store.fronts(list(rows)), strict=True) if found == front]
            assert kept == len(stored)
            for key in rows:
                # Only a row that is bigger than the one before may be refused.
                assert key in stored or key not in model or rows[key].nbytes > model[key][1].nbytes
            model |= {key: (front, rows[key]) for key in stored}
            assert store.device_used <= (device_bytes or 0)
            assert store.memory_used <= memory_bytes and store.disk_used <= disk_bytes
            assert store.used == store.device_used + store.memory_used + store.disk_used
            assert len(store) == len(model)
            for key, found in zip(keys(8), store.get(keys(8)), strict=True):
                if key in model:
                    assert found is not None and found[0] == model[key][0]
                    assert_same(found[1], model[key][1])
                else:
                    assert found is None
        assert store.trouble is None
        store.close()
        assert not os.listdir(folder)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("given_dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_lossy_formats_stay_within_their_error(tmp_path, dtype, given_dtype, tier):
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(6, 64, generator=generator)
    row[:, 0] *= 50
    row[1] = 0
    row[2] *= 1e-3
    row = row.to(given_dtype)
    store = ActivationStore(**TIERS[tier], folder=tmp_path, dtype=dtype)
    store.put(keys(1), 1, [row])
    [(_, found)] = store.get(keys(1))
    assert found.dtype == given_dtype and found.shape == row.shape
    row, error = row.double(), (found.double() - row.double()).abs()
    # Half a step of the format, and of the dtype into which it is turned back.
    turned_back = row.abs() * torch.finfo(given_dtype).eps
    if dtype == "int8":
        assert (error <= 1.001 * row.abs().amax(-1, keepdim=True) / 254 + turned_back).all()
    else:
        smallest = torch.finfo(getattr(torch, dtype)).smallest_normal
        assert (error <= row.abs() * torch.finfo(getattr(torch, dtype)).eps / 2 + smallest).all()
    assert not found[1].any()
    store.close()


@pytest.mark.parametrize(("dtype", "bytes_each"), [("exact", 4 * 640), ("float16", 2 * 640), ("int8", 640 + 4 * 10)])
def test_budgets_count_stored_bytes(dtype, bytes_each):
    store = ActivationStore(3 * bytes_each, dtype=dtype)
    assert store.put(keys(4), 1, torch.randn(4, 10, 64)) == 3
    assert store.memory_used == 3 * bytes_each
    store.close()


@pytest.mark.parametrize(
    ("dtype", "row"),
    [
        ("float16", torch.tensor([1.0, 1e6])),
        ("bfloat16", torch.tensor([1.0, math.inf])),
        ("int8", torch.full((2, 64), math.nan)),
        ("int8", torch.full((2, 64), 1e300, dtype=torch.float64)),
        ("int8", torch.randn(64, 1)),
        ("int8", torch.arange(64)),
        ("float16", torch.randn(64).bfloat16()),
    ],
)
def test_rows_that_a_format_cannot_hold_are_kept_exactly(dtype, row):
    store = ActivationStore(AMPLE, dtype=dtype)
    store.put(keys(1), 1, [row])
    assert_same(store.get(keys(1))[0][1], row)
    assert store.memory_used == row.nbytes
    store.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_bytes": -1}, "`memory_bytes` is -1; it must be at least 0"),
        ({"memory_bytes": 1, "disk_bytes": -5}, "`disk_bytes` is -5"),
        ({"memory_bytes": 1, "dtype": "int4"}, "`dtype` is 'int4'; it must be one of 'bfloat16', 'exact'"),
    ],
)
def test_refuses_what_cannot_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        ActivationStore(**arguments)


@pytest.mark.parametrize("module", ["lmdb", "xxhash"])
def test_says_what_to_install(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "smartfrz_hf.activation_cache.lmdb_tier", raising=False)
    monkeypatch.delattr("smartfrz_hf.activation_cache.lmdb_tier", raising=False)
    ActivationStore(100).close()
    with pytest.raises(ImportError, match=rf"'{module}'.*smartfrz_hf\[disk\]"):
        ActivationStore(100, 100, tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("kind", ["missing", "below a file"])
def test_unusable_folder_costs_the_disk_only(tmp_path, kind):
    folder = tmp_path / "folder"
    if kind == "below a file":
        folder.write_text("not a folder")
        folder /= "inside"
    store = ActivationStore(12, AMPLE, folder)
    assert str(folder) in store.trouble and "\n" not in store.trouble
    assert store.put(keys(2), 1, torch.ones(2, 3)) == 1
    assert [found is None for found in store.get(keys(2))] == [False, True]
    store.close()


def test_a_full_disk_costs_nothing_but_room(half_a_megabyte, caplog):
    batch = torch.randn(40, 10000)
    store = ActivationStore(batch[0].nbytes, AMPLE, half_a_megabyte)
    kept = [store.put(keys(4, first), first, batch[first : first + 4]) for first in range(0, 40, 4)]
    assert 4 <= sum(kept) <= 13
    assert store.trouble and "\n" not in store.trouble
    assert [store.trouble in record.message for record in caplog.records] == [True]
    found = store.get(keys(40))
    assert sum(entry is not None for entry in found) == sum(kept) == len(store)
    for entry, expected in zip(found, batch, strict=True):
        if entry is not None:
            assert_same(entry[1], expected)
    # Memory is still in use.
    assert store.put(keys(1), 41, batch[1:2]) == 1
    store.close()
    assert not os.listdir(half_a_megabyte)


# Counted from the row's bytes in the file: its first and last, and the key and depth in front of it.
def test_a_forked_child_leaves_the_folder_alone(tmp_path):
    store = ActivationStore(0, AMPLE, tmp_path)
    store.put(keys(1), 1, torch.ones(1, 3))
    child = os.fork()
    if not child:
        try:
            store.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert_same(store.get(keys(1))[0][1], torch.ones(3))
    assert not os.listdir(tmp_path)
    store.close()


# Counted from the row's bytes in the file: its first and last.
@pytest.mark.parametrize("place", [0, 3999])
def test_a_flipped_bit_is_noticed(tmp_path, caplog, place):
    logging.warning_once.cache_clear()
    store = ActivationStore(0, AMPLE, tmp_path)
    rows = torch.randn(3, 1000)
    store.put(keys(3), 1, rows)
    file = f"/proc/self/fd/{store._disk._file}"
    with open(file, "r+b", buffering=0) as stream:
        start = stream.read().index(rows[1].numpy().tobytes())
        stream.seek(start + place)
        byte = stream.read(1)[0]
        stream.seek(start + place)
        stream.write(bytes([byte ^ 4]))
    for _ in range(2):
        found = store.get(keys(3))
        assert found[1] is None
        assert_same(found[0][1], rows[0])
        assert_same(found[2][1], rows[2])
    assert ["damaged" in record.message for record in caplog.records] == [True]
    assert len(store) == 2 and store.trouble is None
    store.put(keys(1, 1), 2, rows[1:2])
    assert_same(store.get(keys(1, 1))[0][1], rows[1])
    store.close()


def test_a_file_full_of_gaps_costs_nothing_but_room(tmp_path, monkeypatch):
    # The file's limit leaves room for gaps; here it is below the budget, and is met at once.
    real = lmdb.open
    monkeypatch.setattr(lmdb, "open", lambda path, **options: real(path, **options | {"map_size": 2**19}))
    store = ActivationStore(0, AMPLE, tmp_path)
    batch = torch.randn(20, 10000)
    kept = sum(store.put(keys(1, i), 1, batch[i : i + 1]) for i in range(20))
    assert 4 <= kept <= 12
    assert store.trouble is None
    for entry, expected in zip(store.get(keys(kept)), batch[:kept], strict=True):
        assert_same(entry[1], expected)
    store.close()


def test_nothing_has_a_name(tmp_path):
    """So nothing is left of it, however its process ends."""
    store = ActivationStore(0, AMPLE, tmp_path)
    store.put(keys(1), 1, torch.ones(1, 3))
    assert not os.listdir(tmp_path)
    files = len(os.listdir("/proc/self/fd"))
    store.close()
    store.close()
    assert len(os.listdir("/proc/self/fd")) < files
    assert store.get(keys(1)) == [None]
    assert store.put(keys(1), 1, torch.ones(1, 3)) == 0
