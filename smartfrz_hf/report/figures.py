"""The charts of a report as PNG files, for papers."""

import os
from pathlib import Path
from typing import Any

from .charts import short
from .runs import SavedRun

ACTIVE, FROZEN, SCORE = "#f0e2d8", "#7d97a5", "#d4691f"


def save_figures(run: SavedRun, folder: str | os.PathLike, plain: SavedRun | None = None) -> list[Path]:
    """
    Draw the timeline of the units, the predictor's attention when each froze, and each loss and metric.

    Args:
        run ([`SavedRun`]): to draw.
        folder (`str`): for the PNG files; made when it is missing.
        plain ([`SavedRun`], *optional*): shown beside it.

    Returns:
        `list[Path]`: the files.

    Raises:
        ImportError: matplotlib is missing.
    """
    from transformers.utils import is_matplotlib_available  # which imports torch, in earlier versions of Transformers

    if not is_matplotlib_available():
        raise ImportError("PNG files need matplotlib: `pip install matplotlib`.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    if run.state is not None:
        files.append(_timeline(run, folder / "timeline.png"))
        if run.attentions:
            files.append(_attention(run, folder / "attention.png"))
    for key in ("loss", *run.metrics):
        if run.curve(key):
            files.append(_curves(key, run, plain, folder / f"{key.replace('/', '_')}.png"))
    return files


def _rows(labels: list[str], width: float) -> tuple[Any, Any, Any]:
    """A figure with a row for each unit, its axes, and the colors of what the predictor says."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.26 * len(labels)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, width)
    return figure, axes, LinearSegmentedColormap.from_list("scores", [ACTIVE, SCORE])


def _timeline(run: SavedRun, path: Path) -> Path:
    from matplotlib.cm import ScalarMappable

    assert run.state is not None
    units, records, spans = run.state["units"], run.ledger.get("records") or [], run.frozen_spans
    figure, axes, colors = _rows([short(unit, 30) for unit in units], run.steps)
    for row, unit in enumerate(units):
        axes.barh(row, run.steps, height=0.9, color=ACTIVE)
        for record, following in zip(records, [*records[1:], None], strict=True):
            scores, place = record["probabilities"], row - record["depth"]
            if scores and 0 <= place < len(scores):
                end = following["step"] if following else run.steps
                axes.barh(row, end - record["step"], left=record["step"], height=0.9, color=colors(scores[place]))
        for begin, end in spans.get(unit, ()):
            axes.barh(row, end - begin, left=begin, height=0.9, color=FROZEN)
    axes.set_xlabel("optimizer step (grey: frozen)")
    figure.colorbar(ScalarMappable(cmap=colors), ax=axes, label="probability", pad=0.02)
    figure.savefig(path, dpi=200)
    return path


def _attention(run: SavedRun, path: Path) -> Path:
    figure, axes, colors = _rows([f"{short(row.unit, 30)}, step {row.step:,}" for row in run.attentions], 1)
    for place, row in enumerate(run.attentions):
        size, most = 1 / len(row.weights), max(row.weights) or 1.0
        edges = [size * number for number in range(len(row.weights))]
        axes.barh(place, size, left=edges, height=0.9, color=[colors(weight / most) for weight in row.weights])
    axes.set_xticks([0, 1], ["oldest snapshot", "newest"])
    figure.savefig(path, dpi=200)
    return path


def _curves(key: str, run: SavedRun, plain: SavedRun | None, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*run.curve(key), strict=True), color=SCORE, label="SmartFRZ")
    if plain is not None and plain.curve(key):
        axes.plot(*zip(*plain.curve(key), strict=True), color="#6b7780", linestyle="--", label="plain")
        axes.legend(frameon=False)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(key)
    figure.savefig(path, dpi=200)
    return path
