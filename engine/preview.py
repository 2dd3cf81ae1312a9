"""Cheap pictures of latents."""

from __future__ import annotations

import torch
from PIL import Image

from .picture import to_picture


def draw(latents: torch.Tensor, projection: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """``rgb = [latents, 1] @ projection`` per latent pixel, scaled to ``size`` (width, height).

    Args:
        latents: float32 [1, z, 1, h, w].
        projection: float32 [z + 1, 3], the VAE's affine fit.
        size: of the picture.
    """
    values = latents[0, :, 0].cpu().float().permute(1, 2, 0)
    weights = projection.cpu().float()
    pixels = (values @ weights[:-1] + weights[-1]).clamp(-1, 1)
    return to_picture(pixels.permute(2, 0, 1)[None]).resize(size, Image.Resampling.BICUBIC)
