"""One store for several processes: each finds what any has put, in one copy, whoever dies when."""

import os
import resource
import signal
import sys
import time
import traceback

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("processes share a store on Linux only", allow_module_level=True)

from smartfrz_hf.activation_cache.shared import SharedStore

AMPLE = 2**24
FRONTS = {1: 11, 2: 22, 3: 33}
BUDGETS = {"memory": (AMPLE, 0), "disk": (0, AMPLE)}


def keys(count, first=0):
    return [index.to_bytes(16, "big") for index in range(first, first + count)]


def values(count, depth=1, length=250):
    return torch.arange(count)[:, None] * 10.0 + depth + torch.zeros(length)


def made(budgets, folder):
    store = SharedStore(*budgets, folder)
    store.fronts = dict(FRONTS)
    return store


def attached(store):
    other = SharedStore.attach(store.handle)
    other.fronts = dict(FRONTS)
    return other


def in_a_process(act, wait=True):
    """Have a forked process act, and give back the signal that ended it, or its id if it is not waited for."""
    child = os.fork()
    if not child:
        code = 1
        try:
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return ended(child) if wait else child


def ended(child):
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def assert_holds(store, expected, depth=1, first=0):
    found = store.get(keys(len(expected), first))
    for row, value in zip(found, expected, strict=True):
        assert row is not None and row[0] == depth and torch.equal(row[1], value)


@pytest.fixture(params=BUDGETS)
def store(request, tmp_path):
    store = made(BUDGETS[request.param], tmp_path)
    yield store
    store.close()
    assert not os.listdir(tmp_path)


def test_what_one_puts_others_find(store):
    def act():
        other = attached(store)
        assert_holds(other, values(4))
        assert other.put(keys(2, 4), 2, values(2, 2)) == 2

    assert store.put(keys(4), 1, values(4)) == 4
    in_a_process(act)
    assert_holds(store, values(2, 2), 2, first=4)
    assert len(store) == 6
    used = store.memory_used + store.disk_used
    in_a_process(lambda: attached(store).put(keys(4), 2, values(4, 2)))
    # Deeper rows take the place of the ones before.
    assert_holds(store, values(4, 2), 2)
    assert store.memory_used + store.disk_used == used
    assert (store.memory_used == 0) != (store.disk_used == 0)


def test_many_writers_leave_one_copy(store):
    """All put the same rows, in other orders, and move them on, and read meanwhile."""
    count, workers = 60, 3
    alone = made((AMPLE, 0), None)
    alone.put(keys(count), 1, values(count))

    def act(seed):
        other = attached(store)
        generator = torch.Generator().manual_seed(seed)
        for depth in (1, 2):
            for rows in torch.randperm(count, generator=generator).split(7):
                names = [keys(count)[row] for row in rows]
                assert other.put(names, depth, values(count, depth)[rows]) == len(rows)
                for row, (found, value) in zip(rows.tolist(), other.get(names), strict=True):
                    # One that lags behind may have put the row at its own depth since.
                    assert found in (1, 2) and torch.equal(value, values(count, found)[row])

    torch.set_num_threads(1)
    children = [in_a_process(lambda seed=seed: act(seed), wait=False) for seed in range(workers)]
    assert [ended(child) for child in children] == [0] * workers
    assert len(store) == count
    assert store.memory_used + store.disk_used == alone.memory_used
    assert attached(store).put(keys(count), 2, values(count, 2)) == count
    assert_holds(store, values(count, 2), 2)


