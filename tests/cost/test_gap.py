"""FLOPs while units are frozen behind units that train: as torch counts them, and what they do not save."""

import pytest
import torch
from architectures import ARCHITECTURES, build
from counting import counted
from metered import BERT_LAYER, Bench, assert_as_torch_counts, with_adapters


def last_units(stack):
    return [index for index, unit in enumerate(stack) if index and index % 2 == 0]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_totals_are_what_torch_counts(name, depth):
    bench = Bench.of(name)
    assert_as_torch_counts(bench, depth, apart=last_units(bench.stack))
    assert bench.freezer.apart or len(bench.stack) < 3


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_totals_under_activation_checkpointing(name, checkpointing):
    for depth in (0, 1):
        bench = Bench.of(name, checkpointing=checkpointing)
        assert_as_torch_counts(bench, depth, apart=[2, 3])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # from peft
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_totals_with_adapters(name):
    options = {"bert": ["query", "value"], "llama": ["q_proj", "down_proj"]}[name]
    bench = with_adapters(name, target_modules=options, task_type="SEQ_CLS" if name == "bert" else "CAUSAL_LM")
    # The kernel of attention leaves out the gradient of keys that need none.
    assert_as_torch_counts(bench, 1, apart=[2, 3], tolerance=0.02 if name == "bert" else 1e-6)


def test_sets_may_come_in_any_order():
    """One counted pass serves all of them."""
    bench = Bench.of("bert")
    for depth, apart in ((0, [3]), (2, []), (1, [2, 4]), (0, [1, 2, 3, 4]), (3, []), (0, [])):
        assert_as_torch_counts(bench, depth, apart=apart)


def test_a_layer_in_the_gap_saves_its_weight_gradients_and_its_update():
    bench = Bench.of("bert", optimizer=torch.optim.SGD)
    bench.step()
    bench.freeze_to(0, [2])
    before = bench.meter.spent, bench.meter.gap
    bench.step()
    spent, full = bench.meter.unit_flops["bert.encoder.layer.1"], bench.meter.full_unit_flops["bert.encoder.layer.1"]
    passes = 2
    # Attention has two operands that depend on the input, so its products are needed for both.
    attention = 2 * 2 * 16 * 16 * 32 * 4
    weights = BERT_LAYER - attention
    assert (full.backward - spent.backward) * passes == pytest.approx(weights)
    assert (full.optimizer - spent.optimizer) * passes == pytest.approx(2 * bench.stack[2].parameter_count)
    assert spent.forward == full.forward
    assert before[1] == 0 and bench.meter.gap == pytest.approx(2 * BERT_LAYER - weights)
    bench.freeze_to(3)
    bench.step()
    assert bench.meter.gap == pytest.approx(2 * BERT_LAYER - weights), "the gap is closed"


def test_a_gap_that_closes_ends_the_backward_pass_further_back():
    bench = Bench.of("bert")
    backward = []
    for depth, apart in ((1, []), (1, [2, 3]), (4, [])):
        bench.freeze_to(depth, apart)
        backward.append(counted(bench.loss().backward))
    assert backward[0] > backward[1] > backward[2]
    bench.freeze_to(1, [2, 3])
    bench.freezer.freeze([1])
    assert bench.freezer.depth == 4 and not bench.freezer.apart
    assert counted(bench.loss().backward) == backward[2]


def test_the_state_of_the_meter_keeps_what_was_frozen():
    bench = Bench.of("bert", optimizer=torch.optim.AdamW)
    for depth, apart in ((0, []), (0, [2]), (1, [3]), (4, [])):
        bench.freeze_to(depth, apart)
        bench.step()
    again = Bench(build("bert"), bench.batch, torch.optim.AdamW).meter
    again.load_state_dict(bench.meter.state_dict())
    assert again.spent == bench.meter.spent and again.gap == bench.meter.gap > 0
