"""Two real processes under FSDP2 (gloo): the run that DDP makes, and nothing reduced, gathered or kept for what is frozen."""

import json

import pytest
import torch
from launching import STAGES, launch, launch_by_command, results
from safetensors.torch import load_file
from versions import RENAMED, resume_on_two_cpu_ranks

pytestmark = pytest.mark.slow

# What a run has to survive: everything trains again at step 8, where a checkpoint is written; evaluations; accumulation.
RESTARTS = {
    "warmup_steps": 0,
    "lr_scheduler_type": "cosine_with_restarts",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "eval_strategy": "steps",
    "eval_steps": 4,
}
RESTARTED = ["--accumulation=2", "--stages", json.dumps({3: 3, 8: 0, 10: 2}), "--arguments", json.dumps(RESTARTS)]


def same(found, weights, other, other_weights):
    """Whether two runs froze at the same steps and ended at the same weights, but for rounding."""
    assert [part["stages"] for part in found] == [part["stages"] for part in other]
    assert found[0]["losses"] == pytest.approx(other[0]["losses"], abs=1e-5)
    for key, value in weights.items():
        torch.testing.assert_close(value, other_weights[key], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp") / "sharded"
    return folder, *results(folder, "--fsdp=launcher", "--front", recipe="fsdp2_cpu")


@pytest.fixture(scope="module")
def restarted(tmp_path_factory):
    if not RENAMED:
        pytest.skip("Accelerate 1.10 refuses FSDP2 without an accelerator when the Trainer's arguments ask for it")
    folder = tmp_path_factory.mktemp("fsdp") / "restarted"
    return folder, *results(folder, "--fsdp=arguments", *RESTARTED)


def test_fsdp2_trains_as_ddp(sharded, tmp_path):
    """`run.py` holds each snapshot against one of the whole weights, bit for bit."""
    other, other_weights = results(tmp_path / "ddp", "--front")
    assert other[0]["stages"] == STAGES
    for step, changes in other[0]["changes"].items():
        assert torch.tensor(sharded[1][0]["changes"][step]).allclose(torch.tensor(changes), rtol=5e-3, atol=1e-8)
    assert list(other[0]["changes"]) == [str(step) for step in range(1, 16)]
    same(sharded[1], sharded[2], other, other_weights)
    assert [part["states"] for part in sharded[1]] == [part["states"] for part in other]


def test_lora(tmp_path):
    """The samples of a sharded adapter are those of a whole one, which the script checks at each step."""
    found, weights = results(tmp_path / "fsdp", "--fsdp=launcher", "--lora", recipe="fsdp2_cpu")
    same(found, weights, *results(tmp_path / "ddp", "--lora"))
    history = load_file(tmp_path / "fsdp" / "history-0.safetensors")["history"]
    assert history[1:].any()


def test_a_front_that_freezes_after_the_pilot_has_the_weights_of_the_start(tmp_path):
    """Under DDP and FSDP2, and in a run that is resumed in the pilot."""
    words = ["--pilot=0.1", "--steps=40", "--stages", json.dumps({4: 2}), "--arguments", json.dumps({"save_steps": 2})]
    found, weights = results(tmp_path / "ddp", *words)
    other, other_weights = results(tmp_path / "sharded", "--fsdp=launcher", *words, recipe="fsdp2_cpu")
    assert other[0]["losses"] == pytest.approx(found[0]["losses"], abs=1e-4)  # the raised rate also raises rounding
    start = load_file(tmp_path / "ddp" / "start-0.safetensors")
    frozen = [key for key in start if "embeddings" in key or "layer.0." in key]
    for end in (weights, other_weights):
        assert all(torch.equal(start[key], end[key]) for key in frozen)
        assert not torch.equal(start["classifier.weight"], end["classifier.weight"])
    for part in (*found, *other):
        assert part["stages"] == [[4, 2]] and len(part["pilots"]) == 1
        for key, values in found[0]["pilots"][0].items():
            assert part["pilots"][0][key] == pytest.approx(values, rel=1e-3, abs=1e-12), key


@resume_on_two_cpu_ranks
def test_resuming_in_the_pilot(tmp_path):
    words = ["--pilot=0.1", "--steps=40", "--stages", json.dumps({4: 2}), "--arguments", json.dumps({"save_steps": 2})]
    for recipe, kind in (("ddp_cpu", []), ("fsdp2_cpu", ["--fsdp=launcher"])):
        whole, weights = results(tmp_path / recipe, *kind, *words, recipe=recipe)
        resume = f"--resume={tmp_path / recipe / 'checkpoint-2'}"
        again, same_weights = results(tmp_path / f"{recipe}-again", *kind, *words, resume, recipe=recipe)
        assert again[0]["pilots"] == whole[0]["pilots"] and again[0]["losses"] == whole[0]["losses"]
        assert all(torch.equal(value, same_weights[key]) for key, value in weights.items())


def test_nothing_crosses_for_what_is_frozen(sharded):
    for part in sharded[1]:
        assert part["sent"] == part["active"]
        at = {step: part["sent"][step] for step in (0, 5, 9, 13)}
        assert at[0] > at[5] > at[9] > at[13] > 0
        assert part["sent"] == [at[max(begin for begin in at if begin <= step)] for step in range(16)]
        # Four blocks and the word embeddings are gathered for the backward pass, as far as it goes.
        if RENAMED:  # torch 2.7 gathers one fewer
            assert part["gathers"] == [5] * 5 + [3] * 4 + [2] * 4 + [0] * 3
        assert not any("embeddings" in name or "layer.0." in name for name in part["states"][-1])


@resume_on_two_cpu_ranks
@pytest.mark.parametrize("step", [4, 12])
def test_resuming_equals_never_having_stopped(sharded, tmp_path, step):
    resume = f"--resume={sharded[0] / f'checkpoint-{step}'}"
    found, weights = results(tmp_path / "again", "--fsdp=launcher", "--front", resume, recipe="fsdp2_cpu")
    assert all(torch.equal(value, sharded[2][key]) for key, value in weights.items())
    assert found[0]["stages"] == STAGES and found[0]["losses"] == sharded[1][0]["losses"]
    assert found[0]["spent"] == sharded[1][0]["spent"]
    assert found[0]["changes"] == {key: value for key, value in sharded[1][0]["changes"].items() if int(key) > step}
    for name in ("sent", "gathers", "states"):
        assert found[1][name] == sharded[1][1][name][step:]


def test_units_train_again(restarted, tmp_path):
    found, weights = restarted[1:]
    assert found[0]["stages"] == [[3, 3], [8, 0], [10, 2]]
    same(found, weights, *results(tmp_path / "ddp", *RESTARTED))
    assert found[0]["sent"] == found[0]["active"]


@resume_on_two_cpu_ranks
def test_resuming_where_units_train_again(restarted, tmp_path):
    """The checkpoint is a whole state dictionary, and holds no optimizer state of them."""
    found, weights = results(
        tmp_path / "again", "--fsdp=arguments", *RESTARTED, f"--resume={restarted[0] / 'checkpoint-8'}"
    )
    assert all(torch.equal(value, restarted[2][key]) for key, value in weights.items())
    assert found[0]["stages"] == restarted[1][0]["stages"] and found[0]["losses"] == restarted[1][0]["losses"]


def test_callback_alone(sharded, tmp_path):
    """It works where no checkpoint is written, and says why not where one is."""
    alone = ["--fsdp=launcher", "--alone=do not find"]
    found, weights = results(
        tmp_path / "alone", *alone, "--arguments", json.dumps({"save_strategy": "no"}), recipe="fsdp2_cpu"
    )
    assert all(torch.equal(value, sharded[2][key]) for key, value in weights.items())
    assert found[0]["sent"] == sharded[1][0]["sent"]
    done = launch(tmp_path / "refused", *alone, recipe="fsdp2_cpu")
    assert done.returncode != 0 and "Use `SmartFRZTrainer`, or add `SmartFRZMixin`" in done.stderr


def test_without_an_accelerator_it_is_ddp_and_says_so(tmp_path):
    done = launch_by_command(tmp_path / "ddp", "--steps=2", recipe="fsdp2_cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "asks for FSDP and uses DDP" in done.stderr
