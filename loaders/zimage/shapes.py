"""Which tensors of which shapes the parts of Z-Image must have, from their configs alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]

_TIME_CHANNELS = 256
_TIME_HIDDEN = 1024
_PATCH_CELLS = 4


def transformer_shapes(config: Mapping[str, Any]) -> Shapes:
    """Tensors of a Z-Image transformer with diffusers names."""
    dim, caption = config["dim"], config["cap_feat_dim"]
    time, patch = min(dim, _TIME_CHANNELS), _PATCH_CELLS * config["in_channels"]
    shapes: Shapes = {"x_pad_token": (1, dim), "cap_pad_token": (1, dim), "cap_embedder.0.weight": (caption,)}
    _linear(shapes, "cap_embedder.1", caption, dim)
    _linear(shapes, "t_embedder.mlp.0", _TIME_CHANNELS, _TIME_HIDDEN)
    _linear(shapes, "t_embedder.mlp.2", _TIME_HIDDEN, time)
    _linear(shapes, "all_x_embedder.2-1", patch, dim)
    _linear(shapes, "all_final_layer.2-1.linear", dim, patch)
    _linear(shapes, "all_final_layer.2-1.adaLN_modulation.1", time, dim)
    for root, count in (("noise_refiner", "n_refiner_layers"), ("layers", "n_layers")):
        for layer in range(config[count]):
            _block(shapes, f"{root}.{layer}", config)
            _linear(shapes, f"{root}.{layer}.adaLN_modulation.0", time, 4 * dim)
    for layer in range(config["n_refiner_layers"]):
        _block(shapes, f"context_refiner.{layer}", config)
    return shapes


def _block(shapes: Shapes, root: str, config: Mapping[str, Any]) -> None:
    dim = config["dim"]
    head, hidden = dim // config["n_heads"], int(dim / 3 * 8)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        shapes[f"{root}.attention.{name}.weight"] = (dim, dim)
    for name in ("norm_q", "norm_k"):
        shapes[f"{root}.attention.{name}.weight"] = (head,)
    shapes[f"{root}.feed_forward.w1.weight"] = shapes[f"{root}.feed_forward.w3.weight"] = (hidden, dim)
    shapes[f"{root}.feed_forward.w2.weight"] = (dim, hidden)
    for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        shapes[f"{root}.{name}.weight"] = (dim,)


def text_encoder_shapes(config: Mapping[str, Any]) -> Shapes:
    """Tensors of Qwen3 in our spelling of names, without ``lm_head.weight``, which is never used."""
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    width, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes: Shapes = {
        "language_model.embed_tokens.weight": (config["vocab_size"], hidden),
        "language_model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        root = f"language_model.layers.{layer}"
        shapes[f"{root}.input_layernorm.weight"] = shapes[f"{root}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{root}.self_attn.q_norm.weight"] = shapes[f"{root}.self_attn.k_norm.weight"] = (head,)
        shapes[f"{root}.self_attn.q_proj.weight"] = (width, hidden)
        shapes[f"{root}.self_attn.k_proj.weight"] = shapes[f"{root}.self_attn.v_proj.weight"] = (keys, hidden)
        shapes[f"{root}.self_attn.o_proj.weight"] = (hidden, width)
        shapes[f"{root}.mlp.gate_proj.weight"] = shapes[f"{root}.mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{root}.mlp.down_proj.weight"] = (hidden, ffn)
    return shapes


def vae_shapes(config: Mapping[str, Any]) -> Shapes:
    """Tensors of a flux-type AutoencoderKL with diffusers names."""
    widths, layers, latent = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    shapes: Shapes = {}
    _conv(shapes, "encoder.conv_in", 3, widths[0], 3)
    _levels(shapes, "encoder.down_blocks", list(widths), layers, "downsamplers")
    _ends(shapes, "encoder", widths[-1], widths[-1], 2 * latent)
    _conv(shapes, "decoder.conv_in", latent, widths[-1], 3)
    _levels(shapes, "decoder.up_blocks", list(reversed(widths)), layers + 1, "upsamplers")
    _ends(shapes, "decoder", widths[-1], widths[0], 3)
    return shapes


def _levels(shapes: Shapes, root: str, widths: list[int], layers: int, between: str) -> None:
    before = widths[0]
    for level, width in enumerate(widths):
        for layer in range(layers):
            _residual(shapes, f"{root}.{level}.resnets.{layer}", width if layer else before, width)
        if level < len(widths) - 1:
            _conv(shapes, f"{root}.{level}.{between}.0.conv", width, width, 3)
        before = width


def _ends(shapes: Shapes, root: str, middle: int, last: int, outputs: int) -> None:
    for block in range(2):
        _residual(shapes, f"{root}.mid_block.resnets.{block}", middle, middle)
    attention = f"{root}.mid_block.attentions.0"
    _norm(shapes, f"{attention}.group_norm", middle)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        _linear(shapes, f"{attention}.{name}", middle, middle)
    _norm(shapes, f"{root}.conv_norm_out", last)
    _conv(shapes, f"{root}.conv_out", last, outputs, 3)


def _residual(shapes: Shapes, root: str, before: int, width: int) -> None:
    _norm(shapes, f"{root}.norm1", before)
    _conv(shapes, f"{root}.conv1", before, width, 3)
    _norm(shapes, f"{root}.norm2", width)
    _conv(shapes, f"{root}.conv2", width, width, 3)
    if before != width:
        _conv(shapes, f"{root}.conv_shortcut", before, width, 1)


def _norm(shapes: Shapes, name: str, width: int) -> None:
    shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)


def _linear(shapes: Shapes, name: str, before: int, after: int) -> None:
    shapes[f"{name}.weight"] = (after, before)
    shapes[f"{name}.bias"] = (after,)


def _conv(shapes: Shapes, name: str, before: int, after: int, kernel: int) -> None:
    shapes[f"{name}.weight"] = (after, before, kernel, kernel)
    shapes[f"{name}.bias"] = (after,)