def dies_in_write(store, how):
    """A process that puts rows and is killed at its fifth write, with half of the row written, all, or nothing yet."""
    real, writes = os.pwrite, 0

    def pwrite(file, data, start):
        nonlocal writes
        writes += 1
        if writes == 5:
            real(file, data[: {"before": 0, "half": len(data) // 2, "after": len(data)}[how]], start)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(file, data, start)

    os.pwrite = pwrite
    attached(store).put(keys(8), 2, values(8, 2))


@pytest.mark.parametrize("how", ["before", "half", "after"])
@pytest.mark.parametrize("there_before", [True, False], ids=["replacing", "new"])
def test_a_writer_that_is_killed_costs_one_row(store, how, there_before):
    if there_before:
        store.put(keys(8), 1, values(8))
    assert in_a_process(lambda: dies_in_write(store, how)) == signal.SIGKILL
    found = store.get(keys(8))
    for number, row in enumerate(found):
        if number < 4:
            assert row[0] == 2 and torch.equal(row[1], values(8, 2)[number])
        elif number > 4 and there_before:
            assert row[0] == 1 and torch.equal(row[1], values(8)[number])
        else:
            assert row is None
    assert store.put(keys(9), 2, values(9, 2)) == 9
    assert_holds(store, values(9, 2), 2)


def test_survives_kills_at_any_moment(store):
    def act():
        other = attached(store)
        while True:
            for depth in (1, 2, 3):
                # Longer at each depth, so that rows move.
                other.put(keys(40), depth, values(40, depth, 100 * depth))

    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        child = in_a_process(act, wait=False)
        time.sleep(float(torch.rand((), generator=generator)) * 0.05)
        os.kill(child, signal.SIGKILL)
        assert ended(child) == signal.SIGKILL
        for row, found in enumerate(store.get(keys(40))):
            if found is not None:
                assert torch.equal(found[1], values(40, found[0], 100 * found[0])[row])
    assert store.put(keys(40), 3, values(40, 3, 300)) == 40
    assert_holds(store, values(40, 3, 300), 3)


def test_rows_of_another_front_or_batch_size_pass_for_missing(store):
    store.sizes, store.made_in = range(16, 64), range(16, 17)
    store.put(keys(4), 1, values(4))
    other = attached(store)
    for fronts, sizes, found in [
        (FRONTS, range(16, 64), True),
        (FRONTS, range(0, 17), True),
        (FRONTS, range(17, 64), False),
        (FRONTS, range(0, 16), False),
        (FRONTS | {1: 12}, range(16, 64), False),
        ({2: 22}, range(16, 64), False),
    ]:
        other.fronts, other.sizes = fronts, sizes
        assert other.depths(keys(4)) == [1 if found else None] * 4
        assert [row is not None for row in other.get(keys(4))] == [found] * 4
    # They give their place to those that are of use.
    other.fronts, other.sizes, other.made_in = FRONTS | {1: 12}, range(32, 99), range(40, 41)
    used = store.memory_used + store.disk_used
    assert other.put(keys(4), 1, values(4, 5)) == 4
    assert_holds(other, values(4, 5))
    assert store.get(keys(4)) == [None] * 4
    assert len(store) == 4 and store.memory_used + store.disk_used == used


def test_budgets_are_those_of_all_processes(tmp_path):
    room = made((AMPLE, 0), None)
    room.put(keys(1), 1, values(1))
    store = made((3 * room.memory_used, 2 * room.memory_used), tmp_path)
    in_a_process(lambda: attached(store).put(keys(4), 1, values(4)))
    assert store.put(keys(4, 4), 1, values(4)) == 1 and store.full
    assert (store.memory_used, store.disk_used) == (3 * room.memory_used, 2 * room.memory_used)
    assert_holds(store, values(4))
    assert len(store) == 5
    # What is there can still move on, in its place.
    assert store.put(keys(5), 2, values(5, 2)) == 5
    store.close()


def test_one_that_leaves_takes_nothing_along(store):
    other = attached(store)
    store.put(keys(4), 1, values(4))
    store.close()
    store.close()
    assert store.get(keys(4)) == [None] * 4 and store.depths(keys(4)) == [None] * 4
    assert (len(store), store.memory_used, store.disk_used, store.put(keys(4), 1, values(4))) == (0, 0, 0, 0)
    assert_holds(other, values(4))
    other.close()


def test_a_full_disk_costs_only_room(half_a_megabyte, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))  # it would keep us from our memory, too
    store = made((0, AMPLE), half_a_megabyte)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    rows = torch.randn(30, 10000)
    other = attached(store)
    kept = store.put(keys(30), 1, rows)
    assert 4 <= kept <= 13 and store.trouble and "\n" not in store.trouble
    assert other.put(keys(1, 30), 1, rows[:1]) == 0
    assert [store.trouble in record.message for record in caplog.records] == [True]
    found = [(entry[1], row) for entry, row in zip(other.get(keys(30)), rows, strict=True) if entry is not None]
    assert len(found) == kept and all(torch.equal(one, row) for one, row in found)
    store.close()


def test_no_folder_costs_the_disk_only(tmp_path):
    store = made((AMPLE, AMPLE), tmp_path / "missing")
    assert "missing" in store.trouble
    assert attached(store).put(keys(2), 1, values(2)) == 2
    assert_holds(store, values(2))
    store.close()


def test_a_flipped_bit_on_disk_is_noticed(tmp_path, caplog):
    store = made((0, AMPLE), tmp_path)
    store.put(keys(3), 1, values(3))
    file = store.handle.files[2][0]
    place = os.pread(file, AMPLE, 0).index(values(3)[1].numpy().tobytes())
    os.pwrite(file, b"x", place)
    for _ in range(2):
        found = store.get(keys(3))
        assert [row is not None for row in found] == [True, False, True]
    assert ["damaged" in record.message for record in caplog.records] == [True]
    assert store.put(keys(3), 1, values(3)) == 3
    assert_holds(store, values(3))
    store.close()


def test_another_file_is_not_taken_for_the_store(store):
    handle = store.handle
    handle.files[0] = (handle.files[0][0], (0, 0))
    with pytest.raises(OSError, match="another file"):
        SharedStore.attach(handle)
