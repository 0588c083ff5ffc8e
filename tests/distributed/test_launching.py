"""Of the launcher of these tests: what it repeats, and what it does not."""

import pytest
from launching import launch


def test_a_native_crash_is_repeated_once(tmp_path):
    with pytest.warns(UserWarning, match="Rank 1 was ended by SIGSEGV"):
        done = launch(tmp_path / "run", "crashes", script="crashes.py")
    assert done.returncode == 0 and (tmp_path / "runs-0").read_text() == (tmp_path / "runs-1").read_text() == "xx"


def test_an_assertion_is_not(tmp_path):
    done = launch(tmp_path / "run", "fails", script="crashes.py")
    assert done.returncode == 1 and "an assertion" in done.stderr
    assert (tmp_path / "runs-0").read_text() == "x"
