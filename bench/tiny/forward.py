"""The transformer's forward pass, arranged for training speed on a CPU.

The same function as `QwenImageTransformer2DModel.forward` for one reference (the export is checked against it), but the
two ranges of zero_cond_t are modulated as slices, rotary embeddings are real, and the last block computes neither the
text nor the reference rows, which nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from torch import nn

Pair = tuple[torch.Tensor, torch.Tensor]


def _rotate(x: torch.Tensor, turn: Pair) -> torch.Tensor:
    """Rotates pairs of neighbours; x [batch, heads, rows, 32], turn two of [rows, 16]."""
    cos, sin = turn
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def _modulate(x: torch.Tensor, rows: Sequence[int], mods: Sequence[torch.Tensor], place: int) -> torch.Tensor:
    """LayerNorm, then scale and shift, each range of rows by its own row of modulations [batch, 6, width]."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    parts = normed.split(rows, 1)
    out = [
        torch.addcmul(m[:, None, place], part, 1 + m[:, None, place + 1]) for part, m in zip(parts, mods, strict=True)
    ]
    return torch.cat(out, 1) if len(out) > 1 else out[0]


def _add(
    x: torch.Tensor, update: torch.Tensor, rows: Sequence[int], mods: Sequence[torch.Tensor], place: int
) -> torch.Tensor:
    """Residual plus gated update, range by range."""
    pieces = zip(x.split(rows, 1), update.split(rows, 1), mods, strict=True)
    out = [torch.addcmul(a, b, m[:, None, place]) for a, b, m in pieces]
    return torch.cat(out, 1) if len(out) > 1 else out[0]


def _heads(x: torch.Tensor, linear: nn.Module, norm: nn.Module | None, turn: Pair | None, count: int) -> torch.Tensor:
    out = linear(x).unflatten(-1, (count, -1)).transpose(1, 2)
    if norm is not None:
        out = F.rms_norm(out, out.shape[-1:], norm.weight, norm.eps)
    return out if turn is None else _rotate(out, turn)


def _block(
    block: nn.Module, image: torch.Tensor, text: torch.Tensor, rows: int, embeds: Pair, turns: tuple[Pair, Pair],
    mask: torch.Tensor, last: bool,
) -> Pair:  # fmt: skip
    attn, count = block.attn, block.num_attention_heads
    temb, temb0 = (F.silu(e) for e in embeds)
    ranges = (rows, image.shape[1] - rows)
    mods = [block.img_mod[1](e).unflatten(-1, (6, -1)) for e in (temb, temb0)]
    txt_mods = [block.txt_mod[1](temb).unflatten(-1, (6, -1))]
    length = (text.shape[1],)
    x = _modulate(image, ranges, mods, 0)
    c = _modulate(text, length, txt_mods, 0)
    img_turn, txt_turn = turns
    key = torch.cat((_heads(c, attn.add_k_proj, attn.norm_added_k, txt_turn, count),
                     _heads(x, attn.to_k, attn.norm_k, img_turn, count)), 2)  # fmt: skip
    value = torch.cat((_heads(c, attn.add_v_proj, None, None, count), _heads(x, attn.to_v, None, None, count)), 2)
    if last:
        image, ranges, mods = image[:, :rows], (rows,), mods[:1]
        x, img_turn = x[:, :rows], (img_turn[0][:rows], img_turn[1][:rows])
    query = _heads(x, attn.to_q, attn.norm_q, img_turn, count)
    if not last:
        query = torch.cat((_heads(c, attn.add_q_proj, attn.norm_added_q, txt_turn, count), query), 2)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
    image = _add(image, attn.to_out[0](out[:, -image.shape[1] :]), ranges, mods, 2)
    image = _add(image, block.img_mlp(_modulate(image, ranges, mods, 3)), ranges, mods, 5)
    if last:
        return image, text
    text = _add(text, attn.to_add_out(out[:, : length[0]]), length, txt_mods, 2)
    text = _add(text, block.txt_mlp(_modulate(text, length, txt_mods, 3)), length, txt_mods, 5)
    return image, text


def velocity(
    model: QwenImageTransformer2DModel, tokens: torch.Tensor, reference: torch.Tensor, grid: tuple[int, int],
    sigma: torch.Tensor, text: torch.Tensor, mask: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Predicted velocity of the target tokens.

    Args:
        model: The transformer.
        tokens: Noisy target, [batch, h * w, 64].
        reference: Clean reference, same shape.
        grid: h and w in tokens.
        sigma: [batch].
        text: Prompt embeddings [batch, length, 96].
        mask: Which of them are real, [batch, length].

    Returns:
        [batch, h * w, 64].
    """
    rows = tokens.shape[1]
    image = model.img_in(torch.cat((tokens, reference), 1))
    embeds = (model.time_text_embed(sigma, image), model.time_text_embed(torch.zeros_like(sigma), image))
    freqs = model.pos_embed([[(1, *grid), (1, *grid)]], max_txt_seq_len=text.shape[1], device=image.device)
    img_turn, txt_turn = ((f.real.contiguous(), f.imag.contiguous()) for f in freqs)
    whole = torch.cat((mask, mask.new_ones(1).expand(len(mask), 2 * rows)), 1)[:, None, None]
    text = model.txt_in(model.txt_norm(text))
    for index, block in enumerate(model.transformer_blocks):
        last = index == len(model.transformer_blocks) - 1
        image, text = _block(block, image, text, rows, embeds, (img_turn, txt_turn), whole, last)
    return model.proj_out(model.norm_out(image, embeds[0]))
