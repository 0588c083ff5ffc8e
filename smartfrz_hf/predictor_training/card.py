"""The model card of a predictor, written from what its evaluation measured."""

from typing import Any

CARD = """---
license: apache-2.0
library_name: transformers
tags:
- smartfrz
- layer-freezing
- efficient-training
---

# {name}: when has a block converged?

A predictor of [smartfrz_hf](https://arxiv.org/abs/2401.16720) (SmartFRZ, ICLR 2023). From the last {window} snapshots of
{weights_per_unit} sampled weights of each unit of a model in training, it says how likely it is that the unit, and all that comes before
it, can freeze at no loss. {told}It has {parameters:,} parameters, decides for a model of 32 blocks in {decision_ms_32_blocks} ms on one
core, and is no language or vision model of its own.

```python
from transformers import Trainer
from smartfrz_hf import SmartFRZCallback, SmartFRZConfig

trainer = Trainer(..., callbacks=[SmartFRZCallback(SmartFRZConfig(predictor="…/{name}"))])
```

`predictor` is the Hub id or the folder of this repository; `smartfrz-base` is the one that is used when none is named.

## Intended use

Freezing blocks of Transformers models while a `Trainer` fine-tunes or trains them, through `SmartFRZCallback` or
`SmartFRZTrainer`. How soon they freeze is set by `SmartFRZConfig(operating_point=…)`:

{points}

Cost is what becomes of the finished model when its frozen front is put back to what it was at the moment of freezing (the *rewind
test*): how far that probe_features the logits, as a share of how far the whole run has moved them (mean squares). In a real run the units
behind the front adapt, so that this is more than one pays. Each figure is of model families that neither the predictor nor the
probability had seen.

## Training data

{run_count} full training runs, recorded by `smartfrz harvest`. The label is `{label}`: {meaning}
{learned}

| family | data | regime | schedules | optimizers | runs |
|---|---|---|---|---|---|
{runs}

## Evaluation

Each model family, and each data set, was held out once; the scores are over all held-out rows together. A row is one unit at one
freezing stage. *Moment error* is the mean distance of the moment at which a unit freezes to that at which its label says so, as a
fraction of the run, each score with the threshold that is best on the other folds. *Frozen at a cost of 3 %* is the mean share of units
and time that is frozen when one threshold for all runs is set so that the mean cost, as above, is 3 %.

{scores}

{verdict}

Held out, fold by fold:

| held out | rows | ROC AUC | average precision |
|---|---|---|---|
{folds}

![Predicted probability against observed frequency](reliability.png)

## Limits

- It has seen small models and short runs only. What a freeze costs in accuracy on your task is for you to measure; the operating
  point `conservative` freezes later.
- It reads {window} snapshots, half a percent or one percent of the run apart.
"""

TOLD = "It is told, too, how far what leaves each unit, and what the model says, probe_features on 16 rows of the first training batch.\n"
LEARNED = {
    "label": "That is what the predictor has learned.",
    "kept": "The predictor has learned what share of that way stays, so that dear mistakes count for more; the probability of the "
    "label is fitted on top.",
}

MEANINGS = {
    "cka": "the linear CKA of the unit's output on held-out rows to that at the end of its run is, and stays, at least {x}.",
    "token-cka": "the linear CKA of single tokens of the unit's output on held-out rows to those at the end of its run is, and "
    "stays, at least {x}.",
    "settled": "at most 1 % of the change in linear CKA of the unit's output over the run is, and stays, still to come.",
    "rewind-cost": "the finished model, with its front up to the unit put back to that moment, loses at most {x:.0%} of what training "
    "gained in loss on held-out rows.",
    "rewind-shift": "in the finished model, putting the front up to the unit back to that moment probe_features the logits on held-out rows "
    "by at most {x:.0%} of how far the whole run has moved them (mean squares).",
}


def meaning(label: str) -> str:
    """What a label says, in words."""
    kind, _, threshold = label.rpartition("-")
    return MEANINGS[kind or label].format(x=float(threshold) if kind else None)


