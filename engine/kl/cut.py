"""Where this autoencoder's maps are cut into bands of rows; needs no torch."""

from __future__ import annotations

from dataclasses import replace

from ..vae.cut import Cut

_CUDA_VALUES = 3 << 20


def kl_cut(device_kind: str, tile_pixels: int | None = None) -> Cut:
    """The cut for ``"cpu"`` or ``"cuda"``: as for the Qwen VAE on a CPU, of 3 M numbers a band on a GPU.

    Every pass here goes over a stored map, so a band only has to fill the device; larger ones would add to the map.

    Raises:
        RequestError: the tile is not positive.
    """
    cut = Cut.of(device_kind, tile_pixels)
    return cut if device_kind == "cpu" else replace(cut, values=_CUDA_VALUES)
