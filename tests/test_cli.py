"""The command line itself; what its commands do is tested beside them."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import smartfrz_hf
from smartfrz_hf.cli import app

COMMANDS = ["estimate", "report", "harvest", "evaluate", "fit", "card", "push"]


def test_help_lists_the_commands():
    done = CliRunner().invoke(app, ["--help"], env={"TERM": "dumb"})
    assert done.exit_code == 0 and all(command in done.output for command in COMMANDS)


def test_version():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"smartfrz_hf {smartfrz_hf.__version__}\n")


@pytest.mark.parametrize(
    ("content", "message"), [("{", "Expecting property name"), ("{}", "lacks 'label'"), ("[]", "holds no evaluation")]
)
def test_a_damaged_evaluation_is_refused(tmp_path, content, message):
    (tmp_path / "evaluation.json").write_text(content)
    words = ["card", str(tmp_path), "--evaluation", str(tmp_path / "evaluation.json")]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "300", "TERM": "dumb"})
    assert done.exit_code == 2 and message in " ".join(done.output.split())


@pytest.mark.slow
def test_python_m_is_the_same_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "smartfrz_hf", "report", "."], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1 and "holds no run" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    # Typer asks for the shell by the environment, or by the process that called it.
    words = {"bash": {"COMP_WORDS": "smartfrz re", "COMP_CWORD": "1"}}.get(
        shell, {"_TYPER_COMPLETE_ARGS": "smartfrz re"}
    )
    words |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "_SMARTFRZ_COMPLETE": f"complete_{shell}"}
    done = CliRunner().invoke(app, [], env=words, prog_name="smartfrz")
    assert "report" in done.output and "push" not in done.output


@pytest.mark.parametrize(("number", "status"), [(None, 2), (errno.ENOSPC, 1)])
def test_a_full_disk_is_no_wrong_argument(tmp_path, monkeypatch, number, status):
    def fail(self, **_):
        raise OSError(number, "No space left on device") if number else OSError("no such run")

    monkeypatch.setattr(Path, "read_text", fail)
    (tmp_path / "evaluation.json").touch()
    done = CliRunner().invoke(app, ["card", str(tmp_path), "--evaluation", str(tmp_path / "evaluation.json")])
    assert done.exit_code == status and ("No space left" in done.output) == (status == 1)
    assert ("Invalid value" in done.output) == (status == 2)


def test_options_are_shown_whole_and_take_underscores_too(tmp_path):
    done = CliRunner().invoke(app, ["estimate", "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    assert "--operating-point " in done.output and "…" not in done.output
    for option in ("--batch_size=0", "--batch-size=0"):
        done = CliRunner().invoke(app, ["estimate", "--model", "x", "--task", "y", option])
        assert done.exit_code == 2 and "'--batch-size'" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("estimate --learning_rate 0", "0 is not above 0"),
        ("estimate --learning_rate -1e-5", "-1e-05 is not above 0"),
        ("estimate --learning_rate nan", "nan is not a finite number"),
        ("estimate --epochs inf", "inf is not a finite number"),
        ("estimate --warmup inf", "inf is not a finite number"),
        ("estimate --seconds inf", "inf is not a finite number"),
        ("evaluate --seed -1", "greater than or equal to 0"),
    ],
)
def test_numbers_that_cannot_work_are_refused(tmp_path, words, message):
    command, option, value = words.split()
    needed = (
        ["--model", "x", "--task", "y"] if command == "estimate" else [str(tmp_path), "--out", str(tmp_path / "x")]
    )
    done = CliRunner().invoke(app, [command, *needed, option, value], env={"COLUMNS": "300", "TERM": "dumb"})
    assert done.exit_code == 2 and f"'{option.replace('_', '-')}': " in done.output and message in done.output
