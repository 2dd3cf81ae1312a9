"""What the headers of Z-Image's parts say, configs of single files, and the check of a config against the headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..detect import compare, count_of, require_kind, shape_of

_HEAD_DIM = 128
_LATENT_CHANNELS = 16
_GROUPS = 32
_SIDECAR = "keep the component's config.json beside the file"
_VAE_FIXED = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
}
_VAE_DEFAULTS = {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}


def transformer_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the headers of a Z-Image transformer say, in the names of its config.

    Raises:
        CheckpointError: it is another kind of model.
    """
    kind = ("all_x_embedder.2-1.weight", "cap_embedder.0.weight", "layers.0.attention.norm_q.weight")
    require_kind(checkpoint, "Z-Image transformer", kind)
    dim, patch = shape_of(checkpoint, kind[0], 2)
    (head,) = shape_of(checkpoint, kind[2], 1)
    if not head or dim % head:
        raise CheckpointError(f"{checkpoint.place}: width must be a multiple of the head size {head}, got {dim}")
    return {
        "dim": dim,
        "n_heads": dim // head,
        "n_layers": count_of(checkpoint, r"layers\.(\d+)\."),
        "n_refiner_layers": count_of(checkpoint, r"noise_refiner\.(\d+)\."),
        "cap_feat_dim": shape_of(checkpoint, kind[1], 1)[0],
        "in_channels": patch // 4,
    }


def transformer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of a single-file transformer of the published head size.

    Raises:
        CheckpointError: it is another kind of model, or its rotary axes cannot be known.
    """
    facts = transformer_facts(checkpoint)
    head = facts["dim"] // facts["n_heads"]
    if head != _HEAD_DIM:
        raise CheckpointError(
            f"{checkpoint.place}: head size must be {_HEAD_DIM} to know the rotary axes without a config, got {head}",
            hint=_SIDECAR,
        )
    return facts | {
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "n_kv_heads": facts["n_heads"],
        "norm_eps": 1e-5,
        "qk_norm": True,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    }


def text_encoder_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the headers of a Qwen3 say, in the names of its config.

    Raises:
        CheckpointError: it is another kind of model.
    """
    layer = "language_model.layers.0"
    kind = ("language_model.embed_tokens.weight", f"{layer}.self_attn.q_norm.weight", f"{layer}.mlp.gate_proj.weight")
    require_kind(checkpoint, "Qwen3 text encoder", kind)
    vocab, hidden = shape_of(checkpoint, kind[0], 2)
    (head,) = shape_of(checkpoint, kind[1], 1)
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "head_dim": head,
        "num_attention_heads": shape_of(checkpoint, f"{layer}.self_attn.q_proj.weight", 2)[0] // max(1, head),
        "num_key_value_heads": shape_of(checkpoint, f"{layer}.self_attn.k_proj.weight", 2)[0] // max(1, head),
        "num_hidden_layers": count_of(checkpoint, r"language_model\.layers\.(\d+)\."),
        "intermediate_size": shape_of(checkpoint, kind[2], 2)[0],
    }


def text_encoder_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of a single-file Qwen3 of the published sizes; raises CheckpointError for another kind of model."""
    return text_encoder_facts(checkpoint) | {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": "lm_head.weight" not in checkpoint.tensors,
    }


def vae_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the headers of a flux-type VAE say, in the names of its config.

    Raises:
        CheckpointError: it is another kind of model, or has the names of the original file.
    """
    if "decoder.up.0.block.0.norm1.weight" in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.place} must be a VAE with diffusers names, got the original layout (ae.safetensors)",
            hint="use vae/diffusion_pytorch_model.safetensors of the model's hub repository",
        )
    kind = ("encoder.conv_in.weight", "encoder.conv_norm_out.weight", "decoder.up_blocks.0.resnets.0.conv1.weight")
    require_kind(checkpoint, "flux-type VAE", kind)
    levels = count_of(checkpoint, r"encoder\.down_blocks\.(\d+)\.")
    return {
        "block_out_channels": [
            shape_of(checkpoint, f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in range(levels)
        ],
        "layers_per_block": count_of(checkpoint, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": shape_of(checkpoint, "decoder.conv_in.weight", 4)[1],
    }


def vae_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of a single-file VAE of 16 latent channels.

    Raises:
        CheckpointError: it is another kind of model, or its latent scale cannot be known.
    """
    facts = vae_facts(checkpoint)
    if facts["latent_channels"] != _LATENT_CHANNELS:
        raise CheckpointError(
            f"{checkpoint.place}: latent channels must be {_LATENT_CHANNELS} to know their scale without a config, "
            f"got {facts['latent_channels']}",
            hint=_SIDECAR,
        )
    return facts | _VAE_FIXED | {"norm_num_groups": _GROUPS, "scaling_factor": 0.3611, "shift_factor": 0.1159}


def check_transformer(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse a transformer config that the headers contradict; raises CheckpointError naming the first such key."""
    compare(config, transformer_facts(checkpoint), checkpoint.place)


def check_text_encoder(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse a Qwen3 config that the headers contradict, or that has biases; raises CheckpointError."""
    compare(config, text_encoder_facts(checkpoint), checkpoint.place)
    if config.get("attention_bias"):
        raise CheckpointError(f"{checkpoint.place}: attention_bias of Qwen3 must be false, got true")


def check_vae(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse a VAE config that the headers contradict, or that this engine does not run; raises CheckpointError."""
    compare(config, vae_facts(checkpoint), checkpoint.place)
    compare(_VAE_DEFAULTS | dict(config), _VAE_FIXED, checkpoint.place)
    groups = config.get("norm_num_groups")
    if not isinstance(groups, int) or groups < 1 or any(width % groups for width in config["block_out_channels"]):
        raise CheckpointError(
            f"{checkpoint.place}: norm_num_groups must divide {list(config['block_out_channels'])}, got {groups!r:.80}"
        )
    for key in ("scaling_factor", "shift_factor"):
        if not isinstance(config.get(key), int | float) or (key == "scaling_factor" and not config[key] > 0):
            raise CheckpointError(f"{checkpoint.place}: {key} must be a number, got {config.get(key)!r:.80}")
