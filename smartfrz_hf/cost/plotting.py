"""Showing a run: the freeze timeline as a chart."""

import os

from transformers.utils import is_matplotlib_available

from .ledger import Ledger

ACTIVE, FROZEN = "#e07a3f", "#9db4c0"


def plot_timeline(ledger: Ledger, path: str | os.PathLike, title: str = "Freeze timeline") -> None:
    """
    Draw when each unit froze: one bar a unit over the steps of the run, front unit at the bottom.

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

    figure = Figure(figsize=(9, 1.2 + 0.38 * len(ledger.units)), layout="constrained")
    axes = figure.subplots()
    for row, unit in enumerate(ledger.units):
        axes.barh(row, ledger.max_steps, color=ACTIVE, label="training" if row == 0 else None)
        for begin, end in ledger.frozen_spans.get(unit, ()):
            first = unit == next(iter(ledger.frozen_spans)) and begin == ledger.frozen_spans[unit][0][0]
            axes.barh(row, end - begin, left=begin, color=FROZEN, label="frozen" if first else None)
            inside = begin < 0.9 * ledger.max_steps  # a label behind a late freeze would leave the chart
            offset, side = ((4, 0), "left") if inside else ((-4, 0), "right")
            axes.annotate(f"step {begin}", (begin, row), offset, textcoords="offset points", va="center", ha=side)
    axes.set_yticks(range(len(ledger.units)), ledger.units)
    axes.set_xlim(0, ledger.max_steps)
    axes.set_xlabel("optimizer step")
    axes.set_title(f"{title}: {ledger.compute_saved:.0%} of the training compute saved")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
