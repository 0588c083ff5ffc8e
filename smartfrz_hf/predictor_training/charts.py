"""Charts of an evaluation."""

import os
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

PARTS = {"leave_one_family_out": "leave one family out", "leave_one_task_out": "leave one task out"}


def draw_charts(evaluation: dict[str, Any], folder: str | os.PathLike, prefix: str = "") -> None:
    """
    Write `reliability.png` and `rules.png`.

    Args:
        evaluation (`dict`): what `smartfrz evaluate` wrote.
        folder (`str`): gets the charts.
        prefix (`str`): of their names.
    """
    figure, axes = plt.subplots(figsize=(4.5, 4.5), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    for part, name in PARTS.items():
        bins = evaluation[part]["reliability"]
        axes.plot([b["predicted"] for b in bins], [b["observed"] for b in bins], marker="o", label=name)
    axes.set(xlabel="predicted probability", ylabel="observed frequency", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend()
    figure.savefig(Path(folder) / f"{prefix}reliability.png", dpi=120)
    plt.close(figure)

    figure, both = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    rules = evaluation["leave_one_family_out"]["rules"]
    order = [*sorted(rules, key=lambda rule: rules[rule]["ap"]), "predictor"]
    for axes, (part, name) in zip(both, PARTS.items(), strict=True):
        entries = {"predictor": evaluation[part], **evaluation[part]["rules"]}
        values = [entries[entry]["ap"] for entry in order]
        colors = ["tab:orange" if entry == "predictor" else "0.7" for entry in order]
        axes.bar_label(axes.barh(order, values, color=colors), fmt="%.2f", padding=3)
        axes.set(title=name, xlabel="average precision", xlim=(0, 1.1))
    figure.savefig(Path(folder) / f"{prefix}rules.png", dpi=120)
    plt.close(figure)
