"""Reports on finished or running trainings, from the files that they have written: `smartfrz report`."""

import os
from pathlib import Path

from .figures import save_figures
from .page import page
from .runs import SavedRun, read_run

__all__ = ["SavedRun", "page", "read_run", "save_figures", "write_report"]


def write_report(
    run: str | os.PathLike,
    out: str | os.PathLike,
    plain: str | os.PathLike | None = None,
    png: str | os.PathLike | None = None,
) -> Path:
    """
    Write a report on a run: one HTML file that needs no network.

    Args:
        run (`str`): output folder of a Trainer, whose last checkpoint is read, or one checkpoint.
        out (`str`): the HTML file.
        plain (`str`, *optional*): the same for a run without freezing, shown beside it.
        png (`str`, *optional*): folder for the charts as PNG files, which needs matplotlib.

    Returns:
        `Path`: of the HTML file.

    Raises:
        ValueError: a folder holds no run, or a damaged one.
        ImportError: `png` is given and matplotlib is missing.
    """
    saved, beside = read_run(Path(run)), None if plain is None else read_run(Path(plain))
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(saved, beside), encoding="utf-8")
    if png is not None:
        save_figures(saved, png, beside)
    return out
