"""What this autoencoder takes, weights and activations, by walking the bands as `model` does; needs no torch.

Every tensor is counted, and the copies known to be made inside an operation; what a convolution of the library takes
for itself is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ...loaders.zimage.shapes import vae_shapes
from ..vae.config import stays_plain
from ..vae.cut import ATTENTION_ROWS, Cut
from ..vae.walk import Conv, Down, Meter, Residual, Split, Step, Up, walk, whole
from .config import KlConfig

FLOAT = 4
DOUBLE = 8


def decode_bytes(
    config: KlConfig, height: int, width: int, itemsize: int, cut: Cut, weight_format: str = "bf16"
) -> int:
    """Peak bytes of `KlVAE.decode` of one image, beside the weights; the result is included, the latents are not.

    Args:
        config: of the VAE.
        height: of the image, in pixels.
        width: of the image, in pixels.
        itemsize: bytes of a number in the compute dtype.
        cut: the bands, ``kl_cut("cuda", vae_tile)``.
        weight_format: of the convolutions; one at a time is made whole from rows of bytes.
    """
    made = _Walk(Meter(itemsize), cut)
    meter, scale, latent = made.meter, config.scale_factor, config.latent_channels
    high, wide, deep = height // scale, width // scale, config.block_out_channels[-1]
    meter.held += FLOAT * config.input_channels * height * width
    meter.need(3 * FLOAT * latent * high * wide, 2 * meter.map(latent, high, wide))
    whole(meter, Conv(meter, latent, deep, wide, normed=False), high)
    x = made.middle(deep, high, wide, scale)
    before, doubled = deep, False
    for level, channels in enumerate(reversed(config.block_out_channels)):
        if level:
            high, wide, scale = 2 * high, 2 * wide, scale // 2
            doubled = scale == 1
            x = x if doubled else made.double(x, before, high, wide, scale)
        for _ in range(config.layers_per_block + 1):
            block = made.large if scale == 1 else made.small
            x = block(x, before, channels, high, wide, scale, doubled)
            before, doubled = channels, False
    made.out(x, before, high, wide, config.input_channels)
    return meter.peak + _norm_bytes(config) + _dequantising_bytes(config, "decoder", itemsize, weight_format)


def encode_bytes(
    config: KlConfig, height: int, width: int, itemsize: int, cut: Cut, weight_format: str = "bf16"
) -> int:
    """Peak bytes of `KlVAE.encode` of one image, beside the weights and the pixels handed over.

    Args:
        config: of the VAE.
        height: of the image, in pixels.
        width: of the image, in pixels.
        itemsize: bytes of a number in the compute dtype.
        cut: the bands, ``kl_cut("cuda", vae_tile)``.
        weight_format: of the convolutions; one at a time is made whole from rows of bytes.
    """
    made = _Walk(Meter(itemsize), cut)
    meter, scale, latent = made.meter, 1, config.latent_channels
    before = config.block_out_channels[0]
    pixels = meter.map(config.input_channels, height, width)
    meter.need(2 * pixels)
    meter.held += pixels
    x = meter.map(before, height, width)
    meter.held += x
    first = Conv(meter, config.input_channels, before, width, normed=False)
    made.pass_over([Split(cut, before, width, 1), first], height)
    for level, channels in enumerate(config.block_out_channels):
        for _ in range(config.layers_per_block):
            block = made.large if scale == 1 else made.small
            x = block(x, before, channels, height, width, scale, False)
            before = channels
        if level < len(config.block_out_channels) - 1:
            x = made.halve(x, channels, height, width, scale)
            height, width, scale = height // 2, width // 2, 2 * scale
    meter.held -= x
    x = made.middle(before, height, width, scale)
    whole(meter, Conv(meter, before, latent, width, normed=True), height)
    meter.need(3 * FLOAT * latent * height * width)
    return meter.peak + _norm_bytes(config) + _dequantising_bytes(config, "encoder", itemsize, weight_format)


def weight_bytes(config: KlConfig, part: str, itemsize: int, weight_format: str = "bf16") -> int:
    """Bytes of the weights of the ``"encoder"`` or the ``"decoder"`` once loaded.

    Args:
        config: of the VAE.
        part: which half.
        itemsize: bytes of a number in the compute dtype.
        weight_format: of the convolutions.
    """
    total = 0
    for name, shape in _shapes(config).items():
        if not name.startswith(part) or not name.endswith(".weight"):
            continue
        rows = config.latent_channels if name == "encoder.conv_out.weight" else shape[0]
        if len(shape) == 1:
            total += 2 * FLOAT * rows
            continue
        columns, rows = _folded(name, rows, shape)
        plain = weight_format == "bf16" or len(shape) == 2 or stays_plain(name.removesuffix(".weight"))
        total += rows * (columns * itemsize if plain else columns + FLOAT) + rows * itemsize
    return total


class _Walk:
    """The passes of `model.KlVAE` over sizes; every method takes the bytes of the input map, which are held."""

    def __init__(self, meter: Meter, cut: Cut) -> None:
        self.meter, self.cut = meter, cut

    def pass_over(self, chain: Sequence[Step | Split], rows: int) -> None:
        """One chain over a stored map; what it leaves held is its last band, which is then let go."""
        held = self.meter.held
        walk(self.meter, chain, rows, True, 0)
        self.meter.hand_over(0)
        self.meter.held = held

    def measure(self, channels: int, rows: int, width: int) -> None:
        """The statistics of a band: in float32 where it is not, and two numbers per row and channel in float64."""
        copy = FLOAT * channels * rows * width if self.meter.itemsize < FLOAT else 0
        self.meter.need(copy, 6 * DOUBLE * channels * (rows + 1))

    def small(self, x: int, before: int, channels: int, height: int, width: int, scale: int, _: bool = False) -> int:
        """See `KlVAE._small`; the result's bytes are held in place of the input's."""
        meter, widest = self.meter, max(before, channels)
        split, inner = Split(self.cut, widest, width, scale), meter.map(channels, height, width)
        tallest = split.bands(height)[0]
        self.measure(before, tallest, width)
        meter.held += inner
        self.pass_over([split, Conv(meter, before, channels, width, normed=True)], height)
        self.measure(channels, tallest, width)
        skip = meter.map(channels, tallest + 2, width) if before != channels else 0
        meter.held += skip
        self.pass_over([split, Conv(meter, channels, channels, width, normed=True)], height)
        meter.held -= x + skip
        return inner

    def large(
        self, x: int, before: int, channels: int, height: int, width: int, scale: int, doubled: bool = False
    ) -> int:
        """See `KlVAE._large`; ``before`` channels come in, by way of a doubling if ``doubled``."""
        meter, fine = self.meter, Split(self.cut, (2 if doubled else 1) * max(before, channels), width, scale)
        if doubled:
            fine = Split(self.cut, 2 * before, width, scale)
        tallest, rows = fine.bands(height)[0], height // 2 if doubled else height

        def source() -> list[Step | Split]:
            coarse = Split(self.cut, 2 * before, width // 2, 2)
            return [coarse, Up(meter, before, before, width // 2), fine] if doubled else [fine]

        if doubled:
            self.pass_over(source()[:2], rows)
        self.measure(before, tallest, width)
        self.pass_over([*source(), Conv(meter, before, channels, width, normed=True)], rows)
        fresh = doubled or before != channels
        result = meter.map(channels, height, width) if fresh else x
        meter.held += result if fresh else 0
        self.pass_over([*source(), Residual(meter, before, channels, width)], rows)
        meter.held -= x if fresh else 0
        return result

    def double(self, x: int, channels: int, height: int, width: int, scale: int) -> int:
        """See `KlVAE._double`; height, width and scale are the result's."""
        made = self.meter.map(channels, height, width)
        self.meter.held += made
        split = Split(self.cut, 2 * channels, width // 2, scale)
        self.pass_over([split, Up(self.meter, channels, channels, width // 2)], height // 2)
        self.meter.held -= x
        return made

    def halve(self, x: int, channels: int, height: int, width: int, scale: int) -> int:
        """The map of half the size; height, width and scale are the input's."""
        made = self.meter.map(channels, height // 2, width // 2)
        self.meter.held += made
        self.pass_over([Split(self.cut, channels, width, scale), Down(self.meter, channels, width)], height)
        self.meter.held -= x
        return made

    def middle(self, channels: int, height: int, width: int, scale: int) -> int:
        """See `KlVAE._middle`; its input is not held before, its result is after."""
        meter, tokens = self.meter, height * width
        x = meter.map(channels, height, width)
        meter.held += x
        x = self.small(x, channels, channels, height, width, scale)
        self.measure(channels, height, width)
        meter.need(x, 0 if meter.itemsize == FLOAT else FLOAT * channels * tokens)
        exact = 3 * FLOAT * channels * tokens if meter.itemsize < FLOAT else 0
        rows = min(ATTENTION_ROWS, tokens)
        chunk = FLOAT * rows * (tokens + 2) + (FLOAT + FLOAT + 2 * meter.itemsize) * rows * channels
        meter.need(4 * x)
        meter.need(3 * x, exact, chunk)
        return self.small(x, channels, channels, height, width, scale)

    def out(self, x: int, channels: int, height: int, width: int, outputs: int) -> None:
        """The last norm and convolution; the input is let go."""
        split = Split(self.cut, channels, width, 1)
        self.measure(channels, split.bands(height)[0], width)
        self.pass_over([split, Conv(self.meter, channels, outputs, width, normed=True)], height)
        self.meter.held -= x


def _shapes(config: KlConfig) -> Mapping[str, tuple[int, ...]]:
    raw: dict[str, Any] = {
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
    }
    return vae_shapes(raw)


def _folded(name: str, rows: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """(numbers per row, rows) of a matrix as it is kept: a doubling convolution has 4 times the rows and 2x2 taps."""
    if ".upsamplers." in name:
        return shape[1] * 4, 4 * rows
    return prod(shape[1:]), rows


def _norm_bytes(config: KlConfig) -> int:
    """Gain and shift of the two norms of a residual block."""
    return 4 * FLOAT * max(config.block_out_channels)


def _dequantising_bytes(config: KlConfig, part: str, itemsize: int, weight_format: str) -> int:
    """A convolution's weight in the compute dtype and, while it is made, five float32 copies of it for the rotation."""
    if weight_format == "bf16":
        return 0
    sizes = [
        prod(_folded(name, shape[0], shape))
        for name, shape in _shapes(config).items()
        if name.startswith(part) and len(shape) == 4 and not stays_plain(name.removesuffix(".weight"))
    ]
    return max(sizes) * (itemsize + 5 * FLOAT)
