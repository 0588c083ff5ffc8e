"""The ledger: a table for people, plain values for trackers and checkpoints."""

import json

import pytest
from training import smartfrz, train

from smartfrz_hf import Ledger
from smartfrz_hf.cost.ledger import CacheSavings, Flops, Stage, StartStage

UNITS = ["stem", "block.0", "block.1"]


def ledger(**changes):
    flops = {unit: Flops(10, 20) for unit in (*UNITS, "head")}
    values = {
        "units": UNITS,
        "unit_parameters": {"stem": 1000, "block.0": 2500, "block.1": 2500, "head": 10},
        "max_steps": 100,
        "stages": [Stage(20, 1, ["stem"], "settled"), Stage(60, 2, ["block.0"], "settled")],
        "spent": Flops(40, 50),
        "full": Flops(40, 80),
        "unit_flops": flops | {"stem": Flops(10, 5)},
        "full_unit_flops": flops,
        "frozen_parameters": 3500,
        "trainable_parameters": 6010,
    }
    return Ledger(**values | changes)


def test_the_summary_is_a_table_of_units_with_totals():
    assert str(ledger()).splitlines() == [
        "unit     trainable  froze at step  compute saved",
        "------------------------------------------------",
        "stem         1,000             20          50.0%",
        "block.0      2,500             60           0.0%",
        "block.1      2,500              -           0.0%",
        "head            10              -           0.0%",
        "------------------------------------------------",
        "frozen now: 2 of 3 units, 3,500 of 6,010 trainable parameters (58.2%)",
        "compute saved: 25.0% (90 of 120 FLOPs spent)",
    ]
    cache = CacheSavings(rows=1200, hits=900, seconds_saved=1.5, bytes_memory=10**6, off="it does not pay")
    assert ledger(cache=cache).summary().splitlines()[-1] == (
        "activation cache: 75.0% of 1,200 rows found, 1.5 s saved, 1.0 MB held; turned off: it does not pay"
    )
    assert ledger(cache=CacheSavings()).summary().splitlines()[-1] == "activation cache: not used"
    cache = CacheSavings(off="no training row comes again")
    assert ledger(cache=cache).summary().endswith("cache: not used; no training row comes again")
    cache = CacheSavings(rows=8, seconds_saved=-0.62)
    assert ", 0.6 s lost, " in ledger(cache=cache).summary()


def test_the_start_stage_is_told():
    start = StartStage(8, 2, "it is cheap", 1.25, [0.0, 0.1, 0.3, 0.4], [0.0, 0.1, 0.4, 9.0])
    assert ledger(start=start).summary().splitlines()[-1] == (
        "start stage, after 8 steps: froze 2 units (it is cheap; the rest trains at 1.25 times the learning rate)"
    )
    start.depth = 1
    assert str(start).startswith("froze 1 unit (")
    start.depth = 0
    assert str(start) == (
        "froze nothing (no front is within the limits; the first unit alone is predicted to cost 0.1 points)"
    )
    start.points_lost = None
    assert str(start) == "froze nothing (it is cheap)"
    again = Ledger()
    again.load_state_dict(json.loads(json.dumps(ledger(start=start).state_dict())))
    assert again.start == start


def test_a_ledger_without_a_run_says_so(tmp_path):
    assert "not begun" in str(Ledger()) and Ledger().summary() == str(Ledger())
    assert Ledger().compute_saved == Ledger().frozen_fraction == Ledger().depth == 0
    Ledger().plot(tmp_path / "empty.png")
    assert "?" in str(Ledger(units=UNITS)), "a run that has not taken a step yet"


def test_a_real_run_fills_the_table(tmp_path):
    callback = smartfrz(0.9, first_decision=5, max_depth=2, activation_cache=False)
    assert "not begun" in str(callback.ledger)
    train(tmp_path, [callback], max_steps=10)
    lines = str(callback.ledger).splitlines()
    assert [line.split()[0] for line in lines[2:8]] == [*callback.ledger.units, "head"]
    assert lines[2].split()[2] == "5" and lines[2].split()[1] == f"{callback.ledger.unit_parameters['stem']:,}"
    assert sum(callback.ledger.unit_parameters.values()) == callback.ledger.trainable_parameters
    saved = callback.ledger.unit_compute_saved
    assert saved[callback.ledger.units[1]] > 0 and saved["head"] == 0


def test_units_that_train_again_are_frozen_no_more():
    again = Stage(80, 0, ["stem", "block.0"], "the learning rate rises again")
    run = ledger(stages=[*ledger().stages, again, Stage(90, 1, ["stem"], "settled")])
    assert run.freeze_steps == {"stem": 90}
    assert run.frozen_spans == {"stem": [(20, 80), (90, 100)], "block.0": [(60, 80)]}
    assert ledger(max_steps=0).freeze_steps == ledger().freeze_steps == {"stem": 20, "block.0": 60}


def test_state_goes_through_json():
    run = ledger(decisions=7, cache=CacheSavings(rows=8, hits=6, seconds_saved=1.5, bytes_memory=9, off="full"))
    state = json.loads(json.dumps(run.state_dict()))
    other = Ledger(units=UNITS, max_steps=100, cache=CacheSavings())
    other.load_state_dict(state)
    assert other.stages == run.stages and other.decisions == 7 and other.frozen_parameters == 3500
    assert other.cache == CacheSavings(rows=8, hits=6, seconds_saved=1.5), "what it holds is not in the checkpoint"
    Ledger().load_state_dict(state)  # without a cache


def test_cache_savings_are_logged_where_there_is_a_cache():
    assert not any("cache" in key for key in ledger().logs())
    assert ledger().to_dict()["cache"] is None
    assert CacheSavings().hit_rate == 0
    savings = CacheSavings(rows=8, hits=6, seconds_saved=1.5, bytes_memory=100, bytes_disk=20, bytes_read=700)
    logs = ledger(cache=savings).logs()
    assert logs["freeze/cache_hit_rate"] == 0.75
    assert logs["freeze/cache_bytes"] == 120
    assert logs["freeze/cache_seconds_saved"] == 1.5
    plain = json.loads(json.dumps(ledger(cache=savings).to_dict()))
    assert plain["cache"]["hits"] == 6 and plain["cache"]["off"] is None
    assert plain["freeze/compute_saved"] == pytest.approx(0.25)
