"""Uploads to the Hub and downloads from it, with the Hub's own client and a local server."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hub_server import TOKEN, HubServer
from typer.testing import CliRunner

from smartfrz_hf import SmartFRZPredictor, SmartFRZPredictorConfig
from smartfrz_hf.cli import app
from smartfrz_hf.predictor import FILES, default_predictor_path, load_predictor

REPO = "me/mine"

pytestmark = pytest.mark.slow  # each test starts interpreters


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    """A folder as `smartfrz fit` writes it, with a file that must not be uploaded."""
    torch.manual_seed(0)
    path = tmp_path / "predictor"
    SmartFRZPredictor(SmartFRZPredictorConfig(window=5, weights_per_unit=16)).save_pretrained(path)
    (path / "README.md").write_text("---\nlibrary_name: smartfrz_hf\n---\n# Mine\n")
    (path / "notes.txt").write_text("private")
    return path


@pytest.fixture
def run(hub, tmp_path):
    """Runs a command in a process with this Hub, an empty home, and a token if one is given."""

    def go(*words, token=None, **environment):
        # The local server speaks plain LFS, not Xet.
        changes = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        changes |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
        kept = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_HUB_TOKEN")}
        if token is not None:
            changes["HF_TOKEN"] = token
        return subprocess.run(
            [sys.executable, *words], env=kept | changes, capture_output=True, text=True, timeout=120, check=False
        )

    return go


def load(run, name=REPO, token=None, environment=None, **kwargs):
    """Load a predictor in a process of its own; give its window and the sum of its weights, or the error."""
    code = (
        "import json, sys; from smartfrz_hf import load_predictor\n"
        "name, kwargs = json.loads(sys.argv[1])\n"
        "try:\n"
        "    predictor = load_predictor(name, **kwargs)\n"
        "    result = {'window': predictor.config.window, 'sum': sum(p.double().sum().item() for p in predictor.parameters())}\n"
        "except OSError as error:\n"
        "    result = {'error': str(error)}\n"
        "print(json.dumps(result))\n"
    )
    done = run("-c", code, json.dumps([name, kwargs]), token=token, **environment or {})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"warnings": done.stderr}


def content(predictor_folder):
    predictor = SmartFRZPredictor.from_pretrained(predictor_folder)
    return sum(p.double().sum().item() for p in predictor.parameters())


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_push_and_load_again(hub, run, folder):
    words = ("-m", "smartfrz_hf", "push", str(folder), REPO)
    done = run(*words, "--private", token=TOKEN)
    assert done.returncode == 0, done.stderr
    assert f"{hub.endpoint}/{REPO}/commit/" in done.stdout
    assert hub.repos[REPO]["private"]
    (files,) = (hub.repos[REPO]["commits"][sha] for sha in hub.repos[REPO]["branches"].values())
    assert set(files) == {".gitattributes", "README.md", *FILES}
    assert files["README.md"] == (folder / "README.md").read_bytes()

    loaded = load(run, token=TOKEN)
    assert loaded["sum"] == content(folder)
    assert loaded["warnings"] == "", "no progress bar"
    assert "error" in load(run, token=None, cache_dir=str(folder / "empty"))

    # Offline, from the cache.
    count = len(hub.requests)
    assert load(run, environment={"HF_HUB_OFFLINE": "1"})["sum"] == content(folder)
    assert len(hub.requests) == count

    # Another predictor on a branch; the main branch does not change.
    SmartFRZPredictor(SmartFRZPredictorConfig(window=7, weights_per_unit=16)).save_pretrained(folder)
    done = run(*words, "--revision", "longer", token=TOKEN)
    assert done.returncode == 0, done.stderr
    assert load(run, token=TOKEN, revision="longer")["window"] == 7
    assert load(run, token=TOKEN)["window"] == 5
    error = load(run, token=TOKEN, revision="no-such")["error"]
    assert "no-such" in error
    assert "check `revision`" in error


def test_a_configuration_goes_to_the_hub_and_back(hub, run):
    code = (
        "from smartfrz_hf import SmartFRZConfig; import sys\n"
        "print(SmartFRZConfig(operating_point='aggressive', cache_memory='8GB').push_to_hub(sys.argv[1]))\n"
        "config = SmartFRZConfig.from_pretrained(sys.argv[1])\n"
        "assert (config.operating_point, config.cache_memory) == ('aggressive', 8e9)\n"
        "try:\n"
        "    SmartFRZConfig.from_pretrained('me/nothing')\n"
        "except OSError as error:\n"
        "    assert 'me/nothing' in str(error)\n"
    )
    done = run("-c", code, "me/config", token=TOKEN)
    assert done.returncode == 0, done.stderr
    assert f"{hub.endpoint}/me/config/commit/" in done.stdout


def test_a_predictor_in_a_subfolder(hub, run, folder):
    hub.commit(REPO, {f"small/{name}": value for name, value in files_of(folder).items()})
    assert load(run, subfolder="small")["sum"] == content(folder)


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_push_without_a_right_token(hub, run, folder, token):
    done = run("-m", "smartfrz_hf", "push", str(folder), REPO, token=token)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "denies the upload to me/mine: log in with `hf auth login`" in done.stderr and "401" in done.stderr
    assert not hub.repos


def test_push_of_a_damaged_predictor_reaches_no_hub(hub, run, folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    done = run("-m", "smartfrz_hf", "push", str(folder), REPO, token=TOKEN)
    assert done.returncode == 1
    assert "damaged" in done.stderr and "Traceback" not in done.stderr
    assert not hub.requests


@pytest.mark.parametrize("path", ["./copy", "copies/of/mine", "C:\\copies"])
def test_push_to_a_path_is_told_how_to_save(tmp_path, path):
    SmartFRZPredictor(SmartFRZPredictorConfig(window=5, weights_per_unit=16)).save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["push", str(tmp_path), path])
    assert done.exit_code == 1
    assert done.output.startswith(
        f"`repo_id` is {path!r}, which is no name on the Hub; it must look like `user/name`."
    )
    assert "`save_pretrained`" in done.output


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_what_is_missing_is_named(hub, run, folder, token):
    error = load(run, "me/other", token=token)["error"]
    assert "me/other" in error
    assert "401" in error
    assert "check the name" in error
    assert "hf auth login" in error
    hub.commit(REPO, {"config.json": (folder / "config.json").read_bytes()})
    assert ("lacks model.safetensors" if token is None else "401") in load(run, token=token)["error"]


def test_a_broken_connection_is_retried(hub, run, folder):
    hub.commit(REPO, files_of(folder))
    hub.breaks = 1
    assert load(run)["sum"] == content(folder)
    assert not hub.breaks
    assert sum("GET" in request and "safetensors" in request for request in hub.requests) >= 2


def test_a_truncated_file_is_refused(hub, run, folder):
    files = files_of(folder)
    hub.commit(REPO, files | {"model.safetensors": files["model.safetensors"][:-20]})
    assert "damaged" in load(run)["error"]


def test_a_config_of_a_newer_version_gives_one_warning(hub, run, folder):
    files = files_of(folder)
    config = json.loads(files["config.json"]) | {"heads_of_the_future": 3}
    hub.commit(REPO, files | {"config.json": json.dumps(config).encode()})
    loaded = load(run)
    assert loaded["sum"] == content(folder)
    assert loaded["warnings"].count("heads_of_the_future") == 1


def test_pickled_weights_are_refused_and_not_downloaded(hub, run, folder, tmp_path):
    torch.save({}, tmp_path / "weights")
    pickled = (tmp_path / "weights").read_bytes()
    hub.commit(REPO, {"config.json": (folder / "config.json").read_bytes(), "pytorch_model.bin": pickled})
    assert "safetensors" in load(run)["error"]
    assert not any("GET" in request and ".bin" in request for request in hub.requests)


def test_another_model_is_no_predictor(tmp_path):
    folder = shutil.copytree(default_predictor_path(), tmp_path / "other")
    for content, message in (
        ('{"model_type": "bert"}', "holds a model of type 'bert', not a predictor"),
        ("{", "is damaged"),
    ):
        (folder / "config.json").write_text(content)
        with pytest.raises(OSError, match=message):
            load_predictor(folder)
