"""The model card of a fitted predictor, written from what the fit measured."""

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
{samples} sampled weights of each unit of a model in training, it says how likely it is that the unit's representation
already is, and will stay, what it is at the end of the run. It has {parameters:,} parameters and is
no language or vision model of its own.

```python
from transformers import Trainer
from smartfrz_hf import SmartFRZCallback, SmartFRZConfig

trainer = Trainer(..., callbacks=[SmartFRZCallback(SmartFRZConfig(predictor="…/{name}"))])
```

`predictor` is the Hub id or the folder of this repository; `smartfrz-base` is the one that is used when none is named.

## Training data

{run_count} full training runs, recorded by `smartfrz harvest`. The label comes from the linear CKA of a unit's output on
{probe_rows} held-out rows to the same unit at the end of its own run: a unit counts as settled from the moment on which at most
{change_left:.0%} of its change over the run is, and stays, still to come, or the CKA is at least {cka}.

| run | family | data | from scratch | steps | units | used for |
|---|---|---|---|---|---|---|
{runs}

## Evaluation

One row is one unit at one freezing stage. {held_out}
The label and the network's sizes were chosen with these runs in view, so their scores are those of a validation set.

| | rows | settled | ROC AUC | average precision | Brier score |
|---|---|---|---|---|---|
{scores}

Simple rules on the same held-out rows, as rankings:

| rule | ROC AUC | average precision |
|---|---|---|
{rules}

{verdict}

## Limits

- It has seen {families} models only, small ones, in short runs with a linear learning-rate schedule and AdamW.
- High similarity to the end of a run does not by itself make freezing safe: what a freeze costs in accuracy on your task is
  for you to measure. Raise `freeze_threshold` to freeze later.
- It reads `window` and `samples` as it was fitted with, a snapshot every half percent of the run.
"""


def _verdict(evaluation: dict[str, Any]) -> str:
    best, ranked = max(evaluation["rules"].items(), key=lambda item: item[1]["ap"])
    margin = evaluation["ap"] - ranked["ap"]
    if margin >= 0.01:
        return f"The predictor is ahead of the best of them, *{best}*, by {margin:.3f} in average precision."
    word = "ties with" if margin > -0.01 else "is behind"
    return (
        f"The predictor {word} the best of them, *{best}* ({margin:+.3f} in average precision): on these runs, knowing where "
        "and when is worth as much as knowing how the weights move. What it gives beyond a ranking is a probability."
    )


def write_card(name: str, summary: dict[str, Any]) -> str:
    """
    The card as Markdown.

    Args:
        name (`str`): of the predictor.
        summary (`dict`): what `smartfrz fit` measured, as it writes it to its results file.
    """
    runs = "\n".join(
        f"| {run['name']} | {run['family']} | {run['data']} | {'yes' if run['from_scratch'] else 'no'} | {run['steps']} "
        f"| {run['units']} | {run['used_for']} |"
        for run in summary["runs"]
    )
    scores = "\n".join(
        f"| {label} | {part['rows']} | {part['positive']:.0%} | {part['auc']:.3f} | {part['ap']:.3f} | {part['brier']:.3f} |"
        for label, part in (("training", summary["training"]), ("held out", summary["held_out"]))
    )
    rules = "\n".join(
        f"| {rule} | {part['auc']:.3f} | {part['ap']:.3f} |" for rule, part in summary["held_out"]["rules"].items()
    )
    used = [run for run in summary["runs"] if run["used_for"] == "training"]
    return CARD.format(
        name=name,
        window=summary["config"]["window"],
        samples=summary["config"]["samples"],
        parameters=summary["parameters"],
        run_count=len(summary["runs"]),
        probe_rows=summary["probe_rows"],
        cka=summary["cka"],
        change_left=summary["change_left"],
        runs=runs,
        held_out=summary["held_out_rule"],
        scores=scores,
        rules=rules,
        verdict=_verdict(summary["held_out"]),
        families=" and ".join(sorted({run["family"] for run in used})),
    )
