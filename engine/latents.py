"""Latents and their packing into tokens."""

from __future__ import annotations

import torch

from ..kernels.guidance import combine

__all__ = ["combine", "initial_noise", "pack", "unpack"]


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[batch, z, 1, h, w] to tokens [batch, h/2 * w/2, 4z]; channel order is ``z * 4 + row * 2 + column``."""
    batch, channels, _, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Tokens [batch, rows * columns, 4z] to latents [batch, z, 1, 2 rows, 2 columns]; the inverse of :func:`pack`."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, rows, columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, 1, 2 * rows, 2 * columns)


def initial_noise(seed: int, channels: int, rows: int, columns: int) -> torch.Tensor:
    """Standard normal tokens [1, rows * columns, 4 channels] in float32.

    Drawn on the CPU in diffusers' layout [1, 1, z, h, w], so a seed starts the same picture there and on any device.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn((1, 1, channels, 2 * rows, 2 * columns), generator=generator, dtype=torch.float32)
    return pack(noise.transpose(1, 2))
