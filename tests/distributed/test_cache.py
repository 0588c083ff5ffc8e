"""The activation cache on two ranks of one host: what one has computed, the other finds."""

import sys

import launching
import pytest
import torch
from launching import launch
from versions import resume_on_two_cpu_ranks

pytestmark = pytest.mark.slow

# An epoch has six steps.
GROWING = '--stages={"0": 2, "9": 4}'

if sys.platform != "linux":
    pytest.skip("processes share a store on Linux only", allow_module_level=True)


def results(folder, *words, **options):
    """What each rank of `cached_ranks.py` saw, and the weights, which are the same on all."""
    return launching.results(folder, *words, script="cached_ranks.py", **options)


def assert_close(found, expected):
    """Losses and weights differ by rounding alone."""
    (parts, weights), (others, other_weights) = found, expected
    for part, other in zip(parts, others, strict=True):
        torch.testing.assert_close(torch.tensor(part["losses"]), torch.tensor(other["losses"]), rtol=1e-4, atol=1e-4)
    for key, value in weights.items():
        torch.testing.assert_close(value, other_weights[key], rtol=0, atol=2e-3, msg=key)


def hits(found):
    """Of each epoch, on all ranks together."""
    return [sum(counts) for counts in zip(*(part["hits"] for part in found), strict=True)]


def rows(found):
    return [sum(counts) for counts in zip(*(part["rows"] for part in found), strict=True)]


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    return results(tmp_path_factory.mktemp("cache") / "without", "--no_cache", "--evaluate", GROWING)


# Six epochs, the second stage in the second of them; both tiers are needed.
KILLED = ["--epochs=6", "--dropout=0.1", "--evaluate", "--memory=60000", "--disk=1e6", GROWING]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    return results(tmp_path_factory.mktemp("cache") / "whole", *KILLED)


def test_two_ranks_find_as_many_rows_as_one(tmp_path):
    two, _ = results(tmp_path / "two")
    one, _ = results(tmp_path / "one", ranks=1)
    # The first step is not looked up: it tells whether padding is read.
    assert rows(two) == rows(one) == [40, 48, 48]
    assert hits(two) == hits(one) == [0, 48, 48]
    assert [part["kept"][-1] for part in two] == [48, 48]


def test_losses_and_weights_are_those_without_it(without, tmp_path):
    found, weights = results(tmp_path / "with", "--evaluate", "--memory=60000", "--disk=1e6", GROWING)
    assert_close((found, weights), without)
    assert found[0]["stages"] == [[0, 2], [9, 4]]
    assert all(sum(part["hits"]) and part["bytes"][-1] <= 60000 and part["kept"][-1] >= 40 for part in found)


def test_one_rank_may_turn_its_cache_off(without, tmp_path):
    found, weights = results(tmp_path / "off", "--evaluate", "--off_at=8", GROWING)
    assert_close((found, weights), without)
    assert [part["off"] for part in found] == [None, "this rank has had enough"]
    assert found[0]["hits"][2] > 0


def test_when_all_trains_again_all_ranks_share_anew(tmp_path):
    """Also with one whose cache is off."""
    words = ["--restarts", "--epochs=6", '--stages={"1": 3}']
    found, weights = results(tmp_path / "with", *words, "--off_at=3")
    expected, weights_without = results(tmp_path / "without", *words, "--no_cache")
    assert_close((found, weights), (expected, weights_without))
    assert found[0]["stages"] == expected[0]["stages"]
    assert [depth for _, depth in found[0]["stages"]] == [3, 0, 3]
    assert found[0]["hits"][5] > 0 == found[1]["hits"][5]


def test_the_budget_is_that_of_the_host(tmp_path):
    found, _ = results(tmp_path / "little", "--memory=60000")
    assert 0 < found[0]["kept"][-1] == found[1]["kept"][-1] < 48
    assert all(20000 < part["bytes"][-1] <= 60000 for part in found)
    assert hits(found)[2] == found[0]["kept"][-1]


def test_each_host_keeps_its_rows(tmp_path):
    found, _ = results(tmp_path / "hosts", "--hosts")
    first, second = (part["kept"] for part in found)
    assert first[0] == second[0] == 24 and first[1] < 48
    assert 0 < hits(found)[1] < hits(found)[2] < 48


@resume_on_two_cpu_ranks
@pytest.mark.parametrize(("save_steps", "resumed_at"), [(5, 10), (7, 7)], ids=["after the stage", "before the stage"])
def test_killed_ranks_go_on(never_killed, tmp_path, save_steps, resumed_at):
    """SIGKILL, to every rank, in mid-epoch: no handler, no clean-up, and the store of the host is gone with them."""
    folder = tmp_path / "killed"
    words = [*KILLED, f"--save_steps={save_steps}"]
    done = launch(folder, *words, "--killed_at=13", script="cached_ranks.py")
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert all(path.name.startswith("checkpoint-") for path in folder.iterdir())
    found, weights = results(folder, *words)
    assert [part["resumed_at"] for part in found] == [resumed_at] * 2
    expected, expected_weights = never_killed
    assert_close((found, weights), never_killed)
    for part, other in zip(found, expected, strict=True):
        assert part["stages"] == other["stages"] == [[0, 2], [9, 4]]
        assert part["hits"][-1] > 0 and other["hits"][-1] > 0
        assert part["off"] is other["off"] is None
