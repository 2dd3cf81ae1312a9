"""The transformer: five double-stream blocks, started where a trained one would end up.

On a CPU the budget is a few thousand steps, so what is known beforehand is put in at the start: two heads per block
read the same position in the reference frame, one head reads the text, the first block copies the reference's latents
next to the target's, and the noise passes from `img_in` to `proj_out` through the residual stream. Training is free to
change all of it.
"""

from __future__ import annotations

import math

import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

LAYERS, HEADS, HEAD = 5, 5, 32
WIDTH = HEADS * HEAD
AXES = (8, 12, 12)
PATCH_CHANNELS, TEXT = 64, 96
COPY_HEADS, TEXT_HEAD = 2, 2
SHARPNESS = 3.0
# The fast rotary pairs: frame 0; height 0 and 1; width 0 and 1, as positions within a head.
FAST = (0, 1, 8, 9, 10, 11, 20, 21, 22, 23)
SLOWEST = 6


def config() -> dict[str, object]:
    """Arguments of `QwenImageTransformer2DModel`; zero_cond_t as in Qwen-Image-Edit-2511."""
    return {
        "patch_size": 2,
        "in_channels": PATCH_CHANNELS,
        "out_channels": PATCH_CHANNELS // 4,
        "num_layers": LAYERS,
        "attention_head_dim": HEAD,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT,
        "axes_dims_rope": AXES,
        "zero_cond_t": True,
    }


def _constant_copy_head(attn: nn.Module, head: int) -> None:
    """Query and key that meet where the key is one frame ahead at the same place.

    A pair rotated by theta * position scores cos(theta * (distance - 1)) when the query is turned by theta beforehand;
    the turn is needed for the frame axis only.
    """
    rows = slice(head * HEAD, (head + 1) * HEAD)
    key = torch.zeros(HEAD)
    key[list(FAST[::2])] = 1.0
    query = key.clone()
    query[0], query[1] = math.cos(1.0), math.sin(1.0)
    for layer, constant in ((attn.to_q, query), (attn.to_k, key)):
        layer.weight[rows] *= 0.05
        layer.bias[rows] = constant * 2
    attn.add_k_proj.weight[rows][list(FAST)] *= 0.1
    attn.add_q_proj.weight[rows][list(FAST)] *= 0.1


def _constant_text_head(attn: nn.Module, head: int) -> None:
    """Image queries meet text keys, and miss image keys, along the slowest pair of the frame axis."""
    rows = slice(head * HEAD, (head + 1) * HEAD)
    constant = torch.zeros(HEAD)
    constant[SLOWEST] = 2.0
    for layer, sign in ((attn.to_q, 1.0), (attn.to_k, -1.0), (attn.add_k_proj, 1.0)):
        layer.weight[rows] *= 0.3
        layer.bias[rows] = sign * constant


def _start_block(block: nn.Module, first: bool) -> None:
    attn = block.attn
    for norm in (attn.norm_q, attn.norm_k):
        norm.weight[list(FAST)] = SHARPNESS
    for head in range(HEADS):
        if head < COPY_HEADS:
            _constant_copy_head(attn, head)
            continue
        for layer in (attn.to_q, attn.to_k):
            layer.weight[[head * HEAD + i for i in FAST]] *= 0.2
        if head == TEXT_HEAD:
            _constant_text_head(attn, head)
    for mod in (block.img_mod[1], block.txt_mod[1]):
        mod.weight *= 0.1
        mod.bias.zero_()
        for gate in (2, 5):
            mod.bias[gate * WIDTH : (gate + 1) * WIDTH] = 0.5
    if first:
        rows = torch.arange(PATCH_CHANNELS)
        attn.to_v.weight[rows] = 0.0
        attn.to_v.weight[rows, rows] = 1.0
        attn.to_out[0].weight[:, rows] = 0.0
        attn.to_out[0].weight[rows + PATCH_CHANNELS, rows] = 2.0


@torch.no_grad()
def build(seed: int) -> QwenImageTransformer2DModel:
    """A fresh transformer with the start described above."""
    torch.manual_seed(seed)
    model = QwenImageTransformer2DModel(**config())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in model.transformer_blocks:
        for layer in (block.attn.to_out[0], block.attn.to_add_out, block.img_mlp.net[2], block.txt_mlp.net[2]):
            layer.weight *= 0.5
    for index, block in enumerate(model.transformer_blocks):
        _start_block(block, first=index == 0)
    eye = torch.eye(PATCH_CHANNELS)
    model.img_in.weight *= 0.2
    model.img_in.weight[:PATCH_CHANNELS] = eye
    model.img_in.weight[PATCH_CHANNELS : 2 * PATCH_CHANNELS] = 0.0
    model.proj_out.weight.zero_()
    model.proj_out.weight[:, :PATCH_CHANNELS] = eye
    model.norm_out.linear.weight *= 0.1
    return model
