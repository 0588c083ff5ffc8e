"""What a user types first works, each in a fresh interpreter that has no network."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each starts an interpreter

UTILS = Path(__file__).parent / "utils"
SET_UP = f"""
import sys, tempfile
sys.path.insert(0, {str(UTILS)!r})
from smartfrz_hf import *
from training import Rows, arguments, build, train
folder = tempfile.mkdtemp()
"""

GUESSES = {
    "operating point": """
        callback = SmartFRZCallback(operating_point="conservative")
        assert callback.config.operating_point == "conservative"
        assert callback.policy.threshold == load_predictor().config.operating_points["conservative"]
    """,
    "policy by name": """
        callback = SmartFRZCallback(policy="static", static_depth=4)
        train(folder, [callback])
        assert len(callback.ledger.freeze_steps) == 4
    """,
    "policy of one's own": """
        class MyPolicy(Policy):
            def decide(self, observation):
                return Decision(2 if observation.step >= 10 else 0, "half of the run")
        callback = SmartFRZCallback(policy=MyPolicy())
        train(folder, [callback])
        assert callback.ledger.freeze_steps == {"stem": 10, "bert.encoder.layer.0": 10}
        register_policy("mine", lambda config: MyPolicy())
        callback = SmartFRZCallback(policy="mine")
        train(folder, [callback])
        assert callback.ledger.depth == 2
    """,
    "predictor from a folder": """
        load_predictor().save_pretrained(folder)
        for callback in (SmartFRZCallback(predictor=folder), SmartFRZCallback(SmartFRZConfig(predictor=folder))):
            assert callback.policy.predictor.config.window == 20
    """,
    "predictor on the Hub": """
        try:
            SmartFRZCallback(predictor="user/repo")
        except OSError as error:
            assert "user/repo" in str(error) and "Hub" in str(error)
        else:
            raise AssertionError("there is no network")
    """,
    "predictor in the package": """
        assert SmartFRZCallback(SmartFRZConfig(predictor="smartfrz-base")).policy.threshold == 0.99
    """,
    "configuration in a folder": """
        SmartFRZConfig(operating_point="aggressive", cache_memory="8GB").save_pretrained(folder)
        config = SmartFRZConfig.from_pretrained(folder)
        assert config.operating_point == "aggressive" and config.cache_memory == 8e9
        try:
            SmartFRZConfig.from_pretrained("user/repo")
        except OSError as error:
            assert "user/repo" in str(error)
        assert callable(config.push_to_hub)
    """,
    "dict for the trainer": """
        trainer = SmartFRZTrainer(build("bert"), arguments(folder), train_dataset=Rows(), smartfrz={"policy": "never"})
        trainer.train()
        assert trainer.ledger.freeze_steps == {}
        trainer = SmartFRZTrainer(build("bert"), arguments(folder), train_dataset=Rows(), policy="linear")
        assert trainer.smartfrz.config.policy == "linear"
    """,
    "units": """
        units = find_blocks(build("bert"))
        assert [unit.name for unit in units] == units.names and units[0].name == "stem" and len(units) == 5
        assert units[-1].name == "bert.encoder.layer.3"
        assert len(repr(units).splitlines()) >= 5 and "bert.encoder.layer.3" in repr(units)
    """,
    "ledger": """
        callback = SmartFRZCallback(policy="static", static_depth=2)
        print(callback.ledger)
        train(folder, [callback])
        text = callback.ledger.summary()
        assert str(callback.ledger) == text
        assert "bert.encoder.layer.0" in text and "parameters" in text.lower() and "saved" in text.lower()
        callback.ledger.plot(folder + "/timeline.png")
        import os; assert os.path.getsize(folder + "/timeline.png") > 1000
    """,
    "nothing before training": """
        callback = SmartFRZCallback()
        assert callback.run is None and callback.ledger.freeze_steps == {} and callback.ledger.depth == 0
        callback.release(), callback.save(folder), callback.ledger.logs(), callback.ledger.to_dict(), repr(callback.ledger)
        trainer = SmartFRZTrainer(build("bert"), arguments(folder), train_dataset=Rows())
        trainer.evaluate(Rows(8)), trainer.predict(Rows(8)), trainer.ledger.summary(), trainer.save_model(folder)
        trainer.log({"loss": 1.0}), trainer.floating_point_ops({})
    """,
    "names at the top": """
        import smartfrz_hf
        for name in ("Policy", "register_policy", "push_predictor", "FreezingRun", "SmartFRZArguments", "Decision"):
            assert name in smartfrz_hf.__all__ and getattr(smartfrz_hf, name).__doc__
    """,
}


@pytest.mark.parametrize("guess", GUESSES)
def test_first_guess(guess):
    lines = [line.removeprefix("        ") for line in GUESSES[guess].splitlines()]
    done = subprocess.run([sys.executable, "-c", SET_UP + "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_making_a_callback_prints_nothing():
    code = "from smartfrz_hf import SmartFRZCallback; SmartFRZCallback()"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_unknown_options_and_bad_values_are_refused_with_the_legal_ones():
    from smartfrz_hf import SmartFRZCallback, SmartFRZConfig

    with pytest.raises(TypeError, match="operating_pont"):
        SmartFRZCallback(operating_pont="balanced")
    with pytest.raises(ValueError, match=r"`policy` is 'statik'; it must be one of .*'static'"):
        SmartFRZCallback(policy="statik")
    with pytest.raises(ValueError, match="`cache_memory`: '8 apples' is no size"):
        SmartFRZConfig(cache_memory="8 apples")
    with pytest.raises(ValueError, match="`cache_memory` is -1"):
        SmartFRZConfig(cache_memory=-1)
