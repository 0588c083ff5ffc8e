"""The policies of other papers freeze at the same steps in all processes, and as in one process with twice the batch."""

import pytest
from launching import results

pytestmark = pytest.mark.slow

# Their gradients and weights are the same in all processes, so two decide as one does. The others see rows of their own.
AS_ONE = ["autofreeze", "freezeout", "grades", "random"]


def peers(folder, *words, **options):
    found, _ = results(folder, *words, script="peers.py", **options)
    assert found == found[:1] * len(found)
    return found[0]


def test_two_processes_agree_and_decide_as_one(tmp_path):
    two, one = peers(tmp_path / "two"), peers(tmp_path / "one", "--policies", *AS_ONE, ranks=1)
    assert all(two[name] for name in two), "nothing froze"
    for name in AS_ONE:
        assert two[name] == one[name]


def test_sharded_gradients_and_weights_are_measured_whole(tmp_path):
    names = ["--policies", "autofreeze", "freezeout", "grades"]
    sharded = peers(tmp_path / "fsdp", *names, "--fsdp", recipe="fsdp2_cpu")
    one = peers(tmp_path / "one", *names, ranks=1)
    assert {name: sharded[name] for name in names[1:]} == {name: one[name] for name in names[1:]}
