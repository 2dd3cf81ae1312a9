"""Which tensors of which shapes a component must have, from its config alone; no module is built."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

Shapes = dict[str, tuple[int, ...]]

_TEXT_DEFAULTS = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 29568,
    "vocab_size": 152064,
}
_VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
}
_TIMESTEP_CHANNELS = 256
_MLP_RATIO = 4
_MODULATIONS = 6


def transformer_shapes(config: Mapping[str, Any]) -> Shapes:
    """Tensors of a Qwen-Image transformer with diffusers names."""
    head = config["attention_head_dim"]
    dim = head * config["num_attention_heads"]
    joint = config["joint_attention_dim"]
    patch = config.get("patch_size", 2)
    shapes: Shapes = {"txt_norm.weight": (joint,)}
    _linear(shapes, "img_in", config["in_channels"], dim)
    _linear(shapes, "txt_in", joint, dim)
    _linear(shapes, "time_text_embed.timestep_embedder.linear_1", _TIMESTEP_CHANNELS, dim)
    _linear(shapes, "time_text_embed.timestep_embedder.linear_2", dim, dim)
    _linear(shapes, "norm_out.linear", dim, 2 * dim)
    _linear(shapes, "proj_out", dim, patch * patch * config["out_channels"])
    for layer in range(config["num_layers"]):
        root = f"transformer_blocks.{layer}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            _linear(shapes, f"{root}.attn.{name}", dim, dim)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes[f"{root}.attn.{name}.weight"] = (head,)
        for stream in ("img", "txt"):
            _linear(shapes, f"{root}.{stream}_mod.1", dim, _MODULATIONS * dim)
            _linear(shapes, f"{root}.{stream}_mlp.net.0.proj", dim, _MLP_RATIO * dim)
            _linear(shapes, f"{root}.{stream}_mlp.net.2", _MLP_RATIO * dim, dim)
    return shapes


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a Qwen2.5-VL config, nested or flat, with the class defaults filled in."""
    return _TEXT_DEFAULTS | {key: value for key, value in _part(config, "text_config").items() if value is not None}


def vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The vision tower's part of a Qwen2.5-VL config, with the class defaults filled in."""
    given = dict(config.get("vision_config") or {})
    if "in_chans" in given:
        given.setdefault("in_channels", given["in_chans"])
    return _VISION_DEFAULTS | given


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    nested = config.get(name)
    return nested if nested else config


def text_encoder_shapes(config: Mapping[str, Any]) -> Shapes:
    """Tensors of Qwen2.5-VL in our spelling of names; ``lm_head.weight`` is left out, since it is never used."""
    return _language_shapes(text_config(config)) | _vision_shapes(vision_config(config))


