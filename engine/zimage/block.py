"""The single-stream block of Z-Image, without its modulation weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.attention import attend
from ...kernels.modulate import add_gated
from ...kernels.rope import norm_rope_joint
from ..dit.kernels import DEFINITIONS, Kernels
from ..quant import project
from .config import ZImageConfig
from .modulation import BlockRows

HEAD_EPS = 1e-5
"""Of the norm over a head, whatever ``norm_eps`` of the config is."""


class Scale(nn.Module):
    """RMS norm over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] to the same shape."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    """Mask-free attention over one sequence."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.n_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.norm_q, self.norm_k = (Scale(config.head_dim, HEAD_EPS) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])

    def forward(self, x: torch.Tensor, rotations: torch.Tensor, keep: int | None, kernels: Kernels) -> torch.Tensor:
        """Every token is a key; the first ``keep`` tokens (None: all) are queries: [batch, queries, dim]."""
        inputs = x if keep is None else x[:, :keep]
        if keep is None:
            parts = project(x, [self.to_q, self.to_k, self.to_v])
        else:
            parts = [*project(inputs, [self.to_q]), *project(x, [self.to_k, self.to_v])]
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        del parts
        for heads, norm in ((query, self.norm_q), (key, self.norm_k)):
            turns = rotations[: heads.shape[1]]
            norm_rope_joint(heads, norm.weight, turns, heads, eps=norm.eps, implementation=kernels.rope)
        return self.to_out[0](attend(query, key, value, mode=kernels.attention))


class FeedForward(nn.Module):
    """``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, dim] to the same shape."""
        gate, value = project(x, [self.w1, self.w3])
        return self.w2(F.silu(gate, inplace=True).mul_(value))


class ZImageBlock(nn.Module):
    """``x += g * norm2(attention(norm1(x) * s))``, then the same around the feed-forward layer.

    The context refiner, the noise refiner and the joint layers are all such blocks; the context refiner's have no
    rows, which stands for s = g = 1.

    Source: huggingface/diffusers@v0.42.1:src/diffusers/models/transformers/transformer_z_image.py
    (ZImageTransformerBlock); ours takes rows instead of a time embedding and updates the hidden states in place.
    """

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.attention_norm1, self.ffn_norm1 = (Scale(config.dim, config.norm_eps) for _ in range(2))
        self.attention_norm2, self.ffn_norm2 = (Scale(config.dim, config.norm_eps) for _ in range(2))

    def forward(
        self,
        x: torch.Tensor,
        rows: BlockRows | None,
        rotations: torch.Tensor,
        keep: int | None = None,
        kernels: Kernels = DEFINITIONS,
    ) -> torch.Tensor:
        """Run the block on one branch.

        Args:
            x: [batch, tokens, dim]; overwritten.
            rows: modulation rows of this block and timestep; None in the context refiner.
            rotations: complex64 [tokens, head_dim / 2].
            keep: compute only the first so many tokens (those that are read behind the last block); None keeps all.
            kernels: implementations.

        Returns:
            The new hidden states, [batch, keep or tokens, dim].
        """
        normed = self.attention_norm1(x)
        if rows is not None:
            normed.mul_(rows.attention_scale)
        update = self.attention_norm2(self.attention(normed, rotations, keep, kernels))
        del normed
        x = _add(x[:, :keep], update, None if rows is None else rows.attention_gate, kernels)
        normed = self.ffn_norm1(x)
        if rows is not None:
            normed.mul_(rows.ffn_scale)
        update = self.ffn_norm2(self.feed_forward(normed))
        return _add(x, update, None if rows is None else rows.ffn_gate, kernels)


def _add(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor | None, kernels: Kernels) -> torch.Tensor:
    return x.add_(update) if gate is None else add_gated(x, update, gate, implementation=kernels.modulate)
