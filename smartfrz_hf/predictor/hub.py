"""Loading a predictor from the package, a folder or the Hub, and uploading one."""

import json
import os
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import tqdm, validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file

from .configuration import SmartFRZPredictorConfig
from .modeling import SmartFRZPredictor

DEFAULT = "smartfrz-base"
FILES = ("config.json", "model.safetensors")
OFFLINE = (
    f"connect to the Hub (unset HF_HUB_OFFLINE if it is set), or give a local folder that holds {' and '.join(FILES)}"
)
# What to do about an error of the Hub's client, by its class; the first match counts. All others mean no connection.
REMEDIES: dict[type[Exception], str] = {
    HFValidationError: "give an existing folder, or a Hub id such as `user/name`",
    RevisionNotFoundError: "check `revision`: it must be a branch, tag or commit of the repository",
    HfHubHTTPError: "check the name; a private repository needs `hf auth login`, `HF_TOKEN` or `token`",
}


class _NoProgressBar(tqdm):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | {"disable": True})


def default_predictor_path() -> Path:
    """
    Folder of the predictor that comes with the package: inside the installed package, or next to it in a source tree.

    Raises:
        FileNotFoundError: the package was installed without it.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "predictor_weights", package.parent / "predictor_weights"):
        if (folder / DEFAULT).is_dir():
            return folder / DEFAULT
    raise FileNotFoundError(
        f"`predictor_weights/{DEFAULT}` is missing from the package at {package}; reinstall smartfrz_hf, or give "
        "another predictor with `SmartFRZConfig(predictor=…)`."
    )


def load_predictor(
    name: str | os.PathLike | None = None,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> SmartFRZPredictor:
    """
    Load a predictor in evaluation mode.

    Only `config.json` and `model.safetensors` are downloaded and read. The random state is not changed, and no
    progress bar is shown.

    Args:
        name (`str`, *optional*):
            Hub id or folder. If not given, or `"smartfrz-base"`, the predictor that comes with the package is loaded,
            without network access. A folder of that name can be given as `"./smartfrz-base"`.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        subfolder (`str`, *optional*): subfolder of the repository or folder that holds the predictor.
        token (`str`, *optional*): for a private repository. Defaults to `HF_TOKEN` or the token of `hf auth login`.
        cache_dir (`str`, *optional*): folder for downloads. Defaults to that of `huggingface_hub`.

    Returns:
        [`SmartFRZPredictor`]

    Raises:
        OSError: the predictor is not found, the Hub cannot be reached or denies access, or a file is missing or
            damaged.

    Example:

    ```python
    >>> from smartfrz_hf import load_predictor

    >>> load_predictor("smartfrz-base").config.operating_points["balanced"]
    0.99
    ```
    """
    source = default_predictor_path() if name in (None, DEFAULT) else name
    folder = Path(source) if Path(source).is_dir() else _download(str(source), revision, subfolder, token, cache_dir)
    folder /= subfolder
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise OSError(
            f"The predictor {source} lacks {' and '.join(missing)}; give a folder that `save_pretrained` or "
            "`smartfrz fit` has written."
        )
    try:
        kind = dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))).get("model_type")
        if kind != SmartFRZPredictorConfig.model_type:
            raise OSError(
                f"The folder or repository {source} holds a model of type {kind!r}, not a predictor; give one that `smartfrz fit` "
                "has written."
            )
        config = SmartFRZPredictorConfig.from_pretrained(folder)
        # `from_pretrained` of the model would show a progress bar, for a file of a few kilobytes.
        with torch.device("meta"):
            predictor = SmartFRZPredictor(config)
        predictor.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise OSError(
            f"The predictor {source} is damaged and cannot be read ({error}); download it again, or save it again "
            "with `save_pretrained`."
        ) from error
    return predictor.eval()


def _download(
    name: str, revision: str | None, subfolder: str, token: str | bool | None, cache_dir: str | os.PathLike | None
) -> Path:
    """Download the two files, or find them in the cache."""
    cache = None if cache_dir is None else Path(cache_dir)
    files = [f"{subfolder}/{file}".lstrip("/") for file in FILES]
    try:
        folder = snapshot_download(
            name, revision=revision, token=token, cache_dir=cache, allow_patterns=files, tqdm_class=_NoProgressBar
        )
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" at revision {revision}"
        remedy = next((text for kind, text in REMEDIES.items() if isinstance(error, kind)), OFFLINE)
        raise OSError(
            f"The predictor {name!r} is neither a folder nor available from the Hub{at}: {remedy}. ({error})"
        ) from error
    return Path(folder)


def push_predictor(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload predictor",
) -> str:
    """
    Upload a predictor and its model card to the Hub, in one commit.

    The predictor is loaded first, so that a damaged one is never uploaded. Only the files that `save_pretrained` and
    `smartfrz fit` write are uploaded. `push_to_hub` of a loaded predictor, in contrast, uploads no model card.

    Args:
        folder (`str`): folder of the predictor, as `smartfrz fit` writes it.
        repo_id (`str`): `user/name` on the Hub; created if it does not exist.
        private (`bool`, *optional*): whether a created repository is private. Defaults to the setting of the account.
        revision (`str`, *optional*): branch, created if it does not exist. Defaults to the main branch.
        token (`str`, *optional*): access token. Defaults to `HF_TOKEN` or the token of `hf auth login`.
        message (`str`, *optional*): commit message.

    Returns:
        `str`: URL of the commit.

    Raises:
        OSError: the folder does not hold a complete predictor, `repo_id` cannot be a name on the Hub, or the Hub cannot be
            reached or denies access.
    """
    try:
        validate_repo_id(os.fspath(repo_id))
    except HFValidationError as error:
        raise OSError(
            f"`repo_id` is {str(repo_id)!r}, which is no name on the Hub; it must look like `user/name`. To save a predictor in a "
            "folder, use its `save_pretrained`."
        ) from error
    folder = Path(folder)
    if not folder.is_dir():
        raise OSError(f"{folder} is not a folder; give one that holds {' and '.join(FILES)}.")
    load_predictor(folder.resolve())
    api = HfApi(token=token)
    try:
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
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise OSError(
            f"The Hub denies the upload to {repo_id}: log in with `hf auth login`, or set `HF_TOKEN` to a token that may "
            f"write there. ({error})"
        ) from error
    return commit.commit_url
