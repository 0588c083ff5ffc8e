"""Train a sentence encoder with Sentence Transformers on scored pairs, and freeze its blocks as they converge."""

from dataclasses import dataclass, field

from common import (
    CommonDataArguments,
    CommonModelArguments,
    check_columns,
    load_splits,
    start,
    train,
)
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import CoSENTLoss

from smartfrz_hf import SmartFRZMixin


class FreezingTrainer(SmartFRZMixin, SentenceTransformerTrainer):
    """Trains sentence encoders, and freezes."""


@dataclass
class ModelArguments(CommonModelArguments):
    """Arguments for the model."""

    model_name_or_path: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        metadata={"help": "Pretrained model on the Hub or in a folder."},
    )


@dataclass
class DataTrainingArguments(CommonDataArguments):
    """Arguments for the data."""

    first_column: str = field(default="sentence1", metadata={"help": "Column with the first text of a pair."})
    second_column: str = field(default="sentence2", metadata={"help": "Column with the second text."})
    score_column: str = field(default="label", metadata={"help": "Column with their similarity."})


def main(args: list[str] | None = None) -> None:
    """
    Run the script.

    Args:
        args (`list[str]`, *optional*): the command line; that of the process when it is not given.
    """
    model_args, data_args, training_args, config, checkpoint = start(
        ModelArguments, DataTrainingArguments, __doc__, args, SentenceTransformerTrainingArguments
    )

    columns = (data_args.first_column, data_args.second_column, data_args.score_column)
    splits = load_splits(data_args, model_args, training_args)
    check_columns(splits, columns)
    # Sentence Transformers finds the scores by the column's name.
    splits = {
        name: dataset.select_columns(list(columns)).rename_columns(
            {old: new for old, new in zip(columns, ("sentence1", "sentence2", "score"), strict=True) if old != new}
        )
        for name, dataset in splits.items()
    }
    hub = {key: value for key, value in model_args.hub_kwargs.items() if key != "cache_dir"}
    device = str(training_args.device)
    model = SentenceTransformer(model_args.model_name_or_path, device=device, cache_folder=model_args.cache_dir, **hub)
    evaluator = None
    if training_args.do_eval:
        pairs = splits["validation"]
        evaluator = EmbeddingSimilarityEvaluator(pairs["sentence1"], pairs["sentence2"], pairs["score"], name="dev")
    trainer = FreezingTrainer(
        model=model,
        args=training_args,
        smartfrz=config,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        loss=CoSENTLoss(model),
        evaluator=evaluator,
    )
    if training_args.do_train:
        train(trainer, checkpoint)
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
