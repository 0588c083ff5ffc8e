"""Two real processes under DDP (gloo): one decision, no byte for what is frozen, and the run that one process makes."""

import pytest
import torch
from launching import STAGES, launch, results
from versions import resume_on_two_cpu_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp") / "two"
    return folder, *results(folder)


def test_only_active_gradients_travel(two):
    for part in two[1]:
        assert part["sent"] == part["active"]
        at = {step: part["sent"][step] for step in (0, 5, 9, 13)}
        assert at[0] > at[5] > at[9] > at[13] > 0
        assert part["sent"] == [at[max(begin for begin in at if begin <= step)] for step in range(16)]


def test_two_ranks_train_as_one_with_twice_the_batch(two, tmp_path):
    (one,), weights = results(tmp_path / "one", ranks=1)
    assert two[1][0]["stages"] == one["stages"] == STAGES
    assert two[1][0]["losses"] == pytest.approx(one["losses"], abs=1e-5)
    for key, value in weights.items():
        torch.testing.assert_close(two[2][key], value, atol=1e-4, rtol=1e-4)


def test_accumulation(tmp_path):
    found, _ = results(tmp_path / "two", "--accumulation=4")
    (one,), _ = results(tmp_path / "one", "--accumulation=4", ranks=1)
    assert found[0]["stages"] == one["stages"] == STAGES
    assert found[0]["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert found[0]["sent"] == found[0]["active"]


def test_rank_0_decides(two, tmp_path):
    found, weights = results(tmp_path / "unlike", "--unlike")
    assert [part["stages"] for part in found] == [STAGES, STAGES]
    assert all(torch.equal(value, two[2][key]) for key, value in weights.items())


@resume_on_two_cpu_ranks
@pytest.mark.parametrize("step", [4, 8, 12])
def test_resuming_on_two_ranks_equals_never_having_stopped(two, tmp_path, step):
    found, weights = results(tmp_path / "again", f"--resume={two[0] / f'checkpoint-{step}'}")
    assert all(torch.equal(value, two[2][key]) for key, value in weights.items())
    assert found[0]["stages"] == STAGES and found[0]["losses"] == two[1][0]["losses"]
    assert found[1]["sent"] == two[1][1]["sent"][step:]


def test_a_rank_that_dies_is_an_error_with_its_number(tmp_path):
    done = launch(tmp_path / "dead", "--dies_at=9")
    assert done.returncode != 0
    assert "Process 0 of 2 got no answer from another process about the freezing stage of step 9" in done.stderr


def test_callback_alone(two, tmp_path):
    """It works, and sends as many bytes as before; or says what would help."""
    found, weights = results(tmp_path / "alone", "--alone=find")
    assert found[0]["stages"] == STAGES and len(set(found[0]["sent"])) == 1
    for key, value in weights.items():
        torch.testing.assert_close(two[2][key], value, atol=1e-5, rtol=1e-5)
    done = launch(tmp_path / "refused", "--alone=do not find")
    assert done.returncode != 0 and "Use `SmartFRZTrainer`, or add `SmartFRZMixin`" in done.stderr
