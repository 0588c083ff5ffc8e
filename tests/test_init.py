"""The face of the package: all names are there, and nothing is imported before it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import smartfrz_hf


def names_for_type_checkers():
    """The module of each name, as the `import` statements say."""
    tree = ast.parse(Path(smartfrz_hf.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {alias.name: f".{node.module}" for node in imports for alias in node.names}


def test_every_name_is_found_where_type_checkers_find_it():
    assert names_for_type_checkers() == smartfrz_hf._PLACES and set(smartfrz_hf._PLACES) == set(smartfrz_hf.__all__)
    assert set(smartfrz_hf.__all__) <= set(dir(smartfrz_hf))
    names = {}
    exec("from smartfrz_hf import *", names)
    assert set(smartfrz_hf.__all__) <= set(names) and names["SmartFRZConfig"] is smartfrz_hf.config.SmartFRZConfig


def test_what_is_not_there_is_told_as_usual():
    assert not hasattr(smartfrz_hf, "no_such_name") and not hasattr(smartfrz_hf, "__wrapped__")
    with pytest.raises(AttributeError, match="module 'smartfrz_hf' has no attribute 'SmartFRZTrainr'"):
        _ = smartfrz_hf.SmartFRZTrainr


@pytest.mark.parametrize(
    "code",
    [
        "import smartfrz_hf.config as c; c.SmartFRZConfig()",
        "from smartfrz_hf import SmartFRZArguments; SmartFRZArguments().to_config()",
        "import smartfrz_hf.report.runs",
        "from typer.testing import CliRunner; from smartfrz_hf.cli import app; CliRunner().invoke(app, ['--help'])",
    ],
)
def test_needs_no_torch(code):
    """Nor Transformers, whose earlier versions import torch."""
    code += "; import sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rooms_are_there_without_an_import_of_their_own():
    code = "import smartfrz_hf; smartfrz_hf.policies.PEERS, smartfrz_hf.cost, smartfrz_hf.trainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
