"""Snapshots are taken at fixed positions, on the device, and kept in order."""

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smartfrz_hf import find_blocks
from smartfrz_hf.model.units import Unit
from smartfrz_hf.signals.weights import WeightHistory, WeightSampler


def unit_of(module):
    return Unit("unit", {"module": module})


def numbered(*shapes):
    """A module whose weights are all different: their own positions."""
    module = nn.Module()
    start = 0
    for i, shape in enumerate(shapes):
        size = int(np.prod(shape))
        module.register_parameter(f"p{i}", nn.Parameter(torch.arange(start, start + size).float().reshape(shape)))
        start += size
    return module


def test_positions_are_distinct_fixed_and_even():
    module = numbered((40, 50), (8, 4, 5, 5))
    sampler = WeightSampler([unit_of(module)], weights_per_unit=1400, seed=3)
    first = sampler.read([0])[0]
    assert first.shape == (1400,) and first.dtype == torch.float32
    assert len(first.unique()) == 1400
    assert torch.equal(first, sampler.read([0])[0])
    assert torch.equal(first, WeightSampler([unit_of(module)], 1400, seed=3).read([0])[0])
    assert not torch.equal(first, WeightSampler([unit_of(module)], 1400, seed=4).read([0])[0])
    share = (first >= 2000).float().mean()  # the second parameter holds 800 of 2,800 weights
    assert abs(share - 800 / 2800) < 0.05
    with torch.no_grad():
        module.p0 += 0.5
    moved = sampler.read([0])[0] - first
    assert torch.equal(moved != 0, first < 2000), "each read sees the weights as they are now"


def test_small_units_repeat_their_weights():
    values = WeightSampler([unit_of(numbered((2, 3)))], weights_per_unit=20).read([0])[0]
    assert sorted(values.unique().tolist()) == [0, 1, 2, 3, 4, 5]
    counts = values.unique(return_counts=True)[1]
    assert counts.max() - counts.min() <= 1


def test_only_trainable_matrices_are_read():
    module = numbered((3, 3), (100,), (5, 5))
    module.p0.requires_grad_(False)
    assert WeightSampler([unit_of(module)], weights_per_unit=25).read([0])[0].min() == 109
    module.p2.requires_grad_(False)
    assert WeightSampler([unit_of(module)], 100).read([0])[0].tolist() == list(range(9, 109)), (
        "a vector if that is all"
    )


def test_a_unit_without_weights_reads_as_zeros():
    sampler = WeightSampler([unit_of(nn.Dropout()), unit_of(numbered((2, 2)))], weights_per_unit=4)
    assert sampler.read([0, 1]).tolist() == [[0.0] * 4, [0.0, 1.0, 2.0, 3.0]]


def test_process_random_state_is_left_alone():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    WeightSampler([unit_of(numbered((100, 100)))], weights_per_unit=64)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_sampled(name):
    stack = find_blocks(build(name))
    sampler = WeightSampler(stack.units, weights_per_unit=64)
    snapshots = torch.stack([sampler.read([i])[0] for i in range(len(stack))])
    assert snapshots.shape == (len(stack), 64) and torch.isfinite(snapshots).all()


def test_strided_kernels_and_half_precision_are_read_right():
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    values = WeightSampler([unit_of(conv)], weights_per_unit=6 * 4 * 9).read([0])[0]
    assert torch.equal(values, conv.weight.detach().contiguous().flatten())
    half = WeightSampler([unit_of(nn.Linear(8, 8).bfloat16())], weights_per_unit=16).read([0])[0]
    assert half.dtype == torch.float32


@settings(max_examples=30, deadline=None)
@given(window=st.integers(1, 6), records=st.integers(0, 15))
def test_ring_keeps_the_last_snapshots_in_order(window, records):
    module = numbered((2, 2))
    sampler = WeightSampler([unit_of(module), unit_of(numbered((3, 3)))], weights_per_unit=4)
    history = WeightHistory(2, window, 4)
    with torch.no_grad():
        for step in range(records):
            module.p0.fill_(step)
            history.record(sampler, step)
    kept = min(window, records)
    assert history.filled == kept
    real = history.snapshots()[0][window - kept :]
    assert real[:, 0].tolist() == list(range(records - kept, records))
    assert history.steps == list(range(records))
    if records:
        assert torch.equal(history.start[0], torch.zeros(4))


def test_frozen_units_are_not_recorded():
    module, other = numbered((2, 2)), numbered((2, 2))
    sampler = WeightSampler([unit_of(module), unit_of(other)], weights_per_unit=4)
    history = WeightHistory(2, 2, 4)
    for step in range(3):
        with torch.no_grad():
            module.p0.fill_(step), other.p0.fill_(step)
        history.record(sampler, step, [0, 1] if step < 2 else [1])
    assert history.snapshots()[1, :, 0].tolist() == [1, 2]
    assert 2 not in history.snapshots()[0]


def test_a_history_goes_on_from_its_state():
    for steps in ((0, 5), (0, 5, 10, 15)):
        history = WeightHistory(2, 3, 4)
        sampler = WeightSampler([unit_of(numbered((2, 2))), unit_of(numbered((4, 4)))], weights_per_unit=4)
        for step in steps:
            history.record(sampler, step)
        state = history.state_dict()
        assert state.keys() == {"snapshots", "start", "steps"} and state["steps"] == list(steps)
        loaded = WeightHistory(2, 3, 4)
        loaded.load_state_dict(state)
        assert loaded.steps == history.steps and loaded.start.equal(history.start)
        assert loaded.snapshots().equal(history.snapshots())
        history.record(sampler, 20), loaded.record(sampler, 20)
        assert loaded.snapshots().equal(history.snapshots())
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\) .* this one has the shape \(3, 3, 4\)"):
        WeightHistory(3, 3, 4).load_state_dict(state)
