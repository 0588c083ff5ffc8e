"""Tiny models of many architectures, built in code, with a batch to train each on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as t
from versions import VIT_BLOCKS

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Architecture:
    """How to build one tiny model, and what `find_blocks` should say of it."""

    build: Callable[[], t.PreTrainedModel]
    blocks: str
    count: int
    stem: tuple[str, ...]

    def batch(self, model: t.PreTrainedModel) -> dict[str, torch.Tensor]:
        """Four rows with labels; text has padding on the right."""
        generator = torch.Generator().manual_seed(0)
        if model.main_input_name == "pixel_values":
            pixels = torch.rand(4, 3, 32, 32, generator=generator)
            return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 0, 1])}
        ids = torch.randint(5, 99, (4, 16), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 10:] = 0
        labels = ids if "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__ else ids[:, 0] % 2
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


ARCHITECTURES = {
    "bert": Architecture(
        lambda: t.BertForSequenceClassification(t.BertConfig(**TEXT)), "bert.encoder.layer", 4, ("bert.embeddings",)
    ),
    "roberta": Architecture(
        lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**TEXT)),
        "roberta.encoder.layer",
        4,
        ("roberta.embeddings",),
    ),
    "distilbert": Architecture(
        lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(vocab_size=99, dim=32, n_layers=4, n_heads=4, hidden_dim=37, max_position_embeddings=64)
        ),
        "distilbert.transformer.layer",
        4,
        ("distilbert.embeddings",),
    ),
    "deberta-v2": Architecture(
        lambda: t.DebertaV2ForSequenceClassification(
            t.DebertaV2Config(
                **TEXT,
                relative_attention=True,
                position_buckets=8,
                pos_att_type=["p2c", "c2p"],
                norm_rel_ebd="layer_norm",
            )
        ),
        "deberta.encoder.layer",
        4,
        ("deberta.embeddings", "deberta.encoder.rel_embeddings", "deberta.encoder.LayerNorm"),
    ),
    "electra": Architecture(
        lambda: t.ElectraForSequenceClassification(t.ElectraConfig(**TEXT, embedding_size=16)),
        "electra.encoder.layer",
        4,
        ("electra.embeddings", "electra.embeddings_project"),
    ),
    "albert": Architecture(
        lambda: t.AlbertForSequenceClassification(t.AlbertConfig(**TEXT, embedding_size=16)),
        "albert.encoder.albert_layer_groups",
        1,
        ("albert.embeddings", "albert.encoder.embedding_hidden_mapping_in"),
    ),
    "mpnet": Architecture(
        lambda: t.MPNetForSequenceClassification(t.MPNetConfig(**TEXT)),
        "mpnet.encoder.layer",
        4,
        ("mpnet.embeddings", "mpnet.encoder.relative_attention_bias"),
    ),
    "modernbert": Architecture(
        lambda: t.ModernBertForSequenceClassification(
            t.ModernBertConfig(**TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
        ),
        "model.layers",
        4,
        ("model.embeddings", "model.rotary_emb"),
    ),
    "gpt2": Architecture(
        lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=99, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
        ),
        "transformer.h",
        4,
        ("transformer.wte", "transformer.wpe", "transformer.drop"),
    ),
    "llama": Architecture(
        lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT, num_key_value_heads=2)),
        "model.layers",
        4,
        ("model.embed_tokens", "model.rotary_emb"),
    ),
    "qwen2": Architecture(
        lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**TEXT, num_key_value_heads=2)),
        "model.layers",
        4,
        ("model.embed_tokens", "model.rotary_emb"),
    ),
    "vit": Architecture(
        lambda: t.ViTForImageClassification(t.ViTConfig(**IMAGE)), f"vit.{VIT_BLOCKS}", 4, ("vit.embeddings",)
    ),
    "deit": Architecture(
        lambda: t.DeiTForImageClassification(t.DeiTConfig(**IMAGE)), f"deit.{VIT_BLOCKS}", 4, ("deit.embeddings",)
    ),
    "swin": Architecture(
        lambda: t.SwinForImageClassification(
            t.SwinConfig(
                embed_dim=8, depths=[1, 2, 1], num_heads=[2, 2, 2], image_size=32, patch_size=2, window_size=4
            )
        ),
        "swin.encoder.layers",
        3,
        ("swin.embeddings",),
    ),
    "convnext": Architecture(
        lambda: t.ConvNextForImageClassification(
            t.ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1, 2, 2, 1], image_size=32, patch_size=2)
        ),
        "convnext.encoder.stages",
        4,
        ("convnext.embeddings",),
    ),
    "resnet": Architecture(
        lambda: t.ResNetForImageClassification(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 2, 1], layer_type="basic")
        ),
        "resnet.encoder.stages",
        3,
        ("resnet.embedder",),
    ),
    "mobilenet-v2": Architecture(
        lambda: t.MobileNetV2ForImageClassification(t.MobileNetV2Config(image_size=32, depth_multiplier=0.35)),
        "mobilenet_v2.layer",
        16,
        ("mobilenet_v2.conv_stem",),
    ),
}


def build(name: str) -> t.PreTrainedModel:
    """A tiny model with seeded weights, in training mode."""
    torch.manual_seed(0)
    return ARCHITECTURES[name].build().train()