def score_table(part: dict[str, Any]) -> str:
    """The scores of predictor and rules as a Markdown table."""
    lines = [
        "| | ROC AUC | average precision | Brier score | moment error | frozen at a cost of 3 % |",
        "|---|---|---|---|---|---|",
    ]
    rules = sorted(part["rules"].items(), key=lambda item: -item[1]["ap"])
    for name, entry in [("**predictor**", part), *rules]:
        brier = f"{entry['brier']:.3f}" if "brier" in entry else ""
        scores = f"{entry['auc']:.3f} | {entry['ap']:.3f} | {brier} | {entry['moment_error']:.3f}"
        lines.append(f"| {name} | {scores} | {entry['frozen']:.1%} |")
    return "\n".join(lines)


def point_table(points: dict[str, dict[str, float]]) -> str:
    """The operating points as a Markdown table."""
    lines = [
        "| operating point | probability from | units frozen, over time | cost, mean over runs | worst run |",
        "|---|---|---|---|---|",
    ]
    for name, point in points.items():
        cost = f"{point['cost']:.1%} | {point['worst_cost']:.1%}"
        lines.append(f"| `{name}` | {point['threshold']:.3f} | {point['frozen']:.0%} | {cost} |")
    return "\n".join(lines)


def _verdict(evaluation: dict[str, Any]) -> str:
    margins = []
    for part, name in (("leave_one_family_out", "families"), ("leave_one_task_out", "tasks")):
        best, entry = max(evaluation[part]["rules"].items(), key=lambda item: item[1]["ap"])
        margin = evaluation[part]["ap"] - entry["ap"]
        word = "ahead of" if margin >= 0.01 else "level with" if margin > -0.01 else "behind"
        most, frozen = max(
            ((rule, entry["frozen"]) for rule, entry in evaluation[part]["rules"].items()), key=lambda x: x[1]
        )
        at_cost = f"{evaluation[part]['frozen']:.1%} frozen at a cost of 3 %, against {frozen:.1%} by *{most}*"
        margins.append(f"on {name} it has not seen, {word} *{best}* ({margin:+.3f}), and has {at_cost}")
    return f"Against the best simple rule in average precision, the predictor is {'; '.join(margins)}."


def write_card(name: str, evaluation: dict[str, Any]) -> str:
    """
    The card as Markdown.

    Args:
        name (`str`): of the predictor.
        evaluation (`dict`): what `smartfrz evaluate` wrote.
    """
    groups: dict[tuple, list[dict]] = {}
    for run in evaluation["runs"]:
        groups.setdefault((run["family"], run["data"], run["regime"]), []).append(run)
    runs = "\n".join(
        f"| {' | '.join(key)} | {', '.join(sorted({run['schedule'] for run in part}))} "
        f"| {', '.join(sorted({run['optimizer'] for run in part}))} | {len(part)} |"
        for key, part in sorted(groups.items())
    )
    scores = "\n\n".join(
        f"Leave one {what} out ({evaluation[part]['rows']:,} rows, {evaluation[part]['positive']:.0%} positive):\n\n"
        + score_table(evaluation[part])
        for part, what in (("leave_one_family_out", "model family"), ("leave_one_task_out", "data set"))
    )
    folds = "\n".join(
        f"| {name} | {fold['rows']:,} | {fold['auc']:.3f} | {fold['ap']:.3f} |"
        for part in ("leave_one_family_out", "leave_one_task_out")
        for name, fold in evaluation[part]["folds"].items()
    )
    return CARD.format(
        name=name,
        window=evaluation["config"]["window"],
        weights_per_unit=evaluation["config"]["weights_per_unit"],
        told=TOLD if evaluation["config"]["front_probe"] else "",
        parameters=evaluation["parameters"],
        decision_ms_32_blocks=evaluation["decision_ms_32_blocks"],
        run_count=len(evaluation["runs"]),
        label=evaluation["label"],
        meaning=meaning(evaluation["label"]),
        learned=LEARNED[evaluation["target"]],
        points=point_table(evaluation["operating_points"]),
        runs=runs,
        scores=scores,
        folds=folds,
        verdict=_verdict(evaluation),
    )
