"""The configuration validates itself, says the remedy, and is a command line."""

import json
import pickle
from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from smartfrz_hf import SmartFRZArguments, SmartFRZConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "magic"}, "'linear', 'never', 'smartfrz', 'static'"),
        ({"freeze_threshold": 1.2}, r"between 0 and 1"),
        ({"freeze_threshold": -0.1}, r"between 0 and 1"),
        ({"freeze_threshold": float("nan")}, r"between 0 and 1"),
        ({"record_every": 0}, "whole number of steps"),
        ({"decide_every": 2.5}, "whole number of steps"),
        ({"first_decision": -1}, "whole number of steps"),
        ({"static_depth": -1}, "whole number of units"),
        ({"static_depth": 1.5}, "whole number of units"),
        ({"linear_start": 1}, "must be below 1"),
        ({"linear_depth": 2}, r"between 0 and 1"),
        ({"max_depth": -1}, "at least 0"),
        ({"sampling_seed": -1}, "at least 0"),
        ({"blocks": []}, "at least one name"),
        ({"blocks": [3]}, "a list of names or patterns"),
        ({"stem": [None]}, "a list of names or patterns"),
        ({"predictor": ""}, "a name or a folder, or left out"),
        ({"policy": "statc"}, "; did you mean 'static'?"),
        ({"order": "independendt"}, "'front', 'independent'; did you mean 'independent'?"),
        ({"operating_point": "balncd"}, "'aggressive'; did you mean 'balanced'?"),
        ({"operating_point": "Balanced"}, "; did you mean 'balanced'?"),
        ({"operating_point": "xyz"}, "'aggressive'.$"),
        ({"when_all_frozen": "keeplast"}, "; did you mean 'keep_last'?"),
        ({"cache_dtype": "float61"}, "; did you mean 'float16'?"),
        ({"frozen_dtype": "bflot16"}, "; did you mean 'bfloat16'?"),
    ],
)
def test_values_that_cannot_work_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SmartFRZConfig(**values)


def test_steps():
    config = SmartFRZConfig(record_every=0.005, first_decision=0.05, decide_every=7)
    assert [config.steps("record_every", n) for n in (10, 200, 1000)] == [1, 1, 5]
    assert [config.steps("first_decision", n) for n in (10, 99, 100)] == [1, 4, 5]
    assert config.steps("decide_every", 1000) == 7


def test_a_fraction_loses_no_step_to_rounding():
    """`0.29 * 100` is 28.999999999999996."""
    steps = [
        SmartFRZConfig(first_decision=hundredths / 100).steps("first_decision", 100) for hundredths in range(1, 100)
    ]
    assert steps == list(range(1, 100))


def test_is_a_command_line_beside_training_arguments(tmp_path):
    parser = HfArgumentParser((TrainingArguments, SmartFRZConfig))
    words = ["--output_dir", str(tmp_path), "--policy", "static", "--static_depth", "2", "--blocks", "a.*", "b.*"]
    config = parser.parse_args_into_dataclasses(words)[1]
    assert (config.policy, config.static_depth, config.blocks) == ("static", 2.0, ["a.*", "b.*"])
    assert parser.parse_args_into_dataclasses(["--output_dir", "x"])[1] == SmartFRZConfig()
    help_text = parser.format_help()
    assert "How early units freeze: " in " ".join(help_text.split())


@pytest.mark.parametrize("options", [SmartFRZConfig(policy="linear"), SmartFRZArguments(smartfrz_policy="linear")])
def test_options_can_be_pickled(options):
    """As a launcher does that starts processes."""
    assert pickle.loads(pickle.dumps(options)) == options


def test_every_option_is_explained_in_the_docstring():
    assert [option.name for option in fields(SmartFRZConfig) if not option.metadata["help"].endswith(".")] == []


def test_saves_and_loads(tmp_path, caplog):
    config = SmartFRZConfig(policy="linear", linear_depth=0.25, blocks=["x"])
    config.save_pretrained(tmp_path)
    assert SmartFRZConfig.from_pretrained(tmp_path) == config
    file = tmp_path / "smartfrz_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of_tomorrow": 1}))
    from transformers.utils import logging

    logging.enable_propagation()
    assert SmartFRZConfig.from_pretrained(tmp_path) == config
    logging.disable_propagation()
    assert sum("of_tomorrow" in record.message for record in caplog.records) == 1


def test_a_folder_without_a_configuration_is_told(tmp_path):
    with pytest.raises(OSError, match="has no smartfrz_config.json"):
        SmartFRZConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_cache", "false"),
        ("unfreeze_on_restart", 0),
        ("max_depth", 2.5),
        ("max_depth", True),
        ("max_depth", "3"),
        ("sampling_seed", "a"),
        ("static_depth", None),
        ("freeze_threshold", "0.9"),
        ("cache_memory", None),
        ("predictor", 3),
        ("blocks", 5),
    ],
)
def test_values_of_another_type_are_refused(name, value):
    with pytest.raises(TypeError, match=f"`{name}` is .* it must be of type"):
        SmartFRZConfig(**{name: value})


def test_one_name_of_blocks_needs_no_list():
    assert SmartFRZConfig(blocks="encoder.layer.*").blocks == ["encoder.layer.*"]
