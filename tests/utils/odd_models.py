"""Tiny models whose blocks are not all there is: decoders, other towers, heads that are declared or that run early."""

import torch
from architectures import IMAGE, TEXT, build
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    VisionTextDualEncoderModel,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

T5 = {
    "decoder_start_token_id": 0,
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
}


def t5():
    return T5ForConditionalGeneration(T5Config(**T5))


def bart():
    return BartForConditionalGeneration(BartConfig(vocab_size=99, max_position_embeddings=64, **SEQ2SEQ))


def pegasus():
    return PegasusForConditionalGeneration(PegasusConfig(vocab_size=99, max_position_embeddings=64, **SEQ2SEQ))


def whisper():
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    sizes = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 24}
    return WhisperForConditionalGeneration(WhisperConfig(vocab_size=99, **SEQ2SEQ, **sizes, **tokens))


def clip():
    text = TEXT | {"bos_token_id": 1, "eos_token_id": 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16))


def wav2vec2():
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    config = Wav2Vec2Config(**sizes, **convolutions, **positions, vocab_size=20, do_stable_layer_norm=True)
    return Wav2Vec2ForSequenceClassification(config)


def dual_encoder():
    return VisionTextDualEncoderModel(vision_model=build("vit").base_model, text_model=BertModel(build("bert").config))


def llava():
    vision = CLIPVisionConfig(**IMAGE)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=98)
    return LlavaForConditionalGeneration(config)


class ClassifierFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(32, 2)
        self.encoder = BertModel(BertConfig(**TEXT))

    def forward(self, input_ids, attention_mask=None):
        return self.classifier(self.encoder(input_ids, attention_mask).pooler_output)


class OddOrder(PreTrainedModel):
    """Everything that can go wrong with an order of registration, in one model."""

    config_class = BertConfig

    def __init__(self, config, runs=True):
        super().__init__(config)
        self.runs = runs
        self.classifier = nn.Linear(32, 2)
        self.temperature = nn.Parameter(torch.ones(()))
        self.embed = nn.Embedding(99, 32)
        self.positions = nn.Parameter(torch.zeros(5, 32))
        self.skip = nn.Linear(32, 32)  # runs in front of the blocks, and only the head reads it
        self.extras = nn.ModuleDict({"norm": nn.LayerNorm(32), "exit": nn.Linear(32, 2)})
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 37) for _ in range(3))
        self.between = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.early_exits = nn.ModuleList(nn.Linear(32, 2) for _ in range(3))
        self.post_init()

    def forward(self, input_ids, **kwargs):
        if not self.runs:
            raise RuntimeError("this model does not run")
        hidden = self.extras["norm"](self.embed(input_ids) + self.positions[: input_ids.shape[1]])
        skipped, exits = self.skip(hidden), []
        for block, between, early_exit in zip(self.blocks, self.between, self.early_exits, strict=True):
            hidden = block(hidden)
            exits.append(early_exit(hidden))
            hidden = between(hidden)
        logits = self.classifier(hidden + skipped)
        return {"logits": logits, "exits": (sum(exits) + self.extras["exit"](hidden)) * self.temperature}


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
TRANSLATION = {"input_ids": IDS, "labels": IDS}


def _pixels(count=2):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _speech(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# How to make each model, its blocks by hand, and a batch that gives a loss.
ODD_MODELS = {
    "t5": (t5, ["encoder.block.*"], TRANSLATION),
    "bart": (bart, ["model.encoder.layers.*"], TRANSLATION),
    "pegasus": (pegasus, ["model.encoder.layers.*"], TRANSLATION),
    "bart's decoder": (bart, ["model.decoder.layers.*"], TRANSLATION),
    "whisper": (whisper, ["model.encoder.layers.*"], {"input_features": _speech(2, 8, 40), "labels": IDS}),
    "wav2vec2": (
        wav2vec2,
        ["wav2vec2.encoder.layers.*"],
        {"input_values": _speech(2, 2000), "labels": torch.tensor([0, 1])},
    ),
    "clip": (
        clip,
        ["vision_model.encoder.layers.*"],
        {"input_ids": IDS.fill_diagonal_(2), "pixel_values": _pixels(), "return_loss": True},
    ),
    "odd order": (lambda: OddOrder(BertConfig(**TEXT)), None, {"input_ids": IDS}),
}
