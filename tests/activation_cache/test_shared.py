"""One store for several processes: each finds what any has put, in one copy, whoever dies when."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("processes share a store on Linux only", allow_module_level=True)

from smartfrz_hf.activation_cache.lmdb_tier import Handle
from smartfrz_hf.activation_cache.store import ActivationStore

pytestmark = pytest.mark.slow  # each process has torch to import

AMPLE = 2**24
BUDGETS = {"memory": (AMPLE, 0), "disk": (0, AMPLE)}
# What another process does: it attaches, and then runs a few lines that are given to it.
CHILD = """
import signal, sys, os, torch
torch.set_num_threads(1)
from smartfrz_hf.activation_cache.lmdb_tier import Handle
from smartfrz_hf.activation_cache.store import ActivationStore
handles = eval(sys.argv[1])
store = ActivationStore.attach(handles, "exact")
def keys(count, first=0):
    return [index.to_bytes(16, "big") for index in range(first, first + count)]
def values(count, front=1, length=250):
    return torch.arange(count)[:, None] * 10.0 + front + torch.zeros(length)
print("attached", flush=True)
"""


def keys(count, first=0):
    return [index.to_bytes(16, "big") for index in range(first, first + count)]


def values(count, front=1, length=250):
    return torch.arange(count)[:, None] * 10.0 + front + torch.zeros(length)


def start(store, lines):
    """Another process that has attached."""
    words = [sys.executable, "-W", "ignore", "-c", CHILD + lines, repr(store.handles)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "attached\n"
    return process


def in_a_process(store, lines):
    assert start(store, lines).wait(60) == 0


def assert_holds(store, expected, front=1, first=0):
    found = store.get(keys(len(expected), first))
    for row, value in zip(found, expected, strict=True):
        assert row is not None and row[0] == front and torch.equal(row[1], value)


@pytest.fixture(params=BUDGETS)
def store(request, tmp_path):
    store = ActivationStore(*BUDGETS[request.param], tmp_path, shared=True)
    yield store
    store.close()
    assert not os.listdir(tmp_path)


def test_what_one_puts_others_find(store, tmp_path):
    assert store.put(keys(4), 1, values(4)) == 4
    assert not os.listdir(tmp_path) and not [name for name in os.listdir("/dev/shm") if "smartfrz" in name]
    in_a_process(store, "assert [f for f, _ in store.get(keys(4))] == [1] * 4; store.put(keys(2, 4), 2, values(2, 2))")
    assert_holds(store, values(2, 2), 2, first=4)
    assert len(store) == 6 and (store.memory_used == 0) != (store.disk_used == 0)
    used = store.memory_used + store.disk_used
    in_a_process(store, "assert store.put(keys(4), 2, values(4, 2)) == 4")
    assert_holds(store, values(4, 2), 2)  # in the place of the ones before
    assert len(store) == 6 and store.memory_used + store.disk_used == used


def test_many_writers_leave_one_copy(store):
    """All put the same rows, in other orders, and move them on, and read meanwhile."""
    lines = """
for front in (1, 2):
    for rows in torch.randperm(60, generator=torch.Generator().manual_seed(int({seed}))).split(7):
        names = [keys(60)[row] for row in rows]
        assert store.put(names, front, values(60, front)[rows]) == len(rows)
        for row, (found, value) in zip(rows.tolist(), store.get(names), strict=True):
            # One that lags behind may have put the row of its own front since.
            assert found in (1, 2) and torch.equal(value, values(60, found)[row])
"""
    children = [start(store, lines.format(seed=seed)) for seed in range(3)]
    assert [child.wait(60) for child in children] == [0] * 3
    assert len(store) == 60
    assert store.put(keys(60), 2, values(60, 2)) == 60
    assert_holds(store, values(60, 2), 2)


def test_survives_kills_at_any_moment(store):
    lines = """
while True:
    for front in (1, 2, 3):
        store.put(keys(40), front, values(40, front, 100 * front))  # longer each time, so that rows move
"""
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        child = start(store, lines)
        time.sleep(float(torch.rand((), generator=generator)) * 0.2)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        fronts = set()
        for row, found in enumerate(store.get(keys(40))):
            if found is not None:
                fronts.add(found[0])
                assert torch.equal(found[1], values(40, found[0], 100 * found[0])[row])
        assert len(fronts) <= 1, "a batch is put as a whole, or not at all"
    assert store.put(keys(40), 4, values(40, 4, 300)) == 40
    assert_holds(store, values(40, 4, 300), 4)


def test_budgets_are_those_of_all_processes(tmp_path):
    store = ActivationStore(10 * 4096, 6 * 4096, tmp_path, shared=True)
    in_a_process(store, "store.put(keys(4), 1, values(4, length=1500))")
    assert store.put(keys(8, 4), 1, values(8, length=1500)) < 8
    assert store.memory_used <= 10 * 4096 and store.disk_used <= 6 * 4096
    count = len(store)
    # What is there can still move on, in its place.
    assert store.put(keys(4), 2, values(4, 2, 1500)) == 4
    assert len(store) == count
    store.close()


def test_one_that_leaves_takes_nothing_along(store):
    store.put(keys(4), 1, values(4))
    child = start(store, "sys.stdin.read() if False else None; import time; time.sleep(2); assert len(store) == 4")
    store.close()
    store.close()
    assert store.get(keys(4)) == [None] * 4 and store.fronts(keys(4)) == [None] * 4
    assert (len(store), store.memory_used, store.disk_used, store.put(keys(4), 1, values(4))) == (0, 0, 0, 0)
    assert child.wait(60) == 0


def test_a_full_disk_costs_only_room(half_a_megabyte, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))  # it would keep us from our memory, too
    store = ActivationStore(0, AMPLE, half_a_megabyte, shared=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    rows = torch.randn(30, 10000)
    kept = sum(store.put(keys(2, first), 1, rows[first : first + 2]) for first in range(0, 30, 2))
    assert 4 <= kept <= 13 and store.trouble and "\n" not in store.trouble
    assert [store.trouble in record.message for record in caplog.records] == [True]
    found = [(entry[1], row) for entry, row in zip(store.get(keys(30)), rows, strict=True) if entry is not None]
    assert len(found) == kept and all(torch.equal(one, row) for one, row in found)
    store.close()


def test_no_folder_costs_the_disk_only(tmp_path):
    store = ActivationStore(AMPLE, AMPLE, tmp_path / "missing", shared=True)
    assert "missing" in store.trouble
    assert store.put(keys(2), 1, values(2)) == 2
    assert_holds(store, values(2))
    store.close()


def test_another_file_is_not_taken_for_the_store(store):
    path, _, budget = store.handles[0]
    with pytest.raises(OSError, match="another file"):
        ActivationStore.attach([Handle(path, (0, 0), budget)], "exact")
