"""Loading a predictor from the package, a folder or the Hub, and refusing one that is not whole."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
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


def push_predictor(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload predictor",
) -> str:
    """
    Put a predictor and its model card on the Hub, in one commit.

    The folder is read and checked first, and only what `save_pretrained` and `smartfrz fit` write goes up. Unlike
    `push_to_hub` of the loaded predictor, this takes the model card along.

    Args:
        folder (`str`): holds the predictor, as `smartfrz fit` writes it.
        repo_id (`str`): `user/name` on the Hub; made if it is not there.
        private (`bool`, *optional*): whether a repository that is made is private. The account's default if not given.
        revision (`str`, *optional*): branch, made if it is not there. Defaults to the main branch.
        token (`str`, *optional*): the stored one, or that of `HF_TOKEN`, when it is not given.
        message (`str`, *optional*): of the commit.

    Returns:
        `str`: address of the commit.

    Raises:
        OSError: the folder does not hold a whole predictor, or the Hub cannot be reached or refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise OSError(f"{folder} is no folder; give one that holds {' and '.join(FILES)}.")
    load_predictor(folder)
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=message,
        allow_patterns=[*FILES, "README.md", "*.png"],
    )
    return commit.commit_url
