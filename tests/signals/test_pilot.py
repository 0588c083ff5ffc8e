"""The pilot: what it shows of the units, and the weights that a front which freezes at its end goes back to."""

import pytest
import torch
from architectures import build
from resuming import assert_same_end, run
from torch.utils.data import DataLoader
from training import Rows

from smartfrz_hf import Decision, FreezingRun, Policy, SmartFRZConfig, find_blocks
from smartfrz_hf.signals.pilot import MIN_STEPS, Pilot, pilot_steps

STEPS, OPTIONS = 40, {"first_decision": 10, "decide_every": 10}


class StartAt(Policy):
    """Freezes some units at the end of the pilot, and notes what it was shown."""

    pilot = 0.1

    def __init__(self, depth):
        self.depth, self.seen = depth, []

    def decide(self, observation):
        if observation.pilot is None:
            return Decision(observation.depth, "no pilot")
        self.seen.append(observation)
        return Decision(self.depth, "at the start")


def loop(run, model, optimizer, steps=STEPS):
    torch.manual_seed(0)
    loader = DataLoader(Rows(4 * steps), batch_size=4)
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if run is not None:
            run.step()


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_the_front_keeps_the_weights_of_the_start(name):
    model = build(name)
    images = name == "resnet"
    first = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer, policy = torch.optim.AdamW(model.parameters(), lr=1e-3), StartAt(2)
    with FreezingRun(model, optimizer, STEPS, SmartFRZConfig(**OPTIONS), policy=policy) as started:
        for batch in DataLoader(Rows(4 * STEPS, images=images), batch_size=4):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            started.step()
            if started.steps_done < 4:  # in the pilot everything trains
                assert started.depth == 0 and all(p.requires_grad for p in model.parameters())
        assert started.observer.pilot is None, "the copy of the weights is given back"
    assert started.ledger.freeze_steps == dict.fromkeys(started.stack.names[:2], 4)
    frozen = {
        f"{prefix}.{key}"
        for unit in started.stack.units[:2]
        for prefix, module in unit.modules.items()
        for key in module.state_dict()
    }
    for key, value in model.state_dict().items():
        same = torch.equal(value, first[key])
        assert same or key not in frozen, key
    assert any(not torch.equal(value, first[key]) for key, value in model.state_dict().items() if key not in frozen)
    (seen,) = policy.seen
    assert seen.step == 4 and seen.savings[0] == 0 and seen.savings == sorted(seen.savings)
    # All steps after the pilot save what was announced; the pilot saves nothing.
    assert started.ledger.compute_saved == pytest.approx(seen.savings[2] * (STEPS - 4) / STEPS, rel=0.02)


def test_rows_that_go_on_training_stay_trained():
    """Of an embedding table of which only some rows are trained, by a gradient hook."""
    model = build("bert")
    table = model.get_input_embeddings().weight
    table.register_hook(lambda gradient: torch.cat([torch.zeros_like(gradient[:50]), gradient[50:]]))
    first = table.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with FreezingRun(model, optimizer, STEPS, SmartFRZConfig(**OPTIONS), policy=StartAt(2)) as started:
        for number, batch in enumerate(DataLoader(Rows(4 * STEPS), batch_size=4)):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            before = table.detach().clone()
            started.step()
            assert torch.equal(table, before), f"step {number}"
    assert torch.equal(table[:50], first[:50]) and not torch.equal(table[50:], first[50:])


