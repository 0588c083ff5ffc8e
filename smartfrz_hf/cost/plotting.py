"""The freeze timeline as a chart."""

import os
from typing import TYPE_CHECKING

from transformers.utils import is_matplotlib_available

if TYPE_CHECKING:
    from .ledger import Ledger

ACTIVE, FROZEN = "#e07a3f", "#9db4c0"


def plot_timeline(ledger: "Ledger", path: str | os.PathLike, title: str = "Freeze timeline") -> None:
    """
    Draw when each unit froze: one bar per unit over the steps of the run, with the front at the bottom.

    Args:
        ledger ([`Ledger`]): of the run.
        path (`str`): image file; its ending chooses the format.
        title (`str`, *optional*): of the chart.

    Raises:
        ImportError: matplotlib is missing.
    """
    if not is_matplotlib_available():
        raise ImportError("Drawing the freeze timeline needs matplotlib: `pip install matplotlib`.")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9, 1.6 + 0.38 * len(ledger.units)), layout="constrained")
    axes = figure.subplots()
    steps, spans = max(ledger.max_steps, 1), ledger.frozen_spans
    for row, unit in enumerate(ledger.units):
        axes.barh(row, steps, color=ACTIVE)
        for begin, end in spans.get(unit, ()):
            axes.barh(row, end - begin, left=begin, color=FROZEN)
            inside = begin < 0.9 * steps  # the label of a late freeze would leave the chart
            offset, side = ((4, 0), "left") if inside else ((-4, 0), "right")
            axes.annotate(f"step {begin}", (begin, row), offset, textcoords="offset points", va="center", ha=side)
    axes.set_yticks(range(len(ledger.units)), ledger.units)
    axes.set_xlim(0, steps)
    axes.set_xlabel("optimizer step")
    axes.set_title(f"{title}: {ledger.compute_saved:.0%} of the training compute saved")
    patches = [Patch(color=ACTIVE, label="training")] + [Patch(color=FROZEN, label="frozen")] * bool(spans)
    figure.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
