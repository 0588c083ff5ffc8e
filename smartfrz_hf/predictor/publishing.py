"""Putting a predictor on the Hub."""

import os
from pathlib import Path

from huggingface_hub import HfApi

from .loading import FILES, load_predictor


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
