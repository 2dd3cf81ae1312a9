"""The definition in float32, a head and some queries at a time, so that no matrix of all tokens is made."""

from __future__ import annotations

import torch

CHUNK_SCORES = 8 << 20
"""Scores that are held at a time."""


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``p = exp(q k^T / sqrt(hd) + bias - lse)``, ``out = p v``, ``lse`` the log of the sum of exponentials.

    Args:
        query: [B, T, H, hd].
        keys: [B, S, H, hd].
        values: [B, S, H, hd].
        bias: float32 [S], or None for zeros.

    Returns:
        [B, T, H * hd] in the dtype of query, and lse float32 [B, T, H], with which parts over other keys can be joined.
    """
    batch, tokens, heads, width = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, tokens, heads, dtype=torch.float32, device=query.device)
    step = max(1, CHUNK_SCORES // (batch * keys.shape[1]))
    for head in range(heads):
        k, v = keys[:, :, head].float(), values[:, :, head].float()
        for start in range(0, tokens, step):
            rows = slice(start, start + step)
            scores = (query[:, rows, head].float() * width**-0.5) @ k.transpose(1, 2)
            if bias is not None:
                scores += bias
            lse[:, rows, head] = total = scores.logsumexp(-1)
            out[:, rows, head] = (scores.sub_(total[..., None]).exp_() @ v).to(out.dtype)
    return out.flatten(2), lse
