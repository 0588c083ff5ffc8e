"""Tiny models of every architecture in Transformers, made from their configuration classes, with a batch to train each on."""

import contextlib
import copy
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from smartfrz_hf.model.nested import float_tensors

ROWS, LENGTH, VOCABULARY = 2, 8, 120
# The first of these with a class for the architecture is trained.
HEADS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MULTIMODAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "MASKED_LM",
    "CAUSAL_LM",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "OBJECT_DETECTION",
    "TIME_SERIES_PREDICTION",
)
# Sizes by the name of a field of a configuration; the first pattern that fits counts.
SIZES: list[tuple[str, Any]] = [
    (r"num_encoder_blocks|num_stages", None),
    (r"window_size|local_attention_size|attention_window", 4),
    (r"n_rot|rotary_dim", 4),
    (r"d_head", 8),
    (r"(.*_)?vocab_size(_.*)?", VOCABULARY),
    (r"(n_|num_)?(key_value_heads|kv_heads|head_kv|query_groups)", 2),
    (r"(num|n)_(encoder_|decoder_)?((hidden_)?layers|layer|blocks?|hidden_layers)", 2),
    (r"(encoder|decoder|text|vision|audio)_?(num_hidden_)?layers|depth|num_layers|encoder_num_layers", 2),
    (r".*(num|n)_(attention_)?heads?|(.*_)?(num_|n_)?(attention_)?heads?|num_attention_heads", 4),
    (r".*(head_dim|head_size|d_kv|kv_channels|head_width)", 8),
    (r"(moe_)?num_experts_per_tok|(moe_)?top_?k|moe_k|num_selected_experts", 2),
    (r"(n|num)_(local_|routed_)?experts|moe_num_experts", 4),
    (r"n_group|topk_group", 1),
    (r"(.*_)?(image_size|img_size)", 32),
    (r"(.*_)?patch_size", 8),
    (r"num_frames|frames_per_clip", 2),
    (r"tubelet_size", 1),
    (r"(.*_)?(max_position_embeddings|n_positions|max_target_positions|max_seq_len|n_ctx|max_sequence_length)", 64),
    (r"max_source_positions", 32),
    (r"num_mel_bins|n_mels", 16),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 16),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|index_head_dim", 8),
    (
        r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|embed_size|emb_dim|dim|model_dim|width)",
        32,
    ),
    (r"(.*_)?(projection_dim|hidden_sizes?_out|output_dim|out_hidden_size|proj_dim)", 32),
    (
        r"(.*_)?(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|ff_dim|mlp_dim|dim_ff|feed_forward_size|d_inner)",
        48,
    ),
    (r"num_labels", 2),
    (r"num_filters", 4),
]
SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
VISION_ROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    "head_dim": 8,
}
FOUR = {"num_hidden_layers": 4}
SERIES = {"prediction_length": 4, "context_length": 8, "d_model": 32, "lags_sequence": [1, 2], "num_time_features": 1}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
    "out_features": ["stage2"],
}
DETR = {"backbone_config": RESNET, "num_queries": 4}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2}
# What the rules do not give.
CHANGES: dict[str, dict[str, Any]] = {
    "swin": SWIN,
    "donut-swin": SWIN,
    "swinv2": SWIN,
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2},
    "bamba": FOUR | MAMBA | {"attn_layer_indices": [1]},
    "jamba": FOUR | {"attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"],
        "attn_layer_offset": 2,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_mem_blocks": 1,
    },
    "qwen3_next": FOUR,
    "qwen3_5_text": FOUR,
    "qwen3_5_moe_text": FOUR,
    "lfm3": FOUR,
    "kimi_linear": FOUR,
    "bailing_hybrid": FOUR,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [2, 4],
        "hash_seed": 0,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 4,
        "attention_head_size": 8,
        "num_buckets": 4,
    },
    "deepseek_v2": MLA | {"topk_group": 1, "n_group": 1, "num_experts_per_tok": 2},
    "deepseek_v3": MLA,
    "minicpm3": MLA,
    "glm4_moe_lite": MLA,
    "dots1": {"moe_intermediate_size": 16},
    "ministral": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": FOUR,
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "moe_layers": [0, 1],
    },
    "gemma3n_text": {
        "intermediate_size": [48, 48],
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "xlnet": {"d_head": 8, "n_head": 4},
    "xmod": {"default_language": "en_XX"},
    "wav2vec2-bert": {"vocab_size": VOCABULARY, "feature_projection_input_dim": 16},
    "wav2vec2-conformer": {"vocab_size": VOCABULARY},
    "time_series_transformer": SERIES,
    "informer": SERIES,
    "autoformer": SERIES,
    "patchtst": {"context_length": 16, "patch_length": 4, "patch_stride": 4, "num_input_channels": 2},
    "patchtsmixer": {"context_length": 16, "patch_length": 4, "patch_stride": 4, "num_input_channels": 2},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 5},
    "esmc": {"num_key_value_heads": 4},
    "detr": DETR,
    "conditional_detr": DETR,
    "deformable_detr": DETR | {"num_feature_levels": 1, "encoder_n_points": 2, "decoder_n_points": 2},
    "table-transformer": DETR,
    "dab-detr": DETR,
    "yolos": {"num_detection_tokens": 4, "image_size": [32, 32]},
    "perceiver": {
        "num_latents": 4,
        "d_latents": 32,
        "d_model": 32,
        "image_size": 32,
        "num_blocks": 1,
        "num_self_attends_per_block": 2,
    },
    "levit": {
        "hidden_sizes": [16, 32, 48],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "image_size": 64,
    },
    "efficientnet": {"hidden_dim": 320, "width_coefficient": 0.25, "depth_coefficient": 0.5, "image_size": 64},
    "layoutlmv3": {"input_size": 32, "patch_size": 8, "coordinate_size": 5, "shape_size": 6},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 4},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "dpt": {
        "is_hybrid": False,
        "backbone_out_indices": [0, 0, 1, 1],
        "neck_hidden_sizes": [8, 8, 16, 16],
        "fusion_hidden_size": 16,
    },
    "bit": {"hidden_sizes": [32, 32, 32, 32], "embedding_size": 32, "num_groups": 2},
    "cvt": {"num_heads": [1, 2, 2], "embed_dim": [16, 16, 32], "depth": [1, 1, 2]},
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text", "glm_image_text"), VISION_ROPE),
    "glm4v_moe_text": VISION_ROPE | {"partial_rotary_factor": 1.0},
    "qwen4_exp_text": FOUR,
    "qwen2_5_vl_vision": {"window_size": 32},
    "blip-2": {"image_token_index": 110},
    "instructblip": {"image_token_index": 110},
    "timm_wrapper": {"architecture": "vit_tiny_patch16_224"},
}
TOKENS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "cls": 3, "sep": 4, "mask": 5, "unk": 6}
FIRST_SPECIAL = 100  # tokens that stand for images and sounds


