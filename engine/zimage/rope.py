"""Rotary positions of Z-Image: (frame, row, column); a caption advances the frame, the image stands behind it."""

from __future__ import annotations

import torch

from .config import ZImageConfig, padded


def caption_rotations(tokens: int, config: ZImageConfig) -> torch.Tensor:
    """Unit complex rotations of a caption with its pads: token ``i`` stands at (1 + i, 0, 0).

    Returns:
        complex64 [padded tokens, head_dim / 2].
    """
    length = padded(tokens)
    positions = torch.zeros(length, 3, dtype=torch.int64)
    positions[:, 0] = torch.arange(1, length + 1)
    return _rotations(positions, config)


def image_rotations(rows: int, columns: int, caption_tokens: int, config: ZImageConfig) -> torch.Tensor:
    """Unit complex rotations of an image with its pads.

    Token (row, column) stands at (L + 1, row, column), where L is the padded length of the caption; a pad at (0, 0, 0).

    Returns:
        complex64 [padded rows * columns, head_dim / 2].
    """
    positions = torch.zeros(padded(rows * columns), 3, dtype=torch.int64)
    image = positions[: rows * columns].view(rows, columns, 3)
    image[..., 0] = padded(caption_tokens) + 1
    image[..., 1] = torch.arange(rows)[:, None]
    image[..., 2] = torch.arange(columns)
    return _rotations(positions, config)


def _rotations(positions: torch.Tensor, config: ZImageConfig) -> torch.Tensor:
    """Per axis ``exp(i * position * theta^(-2j/d))``; the angle is formed in float64 and rounded to float32."""
    angles = []
    for axis, dim in enumerate(config.axes_dims):
        frequencies = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(torch.outer(positions[:, axis].double(), frequencies).float())
    joined = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(joined), joined)
