"""The mixin over other Trainers than the plain one: each freezes and resumes."""

import pytest
import torch
from architectures import build
from resuming import STAGES, assert_same_end, undecided_predictor
from training import Rows, arguments, predictor_that_says
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from smartfrz_hf import SmartFRZConfig, SmartFRZMixin, SmartFRZTrainer

COMMON = {
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 6,
    "disable_tqdm": True,
    "report_to": "none",
    "use_cpu": True,
}


class FreezingSeq2SeqTrainer(SmartFRZMixin, Seq2SeqTrainer):
    pass


def test_seq2seq_trainer(tmp_path):
    """It evaluates by generating, in the middle of the run, from a model whose front is frozen."""
    data = Rows(40)
    for row in data.rows:
        row["labels"] = row["input_ids"]

    def train(resume=None):
        model = build("gpt2")
        model.config.pad_token_id = model.generation_config.pad_token_id = 0
        trainer = FreezingSeq2SeqTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(
                str(tmp_path),
                eval_strategy="steps",
                eval_steps=8,
                predict_with_generate=True,
                generation_max_length=16,
                **COMMON,
            ),
            train_dataset=data,
            eval_dataset=torch.utils.data.Subset(data, range(4)),
            compute_metrics=lambda prediction: {"length": prediction.predictions.shape[1]},
            smartfrz=SmartFRZConfig(record_every=1, freeze_threshold=0.5, **STAGES),
            predictor=undecided_predictor(),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train()
    assert whole.ledger.stages[0].step <= 6 and whole.ledger.depth > 0
    lengths = [log["eval_length"] for log in whole.state.log_history if "eval_length" in log]
    assert lengths and min(lengths) > 12
    assert all(parameter.requires_grad for parameter in whole.model.parameters())
    again = train(str(tmp_path / "checkpoint-6"))
    assert_same_end((whole, whole.smartfrz), (again, again.smartfrz))


def tokenizer():
    """Knows the words w0 to w93."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[CLS]"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*names, *words_of(94)])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    )


def words_of(count):
    return [f"w{i}" for i in range(count)]


def assert_freezes_and_resumes(train, folder):
    whole = train()
    assert [(stage.step, stage.depth) for stage in whole.ledger.stages] == [(5, 2)]
    again = train(str(folder / "checkpoint-6"))
    assert again.ledger.stages == whole.ledger.stages
    for (key, p), q in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), key


# TRL 1.16 sets an argument by the name that it had before Transformers 5.23.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_sft_trainer(tmp_path):
    import trl
    from datasets import Dataset

    class Freezing(SmartFRZMixin, trl.SFTTrainer):
        pass

    def train(resume=None):
        trainer = Freezing(
            model=build("gpt2"),
            args=trl.SFTConfig(str(tmp_path), max_length=16, bf16=False, **COMMON),
            train_dataset=Dataset.from_dict({"text": [" ".join(words_of(94)[i : i + 10]) for i in range(40)]}),
            processing_class=tokenizer(),
            smartfrz=SmartFRZConfig(record_every=1, max_depth=2, **STAGES),
            predictor=predictor_that_says(0.9),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    assert_freezes_and_resumes(train, tmp_path)


@pytest.mark.slow
def test_sentence_transformer_trainer(tmp_path, minilm_dir):
    import sentence_transformers
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    class Freezing(SmartFRZMixin, sentence_transformers.SentenceTransformerTrainer):
        pass

    def train(resume=None):
        model = sentence_transformers.SentenceTransformer(str(minilm_dir), device="cpu")
        words = words_of(41)
        trainer = Freezing(
            model=model,
            args=sentence_transformers.SentenceTransformerTrainingArguments(str(tmp_path), **COMMON),
            train_dataset=Dataset.from_dict({"anchor": words[:40], "positive": words[1:]}),
            loss=MultipleNegativesRankingLoss(model),
            smartfrz=SmartFRZConfig(record_every=1, max_depth=2, **STAGES),
            predictor=predictor_that_says(0.9),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    assert_freezes_and_resumes(train, tmp_path)


def test_the_mixin_must_come_first():
    with pytest.raises(TypeError, match="must come before the Trainer"):
        type("Wrong", (Trainer, SmartFRZMixin), {})


def test_options_beside_those_of_the_trainer_are_told(tmp_path):
    with pytest.raises(TypeError, match="smartfrz="):
        SmartFRZTrainer(build("bert"), arguments(tmp_path), operating_point="balanced")
