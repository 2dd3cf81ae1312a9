"""Component configs from tensor headers alone, and the check of a config file against the headers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .shapes import text_config, vision_config

_HEAD_DIM = 128
_AXES = (16, 56, 56)
_MROPE_SECTION = (16, 24, 24)
_VISION_DEPTH, _VISION_HIDDEN, _VISION_HEADS = 32, 1280, 16
_SIDECAR = "keep the component's config.json beside the file"

# Statistics of the 16 latent channels; constants of the Qwen image VAE (the same as Wan 2.1), not found in its tensors.
_LATENTS_MEAN = (
    (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
    + (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
)  # fmt: skip
_LATENTS_STD = (
    (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
    + (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
)  # fmt: skip


def transformer_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the headers of a Qwen-Image transformer say, in the names of its config.

    Raises:
        CheckpointError: it is another kind of model.
    """
    if "time_text_embed.addition_t_embedding.weight" in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.place} must be a Qwen-Image or Qwen-Image-Edit transformer, got Qwen-Image-Layered"
        )
    require_kind(checkpoint, "Qwen-Image transformer", ("img_in.weight", "transformer_blocks.0.attn.norm_q.weight"))
    dim, channels = shape_of(checkpoint, "img_in.weight", 2)
    (head,) = shape_of(checkpoint, "transformer_blocks.0.attn.norm_q.weight", 1)
    if not head or dim % head:
        raise CheckpointError(f"{checkpoint.place}: width must be a multiple of the head size {head}, got {dim}")
    return {
        "num_layers": count_of(checkpoint, r"transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": dim // head,
        "joint_attention_dim": shape_of(checkpoint, "txt_in.weight", 2)[1],
        "in_channels": channels,
        "out_channels": shape_of(checkpoint, "proj_out.weight", 2)[0] // 4,
    }


def transformer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of a single-file transformer; ``zero_cond_t`` is left to the caller.

    Raises:
        CheckpointError: it is another kind of model, or its rotary axes cannot be known.
    """
    facts = transformer_facts(checkpoint)
    if facts["attention_head_dim"] != _HEAD_DIM:
        raise CheckpointError(
            f"{checkpoint.place}: head size must be {_HEAD_DIM} to know the rotary axes without a config, "
            f"got {facts['attention_head_dim']}",
            hint=_SIDECAR,
        )
    return facts | {"patch_size": 2, "axes_dims_rope": list(_AXES), "guidance_embeds": False}


def vae_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the headers of a Qwen image VAE say, in the names of its config.

    Raises:
        CheckpointError: it is another kind of model.
    """
    if "decoder.middle.0.residual.0.gamma" in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.place} must be a Qwen image VAE with diffusers names, got the Wan layout of ComfyUI",
            hint="use vae/diffusion_pytorch_model.safetensors of the model's hub repository",
        )
    require_kind(checkpoint, "Qwen image VAE", ("encoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"))
    base, channels = shape_of(checkpoint, "encoder.conv_in.weight", 5)[:2]
    levels = count_of(checkpoint, r"decoder\.up_blocks\.(\d+)\.")
    widths = [
        shape_of(checkpoint, f"decoder.up_blocks.{level}.resnets.0.conv1.weight", 5)[0]
        for level in reversed(range(levels))
    ]
    return {
        "base_dim": base,
        "z_dim": shape_of(checkpoint, "post_quant_conv.weight", 5)[0],
        "dim_mult": [width // base if base else 0 for width in widths],
        "num_res_blocks": count_of(checkpoint, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1,
        "temperal_downsample": [
            f"decoder.up_blocks.{level}.upsamplers.0.time_conv.weight" in checkpoint.tensors
            for level in reversed(range(levels - 1))
        ],
        "input_channels": channels,
    }


def vae_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of a single-file VAE.

    Raises:
        CheckpointError: it is another kind of model, or its latent statistics cannot be known.
    """
    facts = vae_facts(checkpoint)
    if facts["z_dim"] != len(_LATENTS_MEAN):
        raise CheckpointError(
            f"{checkpoint.place}: latent channels must be {len(_LATENTS_MEAN)} to know their statistics "
            f"without a config, got {facts['z_dim']}",
            hint=_SIDECAR,
        )
    known = {"attn_scales": [], "latents_mean": list(_LATENTS_MEAN), "latents_std": list(_LATENTS_STD)}
    return facts | known


def text_encoder_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the headers of a Qwen2.5-VL say: ``{"text_config": {…}, "vision_config": {…}}``.

    Raises:
        CheckpointError: it is another kind of model.
    """
    layer = "language_model.layers.0"
    kind = ("language_model.embed_tokens.weight", f"{layer}.self_attn.q_proj.bias", "visual.patch_embed.proj.weight")
    require_kind(checkpoint, "Qwen2.5-VL text encoder with its vision tower", kind)
    vocab, hidden = shape_of(checkpoint, "language_model.embed_tokens.weight", 2)
    vision, channels, frames, patch, _ = shape_of(checkpoint, "visual.patch_embed.proj.weight", 5)
    return {
        "text_config": {
            "vocab_size": vocab,
            "hidden_size": hidden,
            "num_hidden_layers": count_of(checkpoint, r"language_model\.layers\.(\d+)\."),
            "intermediate_size": shape_of(checkpoint, f"{layer}.mlp.gate_proj.weight", 2)[0],
        },
        "vision_config": {
            "hidden_size": vision,
            "in_channels": channels,
            "temporal_patch_size": frames,
            "patch_size": patch,
            "depth": count_of(checkpoint, r"visual\.blocks\.(\d+)\."),
            "intermediate_size": shape_of(checkpoint, "visual.blocks.0.mlp.gate_proj.weight", 2)[0],
            "out_hidden_size": shape_of(checkpoint, "visual.merger.mlp.2.weight", 2)[0],
        },
    }


def text_encoder_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of a single-file Qwen2.5-VL of the published sizes (head size 128, vision tower 32 x 1280).

    Raises:
        CheckpointError: it is another kind of model, or of a size whose head counts cannot be known.
    """
    facts = text_encoder_facts(checkpoint)
    text, vision = facts["text_config"], facts["vision_config"]
    if (vision["depth"], vision["hidden_size"]) != (_VISION_DEPTH, _VISION_HIDDEN) or text["hidden_size"] % _HEAD_DIM:
        raise CheckpointError(
            f"{checkpoint.place}: vision tower must be {_VISION_DEPTH} layers of {_VISION_HIDDEN} to know its heads "
            f"without a config, got {vision['depth']} of {vision['hidden_size']}",
            hint=_SIDECAR,
        )
    (width,) = shape_of(checkpoint, "language_model.layers.0.self_attn.q_proj.bias", 1)
    (kv,) = shape_of(checkpoint, "language_model.layers.0.self_attn.k_proj.bias", 1)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(_MROPE_SECTION)}
    text |= {
        "num_attention_heads": width // _HEAD_DIM,
        "num_key_value_heads": kv // _HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "use_sliding_window": False,
    }
    vision |= {
        "num_heads": _VISION_HEADS,
        "hidden_act": "silu",
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    }
    tokens = {
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
    }
    tied = "lm_head.weight" not in checkpoint.tensors
    return {"model_type": "qwen2_5_vl", "tie_word_embeddings": tied, **tokens, **facts}


def check_transformer(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse a transformer config that the headers contradict.

    Raises:
        CheckpointError: naming the first such key, or the checkpoint is of another kind.
    """
    compare(config, transformer_facts(checkpoint), checkpoint.place)
    axes = config.get("axes_dims_rope")
    if not isinstance(axes, Sequence) or sum(axes) != config["attention_head_dim"]:
        raise CheckpointError(
            f"{checkpoint.place}: axes_dims_rope must add up to {config['attention_head_dim']}, got {axes!r:.80}"
        )


def check_vae(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse a VAE config that the headers contradict; raises CheckpointError as ``check_transformer``."""
    compare({"input_channels": 3, **config}, vae_facts(checkpoint), checkpoint.place)
    if config.get("attn_scales"):
        raise CheckpointError(f"{checkpoint.place}: attn_scales must be empty, got {config['attn_scales']!r:.80}")
    for key in ("latents_mean", "latents_std"):
        if len(config.get(key) or ()) != config["z_dim"]:
            raise CheckpointError(
                f"{checkpoint.place}: {key} must have {config['z_dim']} values, got {config.get(key)!r:.80}"
            )


def check_text_encoder(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse a Qwen2.5-VL config that the headers contradict; raises CheckpointError as ``check_transformer``."""
    facts = text_encoder_facts(checkpoint)
    compare(text_config(config), facts["text_config"], checkpoint.place)
    compare(vision_config(config), facts["vision_config"], f"{checkpoint.place} (vision_config)")


def compare(config: Mapping[str, Any], facts: Mapping[str, Any], place: str) -> None:
    """Refuse a config that says other than the headers; raises CheckpointError naming the first such key."""
    for key, fact in facts.items():
        value = config.get(key)
        if (list(value) if isinstance(value, tuple) else value) != fact:
            raise CheckpointError(
                f"{place}: {key} of the config must be {fact!r}, as the tensors say, got {value!r:.80}",
                hint="the config.json belongs to another model",
            )


def require_kind(checkpoint: Checkpoint, kind: str, names: Sequence[str]) -> None:
    """Refuse a file without the tensors that only this kind of model has; raises CheckpointError."""
    missing = [name for name in names if name not in checkpoint.tensors]
    if missing:
        some = ", ".join(list(checkpoint.tensors)[:3]) or "no tensors"
        raise CheckpointError(
            f"{checkpoint.place} must be a {kind}, got a file without {missing[0]} (it begins with {some})"
        )


def shape_of(checkpoint: Checkpoint, name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor; raises CheckpointError if it has another number of dimensions."""
    shape = checkpoint.info(name).shape
    if len(shape) != dims:
        raise CheckpointError(f"{checkpoint.place}: tensor {name!r} must have {dims} dimensions, got {list(shape)}")
    return shape


def count_of(checkpoint: Checkpoint, pattern: str) -> int:
    """One more than the largest number at the pattern's place, 0 where it never stands."""
    matches = (re.match(pattern, name) for name in checkpoint.tensors)
    return max((int(match[1]) for match in matches if match), default=-1) + 1
