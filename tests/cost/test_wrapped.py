"""Honest accounts whatever wraps the model: the trainers of Sentence Transformers."""

import pytest
import torch
from counting import FORMULAS
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from smartfrz_hf import SmartFRZCallback

PAIRS = Dataset.from_dict(
    {
        "sentence1": [f"a short text about the number {i}" for i in range(16)],
        "sentence2": [f"{i} is what another and somewhat longer text speaks of" for i in range(16)],
    }
)
SETTINGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


class Count(TrainerCallback):
    """What torch counts from the beginning of each step to the optimizer's."""

    def __init__(self):
        self.flops = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        self.counter.__enter__()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.counter.__exit__(None, None, None)
        self.flops += self.counter.get_total_flops()


def bi_encoder(folder, minilm, callbacks, loss=MultipleNegativesRankingLoss):
    torch.manual_seed(0)
    model = SentenceTransformer(str(minilm), device="cpu")
    args = SentenceTransformerTrainingArguments(str(folder), save_strategy="no", **SETTINGS)
    SentenceTransformerTrainer(model, args, PAIRS, loss=loss(model), callbacks=callbacks).train()


def gradient_cached(folder, minilm, callbacks):
    bi_encoder(folder, minilm, callbacks, lambda model: CachedMultipleNegativesRankingLoss(model, mini_batch_size=2))


def cross_encoder(folder, minilm, callbacks):
    torch.manual_seed(0)
    model = CrossEncoder(str(minilm), num_labels=1, device="cpu")
    args = CrossEncoderTrainingArguments(str(folder), save_strategy="no", **SETTINGS)
    data = PAIRS.add_column("label", [float(i % 2) for i in range(16)])
    CrossEncoderTrainer(model, args, data, loss=BinaryCrossEntropyLoss(model), callbacks=callbacks).train()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("run", [bi_encoder, gradient_cached, cross_encoder])
def test_what_is_said_to_be_saved_is_saved(run, tmp_path, minilm_dir):
    def account(**options):
        callback, count = SmartFRZCallback(activation_cache=False, **options), Count()
        run(tmp_path, minilm_dir, [callback, count])
        return callback.ledger, count.flops

    never, never_counted = account(policy="never")
    static, static_counted = account(policy="static", static_depth=4)
    assert never.compute_saved == 0 and never.full.total > 0
    passes = [ledger.spent.forward + ledger.spent.backward for ledger in (static, never)]
    assert 1 - passes[0] / passes[1] == pytest.approx(1 - static_counted / never_counted, abs=0.02)
    if run is not gradient_cached:  # whose first passes, without gradients, are the loss's own affair
        assert passes[1] == pytest.approx(never_counted, rel=0.05)
