"""The wheel holds all it needs: the package, the predictor's weights, and no use of what is not required."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from versions import RENAMED

REPO = Path(__file__).parents[1]
# Neither the environment nor what earlier builds left behind may find its way into the wheel.
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")

# Runs before the code of a test: looks like an environment in which the optional packages are not installed.
# Transformers imports some of them by itself where it finds them.
HIDE_OPTIONAL_PACKAGES = """
import sys

OPTIONAL = {"datasets", "evaluate", "matplotlib", "pandas", "peft", "PIL", "pyarrow", "scipy", "sklearn", "tensorboard", "trackio"}

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in OPTIONAL else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(REPO, folder / "source", ignore=NOT_COPIED)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    site = wheel.parent / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(command, check=True)
    return site


def run_python(code: str, site: Path, cwd: Path) -> str:
    """Runs `code` with the package of `site`, far from the repository and from any cache of the Hub."""
    code += f"\nimport pathlib, smartfrz_hf; assert pathlib.Path(smartfrz_hf.__file__).is_relative_to({str(site)!r})"
    env = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf_home")}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_every_module_and_the_default_predictor(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    modules = {path.relative_to(REPO).as_posix() for path in REPO.glob("smartfrz_hf/**/*.py")}
    assert modules <= packed, "a new subpackage must be listed in setup.cfg"
    weights = "smartfrz_hf/predictor_weights/smartfrz-base"
    assert {f"{weights}/{name}" for name in ("config.json", "model.safetensors", "README.md")} <= packed
    assert {name.split("/")[0].split("-")[0] for name in packed} == {"smartfrz_hf"}


def extras() -> dict[str, list[str]]:
    setup = configparser.ConfigParser()
    setup.read(REPO / "setup.cfg")
    return {extra: names.split() for extra, names in setup["options.extras_require"].items()}


@pytest.mark.parametrize(
    ("extra", "folder"), [("estimate", "estimation"), ("predictor-training", "predictor_training")]
)
def test_an_extra_lists_what_its_folder_imports(extra: str, folder: str) -> None:
    listed = {name: {re.split("[><=]", package)[0] for package in packages} for name, packages in extras().items()}
    nodes = [n for file in (REPO / "smartfrz_hf" / folder).glob("*.py") for n in ast.walk(ast.parse(file.read_text()))]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    imported = {module.partition(".")[0].replace("sklearn", "scikit-learn") for module in modules}
    imported |= {"pillow"}  # which `datasets` reads images with
    assert imported & set.union(*listed.values()) == listed[extra]


def test_data_sets_are_loaded_with_a_version_that_runs_no_code_of_a_repository() -> None:
    assert [extra for extra, packages in extras().items() if "datasets" in packages] == []


@pytest.mark.slow
def test_default_predictor_loads_from_the_wheel(site: Path, tmp_path: Path) -> None:
    code = """
from smartfrz_hf import SmartFRZPredictor
print(sum(parameter.numel() for parameter in SmartFRZPredictor.from_default().parameters()))
"""
    assert int(run_python(code, site, tmp_path)) > 0


@pytest.mark.slow
def test_core_imports_without_optional_packages(site: Path, tmp_path: Path) -> None:
    run_python(f"{HIDE_OPTIONAL_PACKAGES}\nfrom smartfrz_hf import *", site, tmp_path)


@pytest.mark.slow
def test_import_loads_no_optional_package_itself(site: Path, tmp_path: Path) -> None:
    code = """
import sys
import smartfrz_hf
print(*{"evaluate", "matplotlib", "sklearn", "tensorboard", "trackio"} & set(sys.modules))
"""
    loaded = set(run_python(code, site, tmp_path).split())
    assert loaded <= (set() if RENAMED else {"sklearn"})  # which earlier versions of Transformers import
