"""Rotary positions of Qwen-Image: three axes (frame, row, column), centred rows and columns, text on the diagonal."""

from __future__ import annotations

from collections.abc import Sequence

import torch

THETA = 10_000.0

Grid = tuple[int, int]
"""Rows and columns of an image in tokens."""


def _inverse_frequencies(dim: int) -> torch.Tensor:
    return 1.0 / torch.pow(THETA, torch.arange(0, dim, 2).to(torch.float32).div(dim))


def _rotations(positions: torch.Tensor, dim: int) -> torch.Tensor:
    angles = torch.outer(positions.to(torch.float32), _inverse_frequencies(dim))
    return torch.polar(torch.ones_like(angles), angles)


def _centred(length: int) -> torch.Tensor:
    return torch.arange(length) - (length - length // 2)


def image_rotations(grids: Sequence[Grid], axes: Sequence[int], frames: Sequence[int] | None = None) -> torch.Tensor:
    """Unit complex rotations of all image tokens, target first, then the references.

    Image ``k`` has frame position ``k``; its rows run ``-(h - h//2) .. h//2 - 1`` and its columns likewise.

    Args:
        grids: token rows and columns of the target and of every reference.
        axes: head dimensions given to frame, row and column; each is even.
        frames: frame positions of the images; None counts from 0.

    Returns:
        complex64 [sum of h*w, sum(axes) / 2].

    Source: huggingface/diffusers@v0.42.1:src/diffusers/models/transformers/transformer_qwenimage.py (QwenEmbedRope).
    """
    parts = []
    for frame, (rows, columns) in zip(frames or range(len(grids)), grids, strict=True):
        by_frame = _rotations(torch.tensor([frame]), axes[0]).expand(rows * columns, -1)
        by_row = _rotations(_centred(rows), axes[1]).repeat_interleave(columns, dim=0)
        by_column = _rotations(_centred(columns), axes[2]).repeat(rows, 1)
        parts.append(torch.cat([by_frame, by_row, by_column], dim=1))
    return torch.cat(parts)


def text_rotations(length: int, grids: Sequence[Grid], axes: Sequence[int]) -> torch.Tensor:
    """Unit complex rotations of the text tokens.

    All three axes carry the same position, counted from ``max(h//2, w//2)`` over every image.

    Returns:
        complex64 [length, sum(axes) / 2].
    """
    start = max(max(rows // 2, columns // 2) for rows, columns in grids)
    positions = torch.arange(start, start + length)
    return torch.cat([_rotations(positions, dim) for dim in axes], dim=1)
