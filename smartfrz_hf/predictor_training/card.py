"""The model card of a predictor and its charts, made from its evaluation."""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from huggingface_hub import ModelCard, ModelCardData

from ..predictor.configuration import DEFAULT_POINTS_AFTER_START

TEMPLATE = Path(__file__).with_name("card_template.md")
PARTS = {"leave_one_family_out": "Leave one model family out", "leave_one_task_out": "Leave one data set out"}
TAGS = ["smartfrz", "layer-freezing", "efficient-training"]
LEARNED = {
    "label": "The predictor was trained on this label.",
    "kept": "The predictor was trained on the share of that change that is kept, so that expensive mistakes count for "
    "more; the probability of the label is calibrated afterwards.",
}
MEANINGS = {
    "cka": "the linear CKA of the unit's output on held-out rows to its output at the end of the run is at least {x}, "
    "and stays so.",
    "token-cka": "the linear CKA of single tokens of the unit's output on held-out rows to those at the end of the run "
    "is at least {x}, and stays so.",
    "settled": "at most 1 % of the change in linear CKA of the unit's output over the run is left, and this stays so.",
    "rewind-cost": "resetting the front of the finished model up to the unit to that moment loses at most {x:.0%} of "
    "what training reduced the loss on held-out rows by.",
    "rewind-shift": "resetting the front of the finished model up to the unit to that moment changes the logits on "
    "held-out rows by at most {x:.0%} of their change over the whole run (mean squares).",
}


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def score_table(part: dict[str, Any]) -> str:
    """The scores of the predictor and the rules, as a table in Markdown."""
    rules = sorted(part["rules"].items(), key=lambda item: -item[1]["ap"])
    rows = []
    for name, entry in [("**predictor**", part), *rules]:
        brier = f"{entry['brier']:.3f}" if "brier" in entry else ""
        scores = [f"{entry['auc']:.3f}", f"{entry['ap']:.3f}", brier, f"{entry['moment_error']:.3f}"]
        rows.append([name, *scores, f"{entry['frozen']:.1%}"])
    head = ["", "ROC AUC", "average precision", "Brier score", "moment error", "frozen at a cost of 3 %"]
    return markdown_table(head, rows)


def point_table(points: dict[str, dict[str, float]]) -> str:
    """The operating points, as a table in Markdown."""
    rows = [
        [
            f"`{name}`",
            f"{point['threshold']:.3f}",
            f"{point['frozen']:.0%}",
            f"{point['cost']:.1%}",
            f"{point['worst_cost']:.1%}",
        ]
        for name, point in points.items()
    ]
    head = ["operating point", "probability from", "units frozen, over time", "cost, mean over runs", "worst run"]
    return markdown_table(head, rows)


def _run_table(runs: list[dict[str, Any]]) -> str:
    groups = defaultdict(list)
    for run in runs:
        groups[run["family"], run["data"], run["regime"]].append(run)
    rows = [
        [
            *key,
            *(", ".join(sorted({run[name] for run in group})) for name in ("schedule", "optimizer")),
            str(len(group)),
        ]
        for key, group in sorted(groups.items())
    ]
    return markdown_table(["family", "data", "regime", "schedules", "optimizers", "runs"], rows)


def _fold_table(evaluation: dict[str, Any]) -> str:
    rows = [
        [name, f"{fold['rows']:,}", f"{fold['auc']:.3f}", f"{fold['ap']:.3f}"]
        for part in PARTS
        for name, fold in evaluation[part]["folds"].items()
    ]
    return markdown_table(["held out", "rows", "ROC AUC", "average precision"], rows)


