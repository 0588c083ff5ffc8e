"""What all example scripts have in common."""

import dataclasses

import evaluate
import pytest


def test_metrics_of_evaluate_come_first(examples, monkeypatch):
    from common import load_metric

    class Metric:
        def compute(self, predictions, references):
            return {"accuracy": 0.5}

    def fallback(predictions, references):
        return {"accuracy": 0.25}

    assert load_metric("accuracy", None, fallback, None)([1], [1]) == {"accuracy": 0.25}
    monkeypatch.setattr(evaluate, "load", lambda *args, **kwargs: Metric())
    assert load_metric("accuracy", None, fallback, None)([1], [1]) == {"accuracy": 0.5}


@pytest.mark.parametrize("script", ["run_glue", "run_image_classification"])
def test_every_option_is_explained(script, request):
    module = request.getfixturevalue(script)
    for arguments in (module.ModelArguments, module.DataTrainingArguments):
        for field in dataclasses.fields(arguments):
            assert field.metadata["help"].endswith("."), field.name


@pytest.mark.parametrize("script", ["run_glue", "run_image_classification", "run_glue_no_trainer"])
def test_help(script, request, capsys):
    with pytest.raises(SystemExit, match="0"):
        request.getfixturevalue(script).main(["--help"])
    printed = capsys.readouterr().out
    assert "--smartfrz_freeze_threshold" in printed
    assert "--max_train_samples" in printed
