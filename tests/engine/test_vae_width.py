"""Bands at the real width of the image VAE."""

from __future__ import annotations

import pytest
import torch
from qengine.bench.bench_vae import our_side
from qengine.engine.vae.cut import Cut

WHOLE = Cut(1 << 40)


@pytest.mark.parametrize(("height", "width"), [(96, 72), (56, 104)])
def test_at_the_real_width_bands_of_any_height_give_the_whole_map_within_1e_6(height: int, width: int) -> None:
    vae = our_side()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, height, width, generator=generator) * 2 - 1
    latents = torch.randn(1, 16, 1, height // 8, width // 8, generator=generator)
    vae.cut = WHOLE
    encoded, decoded = vae.encode(pixels), vae.decode(latents)
    for cut in (Cut.of("cpu"), *(Cut(1 << 40, tile) for tile in (1, 8, 33, 64))):
        vae.cut = cut
        assert (vae.encode(pixels) - encoded).abs().max() <= 1e-6, cut
        assert (vae.decode(latents) - decoded).abs().max() <= 1e-6, cut