def _verdict(evaluation: dict[str, Any]) -> str:
    """Compare the predictor with the best simple rules, in words."""
    sentences = []
    for key, subject in (("leave_one_family_out", "model families"), ("leave_one_task_out", "data sets")):
        part = evaluation[key]
        by_precision, by_frozen = (max(part["rules"], key=lambda r: part["rules"][r][by]) for by in ("ap", "frozen"))
        margin = part["ap"] - part["rules"][by_precision]["ap"]
        word = "better than" if margin >= 0.01 else "level with" if margin > -0.01 else "worse than"
        sentences.append(
            f"On held-out {subject}, the predictor is {word} the best simple rule by average precision, "
            f"*{by_precision}* ({margin:+.3f}). At a cost of 3 %, it freezes {part['frozen']:.1%}, and the best "
            f"simple rule, *{by_frozen}*, {part['rules'][by_frozen]['frozen']:.1%}."
        )
    return "\n".join(sentences)


def make_card(name: str, evaluation: dict[str, Any]) -> str:
    """
    Make the model card.

    Args:
        name (`str`): name of the predictor.
        evaluation (`dict`): what `smartfrz evaluate` wrote.

    Returns:
        `str`: the card in Markdown, with its metadata.
    """
    label, _, threshold = evaluation["label"].rpartition("-")
    card = ModelCard.from_template(
        ModelCardData(license="apache-2.0", library_name="transformers", tags=TAGS),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=name,
        after_start={**DEFAULT_POINTS_AFTER_START, **evaluation["config"].get("operating_points_after_start", {})},
        **evaluation,
        meaning=MEANINGS[label or threshold].format(x=float(threshold) if label else None),
        learned=LEARNED[evaluation["target"]],
        points=point_table(evaluation["operating_points"]),
        run_rows=_run_table(evaluation["runs"]),
        parts=[(title, evaluation[part]) for part, title in PARTS.items()],
        score_table=score_table,
        verdict=_verdict(evaluation),
        folds=_fold_table(evaluation),
    )
    return str(card) + "\n"


def write_card(evaluation: dict[str, Any], folder: str | os.PathLike) -> None:
    """
    Write the model card, `README.md`, and its charts, `reliability.png` and `rules.png`.

    Args:
        evaluation (`dict`): what `smartfrz evaluate` wrote.
        folder (`str`): folder of the predictor; its name is that of the predictor.
    """
    (Path(folder) / "README.md").write_text(make_card(Path(folder).resolve().name, evaluation), encoding="utf-8")
    draw_charts(evaluation, folder)


def draw_charts(evaluation: dict[str, Any], folder: str | os.PathLike, prefix: str = "") -> None:
    """
    Draw `reliability.png` and `rules.png`.

    Args:
        evaluation (`dict`): what `smartfrz evaluate` wrote.
        folder (`str`): folder for the charts.
        prefix (`str`, *optional*, defaults to `""`): prefix of the file names.
    """
    figure, axes = plt.subplots(figsize=(4.5, 4.5), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    for part, title in PARTS.items():
        bins = evaluation[part]["reliability"]
        axes.plot([b["predicted"] for b in bins], [b["observed"] for b in bins], marker="o", label=title.lower())
    axes.set(xlabel="predicted probability", ylabel="observed frequency", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend()
    figure.savefig(Path(folder) / f"{prefix}reliability.png", dpi=120)
    plt.close(figure)

    figure, both = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    rules = evaluation["leave_one_family_out"]["rules"]
    order = [*sorted(rules, key=lambda rule: rules[rule]["ap"]), "predictor"]
    for axes, (part, title) in zip(both, PARTS.items(), strict=True):
        entries = {"predictor": evaluation[part], **evaluation[part]["rules"]}
        values = [entries[entry]["ap"] for entry in order]
        colors = ["tab:orange" if entry == "predictor" else "0.7" for entry in order]
        axes.bar_label(axes.barh(order, values, color=colors), fmt="%.2f", padding=3)
        axes.set(title=title.lower(), xlabel="average precision", xlim=(0, 1.1))
    figure.savefig(Path(folder) / f"{prefix}rules.png", dpi=120)
    plt.close(figure)
