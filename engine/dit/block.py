"""The double-stream block of Qwen-Image, without its modulation weights.

``img_mod`` and ``txt_mod`` see only the timestep; their rows come from the modulation table (``modulation.py``), so the
block holds two thirds of the stored weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .rope import rotate

EPS = 1e-6


class Modulation(NamedTuple):
    """Shift, scale and gate rows of one norm, each [dim] in the compute dtype."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


@dataclass(frozen=True)
class BlockRows:
    """One block's modulation rows for one timestep, each [6 * dim]: two times (shift, scale, gate).

    ``reference`` is the row of timestep zero, used for reference tokens where the model was trained so (zero_cond_t);
    None where all image tokens share the row of the current timestep.
    """

    image: torch.Tensor
    text: torch.Tensor
    reference: torch.Tensor | None = None

    def pick(self, norm: int) -> tuple[Modulation, Modulation, Modulation | None]:
        """The (image, text, reference) rows of norm 0 (attention) or 1 (feed-forward)."""
        image, text = self._split(self.image, norm), self._split(self.text, norm)
        return image, text, None if self.reference is None else self._split(self.reference, norm)

    @staticmethod
    def _split(row: torch.Tensor, norm: int) -> Modulation:
        return Modulation(*row.chunk(6)[3 * norm : 3 * norm + 3])


def modulate(
    x: torch.Tensor, target: Modulation, reference: Modulation | None = None, target_tokens: int | None = None
) -> torch.Tensor:
    """``LayerNorm(x) * (1 + scale) + shift``, the first rows by ``target``, the rest by ``reference``.

    Target and reference rows are contiguous ranges, so each is modulated as a slice and no per-token copy of the
    modulation is made.

    Args:
        x: [batch, tokens, dim].
        target: rows for the first ``target_tokens`` tokens, or for all of them when ``reference`` is None.
        reference: rows for the remaining tokens.
        target_tokens: length of the first range; read only when ``reference`` is given.
    """
    y = F.layer_norm(x, x.shape[-1:], eps=EPS)
    if reference is None:
        return y.mul_(1 + target.scale).add_(target.shift)
    y[:, :target_tokens].mul_(1 + target.scale).add_(target.shift)
    y[:, target_tokens:].mul_(1 + reference.scale).add_(reference.shift)
    return y


def add_gated(
    x: torch.Tensor,
    update: torch.Tensor,
    target: Modulation,
    reference: Modulation | None = None,
    target_tokens: int | None = None,
) -> torch.Tensor:
    """``x + gate * update`` in place, with the gate of each range as in :func:`modulate`."""
    if reference is None or update.shape[1] == target_tokens:
        return x.addcmul_(update, target.gate)
    x[:, :target_tokens].addcmul_(update[:, :target_tokens], target.gate)
    x[:, target_tokens:].addcmul_(update[:, target_tokens:], reference.gate)
    return x


class _Activation(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear with the checkpoint's names (``net.0.proj``, ``net.2``)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_Activation(dim, hidden), nn.Identity(), nn.Linear(hidden, dim)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, dim] to the same shape."""
        return self.net[2](self.net[0](x))


class _Scale(nn.Module):
    """RMS norm over the head dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, EPS)


class Rotations(NamedTuple):
    """Rotary factors: complex64 [text tokens, head_dim/2] and [image tokens, head_dim/2]."""

    text: torch.Tensor
    image: torch.Tensor


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Mask-free attention; arguments are [batch, tokens, heads, head_dim], the result [batch, tokens, dim]."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


class JointAttention(nn.Module):
    """Attention over the joint sequence [text, target, references]; each stream has its own projections."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (_Scale(dim // heads) for _ in range(4))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_add_out = nn.Linear(dim, dim)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def _image_queries(self, image: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
        return rotate(self.norm_q(self._heads(self.to_q(image))), rotations)

    def _keys_values(
        self, image: torch.Tensor, text: torch.Tensor, rotations: Rotations
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text_keys = rotate(self.norm_added_k(self._heads(self.add_k_proj(text))), rotations.text)
        image_keys = rotate(self.norm_k(self._heads(self.to_k(image))), rotations.image)
        values = torch.cat([self.add_v_proj(text), self.to_v(image)], dim=1)
        return torch.cat([text_keys, image_keys], dim=1), self._heads(values)

    def forward(
        self, image: torch.Tensor, text: torch.Tensor, rotations: Rotations
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend with every token as a query.

        Args:
            image: [batch, image tokens, dim], modulated.
            text: [batch, text tokens, dim], modulated.
            rotations: rotary factors of both streams.

        Returns:
            Updates of the image and of the text stream, shaped as the inputs.
        """
        text_queries = rotate(self.norm_added_q(self._heads(self.add_q_proj(text))), rotations.text)
        queries = torch.cat([text_queries, self._image_queries(image, rotations.image)], dim=1)
        out = _attend(queries, *self._keys_values(image, text, rotations))
        length = text.shape[1]
        return self.to_out[0](out[:, length:]), self.to_add_out(out[:, :length])

    def forward_target(
        self, image: torch.Tensor, text: torch.Tensor, rotations: Rotations, target_tokens: int
    ) -> torch.Tensor:
        """Attend with the target tokens alone as queries: [batch, target_tokens, dim]."""
        queries = self._image_queries(image[:, :target_tokens], rotations.image[:target_tokens])
        return self.to_out[0](_attend(queries, *self._keys_values(image, text, rotations)))


class DoubleStreamBlock(nn.Module):
    """One block; ``forward`` keeps both streams, ``forward_last`` computes only what the output reads.

    Source: huggingface/diffusers@v0.42.1:src/diffusers/models/transformers/transformer_qwenimage.py
    (QwenImageTransformerBlock); ours takes modulation rows instead of a time embedding, slices instead of ``where``,
    and updates the hidden states in place.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = JointAttention(dim, heads)
        self.img_mlp = FeedForward(dim, 4 * dim)
        self.txt_mlp = FeedForward(dim, 4 * dim)

    def forward(
        self, image: torch.Tensor, text: torch.Tensor, rows: BlockRows, rotations: Rotations, target_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block on one branch.

        Args:
            image: [batch, target + reference tokens, dim]; overwritten.
            text: [batch, text tokens, dim]; overwritten.
            rows: modulation rows of this block and timestep.
            rotations: rotary factors of both streams.
            target_tokens: how many image tokens belong to the picture being made.

        Returns:
            The new image and text hidden states.
        """
        img, txt, ref = rows.pick(0)
        image_update, text_update = self.attn(modulate(image, img, ref, target_tokens), modulate(text, txt), rotations)
        image = add_gated(image, image_update, img, ref, target_tokens)
        text = add_gated(text, text_update, txt)
        img, txt, ref = rows.pick(1)
        image = add_gated(image, self.img_mlp(modulate(image, img, ref, target_tokens)), img, ref, target_tokens)
        text = add_gated(text, self.txt_mlp(modulate(text, txt)), txt)
        return image, text

    def forward_last(
        self, image: torch.Tensor, text: torch.Tensor, rows: BlockRows, rotations: Rotations, target_tokens: int
    ) -> torch.Tensor:
        """Run the block for the target tokens only: [batch, target_tokens, dim]."""
        img, txt, ref = rows.pick(0)
        modulated = modulate(image, img, ref, target_tokens)
        update = self.attn.forward_target(modulated, modulate(text, txt), rotations, target_tokens)
        target = add_gated(image[:, :target_tokens].contiguous(), update, img)
        img = rows.pick(1)[0]
        return add_gated(target, self.img_mlp(modulate(target, img)), img)
