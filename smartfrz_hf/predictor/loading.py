"""Loading a predictor from the package, a folder or the Hub, and refusing one that is not whole."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from .modeling import SmartFRZPredictor

DEFAULT = "smartfrz-base"
FILES = ("config.json", "model.safetensors")


def default_predictor_path() -> Path:
    """
    Folder of the predictor that comes with the package: inside it when installed, beside it in a source tree.

    Raises:
        FileNotFoundError: the package was installed without it.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "predictor_weights", package.parent / "predictor_weights"):
        if (folder / DEFAULT).is_dir():
            return folder / DEFAULT
    raise FileNotFoundError(
        f"The package at {package} lacks `predictor_weights/{DEFAULT}`; install smartfrz_hf again, or name a "
        "predictor with `SmartFRZConfig(predictor=…)`."
    )


def load_predictor(
    name: str | os.PathLike | None = None,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> SmartFRZPredictor:
    """
    Load a predictor, in evaluation mode. Only `config.json` and `model.safetensors` are fetched and read.

    Args:
        name (`str`, *optional*): Hub id or folder. Defaults to the predictor inside the package, with no network.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        subfolder (`str`, *optional*): where in the repository or folder it is.
        token (`str`, *optional*): for a private repository; the stored one, or that of `HF_TOKEN`, if not given.
        cache_dir (`str`, *optional*): where what is fetched is kept. Defaults to that of `huggingface_hub`.

    Raises:
        OSError: the Hub refuses or cannot be reached, or a file is missing, damaged, or no whole predictor.
    """
    source = default_predictor_path() if name is None else name
    folder = Path(source) if Path(source).is_dir() else _fetch(str(source), revision, subfolder, token, cache_dir)
    folder /= subfolder
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise OSError(
            f"The predictor {source} lacks {' and '.join(missing)}; it needs {' and '.join(FILES)}, as "
            "`save_pretrained` writes them."
        )
    try:
        loaded: Any = SmartFRZPredictor.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise OSError(f"The predictor {source} is damaged and cannot be read ({error}); fetch it again.") from error
    predictor, report = loaded
    wrong = sorted(set(report["missing_keys"]) | {str(key) for key in report["mismatched_keys"]})
    if wrong:
        raise OSError(f"The predictor {source} is not whole: it lacks {', '.join(wrong)}; fetch it again.")
    return predictor.eval()


def _fetch(
    name: str, revision: str | None, subfolder: str, token: str | bool | None, cache_dir: str | os.PathLike | None
) -> Path:
    """The two files from the Hub, or from what was fetched before when there is no network."""
    cache = None if cache_dir is None else Path(cache_dir)
    files = [f"{subfolder}/{file}".lstrip("/") for file in FILES]
    try:
        return Path(snapshot_download(name, revision=revision, token=token, cache_dir=cache, allow_patterns=files))
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" at {revision}"
        raise OSError(
            f"{name} is no folder, and the predictor {name}{at} cannot be had from the Hub: {error}"
        ) from error