def tiny_config(cls: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A small configuration of a class: each field that is a size gets a small one, in nested configurations, too."""
    defaults = {name: p.default for name, p in inspect.signature(cls.__init__).parameters.items()}
    with contextlib.suppress(Exception):
        defaults |= {name: value for name, value in vars(cls()).items() if not name.startswith("_")}
    fields: dict[str, Any] = {}
    special = FIRST_SPECIAL
    for name, default in defaults.items():
        if name in getattr(cls, "sub_configs", {}):
            sub = cls.sub_configs[name]
            if sub is CONFIG_MAPPING or not hasattr(sub, "model_type") or sub.__name__ == "AutoConfig":
                if not isinstance(default, PreTrainedConfig):
                    continue
                sub = type(default)
            fields[name] = tiny_config(sub, **changes.pop(name, {}))
        elif name.endswith("_token_id") or name.endswith("_token_index"):
            if isinstance(default, int) or name[: -len("_token_id")] in TOKENS:
                fields[name] = TOKENS.get(name[: -len("_token_id")], special)
                special += fields[name] == special
        elif isinstance(default, bool) or default is None or isinstance(default, str):
            continue
        elif name.endswith("layerdrop") or name == "layerdrop":
            fields[name] = 0.0
        else:
            value = next((value for pattern, value in SIZES if re.fullmatch(pattern, name)), None)
            if isinstance(default, int) and value is not None:
                fields[name] = min(value, default) if default > 0 else default
            elif isinstance(default, list | tuple) and default and all(isinstance(v, int) for v in default):
                fields[name] = _sizes(name, list(default))
        if name == "rope_parameters" and isinstance(default, dict) and "mrope_section" in default:
            fields[name] = default | {"mrope_section": [2, 1, 1]}
            fields["head_dim"] = 8
    return cls(**fields | CHANGES.get(cls.model_type, {}) | changes)


def _sizes(name: str, default: list[int]) -> list[int]:
    """A list of sizes by stage."""
    if "depth" in name or "layers" in name:
        return [min(value, 2) for value in default]
    if "head" in name:
        return [min(value, 2) for value in default]
    if re.search("hidden_size|embed_dim|dims|channels|conv_dim", name) and min(default) > 3:
        return [16 if i < len(default) / 2 else 32 for i in range(len(default))]
    return default


def model_class(model_type: str, head: str | None = None) -> type[PreTrainedModel]:
    """The class that is trained: with a head where there is one."""
    import transformers

    heads = HEADS if head is None else (head,)
    for name in heads:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES")
        if model_type in mapping:
            found = mapping[model_type]
            return getattr(transformers, found if isinstance(found, str) else found[0])
    found = modeling_auto.MODEL_MAPPING_NAMES[model_type]
    return getattr(transformers, found if isinstance(found, str) else found[0])


# Two models in one, which no mapping of base models lists.
COMPOSITES = {"encoder-decoder": "bert", "vision-encoder-decoder": "vit", "speech-encoder-decoder": "wav2vec2"}


# Models of timm as they are, without the wrapper of Transformers, and what they are made with.
TIMM: dict[str, dict[str, Any]] = {
    "convnext_atto": {},
    "efficientnet_b0": {},
    "mixer_s32_224": {"img_size": 64},
    "mobilenetv3_small_100": {},
    "regnetx_002": {},
    "resnet18": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "embed_dim": 16, "num_heads": (1, 2, 2, 2)},
    "vit_tiny_patch16_224": {"img_size": 64, "embed_dim": 48, "depth": 4},
}


def _composite(model_type: str) -> PreTrainedModel:
    import transformers

    config = CONFIG_MAPPING[model_type].from_encoder_decoder_configs(
        tiny_config(CONFIG_MAPPING[COMPOSITES[model_type]]),
        tiny_config(CONFIG_MAPPING["bert"], is_decoder=True, add_cross_attention=True),
        decoder_start_token_id=1,
        pad_token_id=0,
    )
    return getattr(transformers, "".join(map(str.capitalize, model_type.split("-"))) + "Model")(config)


def build_tiny(model_type: str, head: str | None = None, **changes: Any) -> PreTrainedModel:
    """A tiny model with seeded weights, in training mode. `timm/resnet18` is timm's own."""
    torch.manual_seed(0)
    if model_type.startswith("timm/"):
        import timm

        name = model_type.removeprefix("timm/")
        return timm.create_model(name, num_classes=2, **TIMM[name] | changes).train()
    if model_type in COMPOSITES:
        return _composite(model_type).train()
    cls = model_class(model_type, head)
    config = tiny_config(CONFIG_MAPPING[model_type], **changes)
    config._attn_implementation = None
    return cls(config).train()


def make_batch(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments on which the model runs, with labels where they give a loss."""
    if not isinstance(model, PreTrainedModel):
        return {"x": torch.randn(ROWS, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    ids = torch.randint(7, FIRST_SPECIAL, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    takes = inspect.signature(model.forward).parameters
    problem: Exception | None = None
    latest: Exception | None = None
    for batch in arguments_for(model):
        batch = {name: value for name, value in batch.items() if name in takes}
        if "use_cache" in takes:
            batch["use_cache"] = False
        for _ in range(2):
            for more in (
                {"labels": batch.get("input_ids", ids)},
                {"labels": torch.tensor([0, 1])},
                {"return_loss": True},
                {},
            ):
                if not set(more) <= set(takes):
                    continue
                try:
                    with torch.no_grad(), torch.random.fork_rng():
                        output = model(**copy.deepcopy(batch | more))
                    if not more or output.loss.isfinite():
                        return batch | more
                except Exception as error:
                    problem = problem or error
                    latest = error
            features = re.search(r"(?:tokens: 0,? )?features:? (\d+)", str(latest))
            if not features or "input_ids" not in batch:
                break
            batch |= with_features(model.config, batch["input_ids"], int(features[1]))
    assert problem is not None
    raise problem


def with_features(config: PreTrainedConfig, ids: torch.Tensor, features: int) -> dict[str, torch.Tensor]:
    """Token ids with places for the features of an image or a sound."""
    token = next(
        value
        for name in ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index", "video_token_id")
        if (value := getattr(config, name, None)) is not None
    )
    width = getattr(config.get_text_config(), "hidden_size", 32)
    count = features // len(ids)
    count //= width if count > 64 and count % width == 0 else 1
    ids = torch.cat([ids[:, :1], torch.full((len(ids), count), token), ids[:, 1:]], dim=1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return more | {"token_type_ids": torch.zeros_like(ids), "mm_token_type_ids": (ids == token).long()}


def loss_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The model's own loss where it has one, else the mean square of all that it returns."""
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss.mean()
    return sum(tensor.float().pow(2).mean() for tensor in float_tensors(output) if tensor.requires_grad)


def arguments_for(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Inputs of a model by the names of its arguments; several forms, of which one may do."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    takes = inspect.signature(model.forward).parameters

    def size(*names: str, default: Any = None) -> Any:
        values = (getattr(part, name, None) for name in names for part in parts)
        return next((value for value in values if value is not None), default)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(ROWS, *shape, generator=generator)

    ids = torch.randint(7, FIRST_SPECIAL, (ROWS, LENGTH), generator=generator)
    image = size("image_size", default=64)
    height, width = (image, image) if isinstance(image, int) else list(image)[:2]
    channels = size("num_channels", "in_channels", default=3)
    pixels = noise(channels, height, width)
    known: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    known |= {
        "input_values": noise(4000),
        "decoder_input_ids": ids[:, :4].clone(),
        "bbox": torch.zeros(ROWS, LENGTH, 4, dtype=torch.long),
        "qformer_input_ids": ids,
        "image_embeds_position_mask": torch.zeros_like(ids).bool(),
        "image_sizes": torch.tensor([[height, width]] * ROWS),
        "visual_feats": noise(4, size("visual_feat_dim", default=32)),
        "visual_pos": noise(4, 4),
        "past_values": noise(16, 2) if size("patch_length") else noise(10),
        "past_time_features": noise(10, 1),
        "past_observed_mask": torch.ones(ROWS, 16, 2) if size("patch_length") else torch.ones(ROWS, 10),
        "future_values": noise(4),
        "future_time_features": noise(4, 1),
        "is_longer": torch.zeros(ROWS, 1, dtype=torch.bool),
        "qformer_attention_mask": torch.ones_like(ids),
        "future_observed_mask": torch.ones(ROWS, 4),
        "states": noise(4, size("state_dim", default=2)),
        "actions": noise(4, size("act_dim", default=2)),
        "rewards": noise(4, 1),
        "returns_to_go": noise(4, 1),
        "timesteps": torch.arange(4).expand(ROWS, 4),
    }
    if "input_ids" not in takes:
        del known["attention_mask"]
    if "bbox" in takes and "bbox_projection" not in str(type(model)) and type(model).__name__.startswith("Bros"):
        known["bbox"] = torch.zeros(ROWS, LENGTH, 8)
    if "image_grid_thw" in takes and (merge := size("spatial_merge_size", "merge_size")):
        patch, frames = size("patch_size"), size("temporal_patch_size", default=1)
        known["image_grid_thw"] = torch.tensor([[1, 2 * merge, 2 * merge]] * ROWS)
        known["pixel_values"] = noise(4 * merge * merge, channels * frames * patch * patch).flatten(0, 1)
        known |= with_features(config, ids, 4 * ROWS)
    if "spatial_shapes" in takes:
        patch = size("patch_size")
        known["pixel_values"], known["spatial_shapes"] = (
            noise(4, channels * patch * patch),
            torch.tensor([[2, 2]] * ROWS),
        )
        known["pixel_attention_mask"] = torch.ones(ROWS, 4, dtype=torch.long)
    mels = size("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "n_mels")
    mels = mels or (size("input_dim") if "input_features" in takes else None)
    if mels:
        frames = size("max_source_positions")
        sounds = [noise(64, mels), noise(mels, 64), noise(mels, 2 * (frames or 32)), noise(1, 64, mels)]
        spectrogram = noise(size("max_length", default=64), mels)
        for sound in sounds:
            mask = torch.ones(ROWS, 64 if sound.shape[-1] != 2 * (frames or 32) else sound.shape[-1], dtype=torch.long)
            masks = {name: mask for name in ("input_features_mask", "feature_attention_mask")}
            yield known | {"input_features": sound, "input_values": spectrogram} | masks
            yield known | {"input_features": sound, "input_values": spectrogram}
    yield known
    yield known | {
        "pixel_values": noise(1, channels, height, width),
        "pixel_attention_mask": torch.ones(ROWS, 1, height, width).long(),
    }
    video = noise(size("num_frames", "frames_per_clip", default=2), channels, height, width)
    yield known | {"pixel_values": video, "pixel_values_videos": video}
    yield known | {"input_values": noise(1, 4000)}
    yield {"pixel_values": noise(channels, 224, 224)}
    yield {name: value for name, value in known.items() if name in ("input_ids", "attention_mask")}
