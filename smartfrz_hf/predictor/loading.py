"""Loading a predictor from the package, a folder or the Hub, and refusing one that is not whole."""

import os
from pathlib import Path
from typing import Any

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


def load_predictor(name: str | os.PathLike | None = None, **kwargs) -> SmartFRZPredictor:
    """
    Load a predictor, in evaluation mode. Only safetensors and JSON are read.

    Args:
        name (`str`, *optional*): Hub id or folder. Defaults to the predictor inside the package, with no network.
        kwargs: passed on to `from_pretrained`, such as `revision` or `token`.

    Raises:
        OSError: a file is missing, or damaged, or does not hold a whole predictor.
    """
    source = default_predictor_path() if name is None else name
    if Path(source).is_dir():
        missing = [file for file in FILES if not (Path(source) / file).is_file()]
        if missing:
            raise OSError(
                f"The predictor folder {source} lacks {' and '.join(missing)}; it needs {' and '.join(FILES)}, as "
                "`save_pretrained` writes them."
            )
    try:
        loaded: Any = SmartFRZPredictor.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise OSError(f"The predictor {source} is damaged and cannot be read ({error}); fetch it again.") from error
    predictor, report = loaded
    wrong = sorted(set(report["missing_keys"]) | {str(key) for key in report["mismatched_keys"]})
    if wrong:
        raise OSError(f"The predictor {source} is not whole: it lacks {', '.join(wrong)}; fetch it again.")
    return predictor.eval()