def _language_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    width, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes: Shapes = {
        "language_model.embed_tokens.weight": (config["vocab_size"], hidden),
        "language_model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        root = f"language_model.layers.{layer}"
        shapes[f"{root}.input_layernorm.weight"] = shapes[f"{root}.post_attention_layernorm.weight"] = (hidden,)
        _linear(shapes, f"{root}.self_attn.q_proj", hidden, width)
        _linear(shapes, f"{root}.self_attn.k_proj", hidden, kv)
        _linear(shapes, f"{root}.self_attn.v_proj", hidden, kv)
        shapes[f"{root}.self_attn.o_proj.weight"] = (hidden, width)
        shapes[f"{root}.mlp.gate_proj.weight"] = shapes[f"{root}.mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{root}.mlp.down_proj.weight"] = (hidden, ffn)
    return shapes


def _vision_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, ffn, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    merged = hidden * config["spatial_merge_size"] ** 2
    shapes: Shapes = {
        "visual.patch_embed.proj.weight": (
            hidden,
            config["in_channels"],
            config["temporal_patch_size"],
            patch,
            patch,
        ),
        "visual.merger.ln_q.weight": (hidden,),
    }
    _linear(shapes, "visual.merger.mlp.0", merged, merged)
    _linear(shapes, "visual.merger.mlp.2", merged, config["out_hidden_size"])
    for layer in range(config["depth"]):
        root = f"visual.blocks.{layer}"
        shapes[f"{root}.norm1.weight"] = shapes[f"{root}.norm2.weight"] = (hidden,)
        _linear(shapes, f"{root}.attn.qkv", hidden, 3 * hidden)
        _linear(shapes, f"{root}.attn.proj", hidden, hidden)
        _linear(shapes, f"{root}.mlp.gate_proj", hidden, ffn)
        _linear(shapes, f"{root}.mlp.up_proj", hidden, ffn)
        _linear(shapes, f"{root}.mlp.down_proj", ffn, hidden)
    return shapes


def vae_shapes(config: Mapping[str, Any]) -> Shapes:
    """Tensors of the Qwen image VAE with diffusers names."""
    z, mult = config["z_dim"], config["dim_mult"]
    base = config["base_dim"]
    shapes: Shapes = {}
    _conv(shapes, "quant_conv", 2 * z, 2 * z, (1, 1, 1))
    _conv(shapes, "post_quant_conv", z, z, (1, 1, 1))
    _conv(shapes, "encoder.conv_in", config.get("input_channels", 3), base, (3, 3, 3))
    _down(shapes, config)
    top = base * mult[-1]
    _mid(shapes, "encoder.mid_block", top)
    shapes["encoder.norm_out.gamma"] = (top, 1, 1, 1)
    _conv(shapes, "encoder.conv_out", top, 2 * z, (3, 3, 3))
    _conv(shapes, "decoder.conv_in", z, top, (3, 3, 3))
    _mid(shapes, "decoder.mid_block", top)
    _up(shapes, config)
    shapes["decoder.norm_out.gamma"] = (base * mult[0], 1, 1, 1)
    _conv(shapes, "decoder.conv_out", base * mult[0], config.get("input_channels", 3), (3, 3, 3))
    return shapes


def _down(shapes: Shapes, config: Mapping[str, Any]) -> None:
    widths = [config["base_dim"] * factor for factor in (1, *config["dim_mult"])]
    index = 0
    for level, (before, width) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        for block in range(config["num_res_blocks"]):
            _residual(shapes, f"encoder.down_blocks.{index}", width if block else before, width)
            index += 1
        if level < len(config["dim_mult"]) - 1:
            root = f"encoder.down_blocks.{index}"
            _conv(shapes, f"{root}.resample.1", width, width, (3, 3))
            if config["temperal_downsample"][level]:
                _conv(shapes, f"{root}.time_conv", width, width, (3, 1, 1))
            index += 1


def _up(shapes: Shapes, config: Mapping[str, Any]) -> None:
    falling = [config["base_dim"] * factor for factor in reversed(config["dim_mult"])]
    temporal = list(reversed(config["temperal_downsample"]))
    for level, width in enumerate(falling):
        root = f"decoder.up_blocks.{level}"
        before = width if level == 0 else falling[level - 1] // 2
        for block in range(config["num_res_blocks"] + 1):
            _residual(shapes, f"{root}.resnets.{block}", width if block else before, width)
        if level < len(falling) - 1:
            _conv(shapes, f"{root}.upsamplers.0.resample.1", width, width // 2, (3, 3))
            if temporal[level]:
                _conv(shapes, f"{root}.upsamplers.0.time_conv", width, 2 * width, (3, 1, 1))


def _mid(shapes: Shapes, root: str, width: int) -> None:
    for block in range(2):
        _residual(shapes, f"{root}.resnets.{block}", width, width)
    shapes[f"{root}.attentions.0.norm.gamma"] = (width, 1, 1)
    _conv(shapes, f"{root}.attentions.0.to_qkv", width, 3 * width, (1, 1))
    _conv(shapes, f"{root}.attentions.0.proj", width, width, (1, 1))


def _residual(shapes: Shapes, root: str, before: int, width: int) -> None:
    shapes[f"{root}.norm1.gamma"] = (before, 1, 1, 1)
    shapes[f"{root}.norm2.gamma"] = (width, 1, 1, 1)
    _conv(shapes, f"{root}.conv1", before, width, (3, 3, 3))
    _conv(shapes, f"{root}.conv2", width, width, (3, 3, 3))
    if before != width:
        _conv(shapes, f"{root}.conv_shortcut", before, width, (1, 1, 1))


def _linear(shapes: Shapes, name: str, before: int, after: int) -> None:
    shapes[f"{name}.weight"] = (after, before)
    shapes[f"{name}.bias"] = (after,)


def _conv(shapes: Shapes, name: str, before: int, after: int, kernel: tuple[int, ...]) -> None:
    shapes[f"{name}.weight"] = (after, before, *kernel)
    shapes[f"{name}.bias"] = (after,)


def element_count(shapes: Shapes) -> int:
    """Parameters of all tensors together."""
    return sum(prod(shape) for shape in shapes.values())