def test_signals_against_gradients_at_all_weights():
    """Units of at most 1,024 weights are read whole, so that each signal is known."""
    model = build("bert")
    stack = find_blocks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pilot, unit = Pilot(stack, seed=0), 1
    matrices = [p for p in stack[unit].named_parameters().values() if p.dim() >= 2]
    assert sum(p.numel() for p in matrices) >= 1024
    gradients, weights = [], []
    for batch in DataLoader(Rows(20), batch_size=4):
        model(**batch).loss.backward()
        pilot.before_update()
        gradients.append(pilot._sampler.read_gradients([unit])[0].double())
        weights.append(pilot._sampler.read([unit])[0].double())
        optimizer.step()
        optimizer.zero_grad()
    rates = torch.tensor([0.0, 0.5, 1.0, 1.0, 0.5])
    signals = pilot.signals(rates)
    count = len(gradients[0])
    squares = sum(g.square().sum() for g in gradients)
    assert signals.steps == 5 and signals.parameters[unit] == stack[unit].parameter_count
    assert signals.parameters[-1] == sum(p.numel() for p in stack.head_parameters().values())
    assert signals.gradient[unit] == pytest.approx(float((squares / 5 / count).sqrt()), rel=1e-5)
    change = sum(float((gradients[t + 1] * (weights[t + 1] - weights[t])).sum()) for t in range(4)) / count
    assert signals.loss_change[unit] == pytest.approx(change, rel=1e-3)
    end = pilot._sampler.read([unit])[0].double()
    assert signals.displacement[unit] == pytest.approx(float((end - weights[0]).square().mean().sqrt()), rel=1e-5)
    steps = torch.stack([*weights, end]).diff(dim=0).square().mean()
    motion = (steps / weights[0].square().mean() / 0.5).sqrt()  # the mean square of the rates is 0.5
    assert signals.motion[unit] == pytest.approx(float(motion), rel=1e-5)
    assert len(signals.motion) == len(stack) + 1


def test_length():
    assert pilot_steps(0, 1000) == 0
    assert pilot_steps(0.03, 1000) == 30
    assert pilot_steps(0.03, 50) == MIN_STEPS
    assert pilot_steps(0.03, 39) == 0, "four steps would be more than a tenth"


def test_the_rate_of_the_rest_rises_in_the_steps_only():
    """As much as the front had brought of the change of the loss; nobody else sees it, and it is there after a resume."""
    ends = []
    for compensate in (True, False):
        model = build("bert")
        optimizer, policy = torch.optim.SGD(model.parameters(), lr=0.01), StartAt(2)
        config = SmartFRZConfig(**OPTIONS, compensate_rate=compensate)
        with FreezingRun(model, optimizer, STEPS, config, policy=policy) as started:
            torch.manual_seed(0)
            for number, batch in enumerate(DataLoader(Rows(4 * STEPS), batch_size=4)):
                before = model.classifier.weight.detach().clone()
                model(**batch).loss.backward()
                gradient = model.classifier.weight.grad.clone()
                optimizer.step()
                optimizer.zero_grad()
                assert optimizer.param_groups[0]["lr"] == 0.01
                rate = 0.01 * started.front.rate.factor
                torch.testing.assert_close(model.classifier.weight.detach(), before - rate * gradient)
                started.step()
                if number == 10:
                    state = started.state_dict()
        ends.append(started.front.rate.factor)
    factor = policy.seen[0].pilot.rate_factor(2)
    assert ends == [factor, 1.0] and 1 < factor <= 4
    assert state["rate_factor"] == 1.0


def test_the_rate_is_put_back_when_everything_trains_again():
    model = build("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, STEPS // 2)
    policy = StartAt(3)
    policy.history_size = (4, 32)
    with FreezingRun(
        model, optimizer, STEPS, SmartFRZConfig(**OPTIONS), lr_scheduler=schedule, policy=policy
    ) as started:
        factors = []
        for batch in DataLoader(Rows(4 * STEPS), batch_size=4):
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            started.step()
            factors.append(started.front.rate.factor)
    assert factors[10] > 1 and factors[-1] == 1 and [stage.depth for stage in started.ledger.stages] == [3, 0]


@pytest.mark.parametrize("stop", [2, 4, 6])
@pytest.mark.slow
def test_resumes_in_the_pilot_and_after_it(tmp_path, stop):
    settings = {"config": OPTIONS, "max_steps": STEPS}
    whole = run(tmp_path / "whole", policy=StartAt(2), **settings)
    part = run(
        tmp_path / "part",
        policy=StartAt(2),
        resume=str(tmp_path / "whole" / f"checkpoint-{stop}"),
        **settings,
    )
    assert whole[1].ledger.freeze_steps == {"stem": 4, "bert.encoder.layer.0": 4}
    assert_same_end(whole, part)
