"""Where an image is cut into bands of rows; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import RequestError

PROJECTION_CELLS = 32
"""Rows and columns of the latent whose decoding gives the previews their colours."""

ATTENTION_ROWS = 512
"""Query rows whose scores over all pixels of the smallest map exist at a time."""

# A band of this many numbers stays in a CPU's last-level cache, or keeps a GPU full.
_VALUES = {"cpu": 3 << 19, "cuda": 1 << 26}


@dataclass(frozen=True)
class Cut:
    """How many rows of a map go through the layers at a time.

    It is a function of the image's size, the kind of device and what was asked, never of free memory: the height of a
    band decides the last bits of a result, as the rounding of a convolution in float32 differs with the map's size.

    Attributes:
        values: numbers in the widest map of one band, where no tile is asked.
        tile_pixels: rows of the image in one band; a map at 1/s of its size goes in bands of ``tile_pixels / s`` rows,
            at least one.
    """

    values: int
    tile_pixels: int | None = None

    @classmethod
    def of(cls, device_kind: str, tile_pixels: int | None = None) -> Cut:
        """The cut for ``"cpu"`` or ``"cuda"``.

        Raises:
            RequestError: the tile is not positive.
        """
        if tile_pixels is not None and tile_pixels < 1:
            raise RequestError(
                f"vae_tile must be at least 1 row of pixels, got {tile_pixels}", hint="leave it out, or take 256"
            )
        return cls(_VALUES.get(device_kind, _VALUES["cuda"]), tile_pixels)

    def rows(self, width: int, channels: int, scale: int) -> int:
        """Rows of one band of a map [channels, any, width] at 1/scale of the image's size."""
        if self.tile_pixels is None:
            return max(1, self.values // (width * channels))
        return max(1, self.tile_pixels // scale)


def split_evenly(rows: int, tallest: int) -> list[int]:
    """Heights of the fewest bands of at most ``tallest`` rows; they differ by one at most, the taller ones first."""
    bands = -(-rows // tallest)
    small, larger = divmod(rows, bands)
    return [small + 1] * larger + [small] * (bands - larger)
