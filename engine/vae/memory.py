"""What the image VAE takes, weights and activations, by walking the bands as `bands` does; needs no torch.

Every tensor is counted, and the copies known to be made inside an operation; what a convolution of the library takes
for itself is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from .config import VaeConfig, expected_shapes, stays_plain
from .cut import ATTENTION_ROWS, Cut
from .walk import Conv, Down, Join, Meter, Residual, Split, Step, Up, walk, whole

FLOAT = 4


def decode_bytes(
    config: VaeConfig, height: int, width: int, itemsize: int, cut: Cut, weight_format: str = "bf16"
) -> int:
    """Peak bytes of `ImageVAE.decode` of one image, beside the weights; the result is included, the latents are not.

    Args:
        config: of the VAE.
        height: of the image, in pixels.
        width: of the image, in pixels.
        itemsize: bytes of a number in the compute dtype.
        cut: the bands, ``Cut.of("cuda", vae_tile)``.
        weight_format: of the convolutions; one at a time is made whole from rows of bytes.
    """
    meter = Meter(itemsize)
    scale, deep, latent = config.scale_factor, config.dims[-1], config.z_dim
    high, wide = height // scale, width // scale
    meter.held += FLOAT * config.input_channels * height * width
    meter.need(3 * FLOAT * latent * high * wide, 2 * meter.map(latent, high, wide))
    meter.held += meter.map(latent, high, wide)
    whole(meter, Conv(meter, latent, deep, wide, normed=False), high)
    _middle(meter, deep, high, wide)
    chain: list[Step | Split] = [Split(cut, deep, wide, scale)]
    for block in config.decoder_blocks():
        if block.kind == "residual":
            chain.append(Residual(meter, block.in_dim, block.out_dim, wide))
            continue
        chain.append(Up(meter, block.in_dim, block.out_dim, wide))
        wide, scale = 2 * wide, scale // 2
        chain.append(Split(cut, 2 * block.out_dim, wide, scale))
    chain.append(Conv(meter, config.dims[1], config.input_channels, wide, normed=True))
    walk(meter, chain, high, True, meter.map(deep, high, width // config.scale_factor))
    return meter.peak + _dequantising_bytes(config, "decoder", itemsize, weight_format)


def encode_bytes(
    config: VaeConfig, height: int, width: int, itemsize: int, cut: Cut, weight_format: str = "bf16"
) -> int:
    """Peak bytes of `ImageVAE.encode` of one image, beside the weights and the pixels handed over.

    Args:
        config: of the VAE.
        height: of the image, in pixels.
        width: of the image, in pixels.
        itemsize: bytes of a number in the compute dtype.
        cut: the bands, ``Cut.of("cuda", vae_tile)``.
        weight_format: of the convolutions; one at a time is made whole from rows of bytes.
    """
    meter = Meter(itemsize)
    wide, scale, deep, latent = width, 1, config.dims[-1], config.z_dim
    pixels = meter.map(config.input_channels, height, width)
    meter.need(2 * pixels)
    chain: list[Step | Split] = [
        Split(cut, config.base_dim, wide, scale),
        Conv(meter, config.input_channels, config.base_dim, wide, normed=False),
    ]
    for block in config.encoder_blocks():
        if block.kind == "residual":
            chain.append(Residual(meter, block.in_dim, block.out_dim, wide))
            continue
        chain.append(Down(meter, block.out_dim, wide))
        wide, scale = wide // 2, 2 * scale
        chain.append(Join(meter, cut, block.out_dim, wide, scale))
    high = height // scale
    meter.held += meter.map(deep, high, wide)
    walk(meter, chain, height, True, pixels)
    meter.held = pixels
    _middle(meter, deep, high, wide)
    whole(meter, Conv(meter, deep, 2 * latent, wide, normed=True), high)
    meter.need(meter.map(deep + 3 * latent, high, wide), 3 * FLOAT * latent * high * wide)
    return meter.peak + _dequantising_bytes(config, "encoder", itemsize, weight_format)


def weight_bytes(config: VaeConfig, part: str, itemsize: int, weight_format: str = "bf16") -> int:
    """Bytes of the weights of the ``"encoder"`` or the ``"decoder"`` once loaded.

    Args:
        config: of the VAE.
        part: which half.
        itemsize: bytes of a number in the compute dtype.
        weight_format: of the convolutions.
    """
    total = 0
    for name, outputs, columns in _convs(config, part):
        plain = weight_format == "bf16" or stays_plain(name)
        total += outputs * (columns * itemsize if plain else columns + FLOAT) + outputs * itemsize
    shapes = expected_shapes(config)
    return total + sum(FLOAT * prod(shapes[name]) for name in shapes if name.startswith(part) and "gamma" in name)


def _convs(config: VaeConfig, part: str) -> Iterator[tuple[str, int, int]]:
    """(name, output channels, numbers per output channel) of every convolution of a half, as it is kept."""
    quant = "quant_conv." if part == "encoder" else "post_quant_conv."
    for name, shape in expected_shapes(config).items():
        if not name.startswith((part, quant)) or not name.endswith(".weight") or "time_conv" in name:
            continue
        conv = name.removesuffix(".weight")
        outputs, inputs, *kernel = shape
        taps = prod(kernel[-2:])
        if ".upsamplers." in name:
            outputs, taps = 4 * outputs, 4
        yield conv, config.z_dim if conv == "quant_conv" else outputs, inputs * taps


def _dequantising_bytes(config: VaeConfig, part: str, itemsize: int, weight_format: str) -> int:
    """A convolution's weight in the compute dtype and, while it is made, five float32 copies of it for the rotation."""
    if weight_format == "bf16":
        return 0
    sizes = [outputs * columns for name, outputs, columns in _convs(config, part) if not stays_plain(name)]
    return max(sizes) * (itemsize + 5 * FLOAT)


def _middle(meter: Meter, channels: int, height: int, width: int) -> None:
    residual = Residual(meter, channels, channels, width)
    whole(meter, residual, height)
    x, tokens = meter.map(channels, height, width), height * width
    meter.need(2 * x, meter.normalising(channels, height, width))
    exact = 3 * FLOAT * channels * tokens if meter.itemsize < FLOAT else 0
    rows = min(ATTENTION_ROWS, tokens)
    chunk = FLOAT * rows * (tokens + 2) + (FLOAT + FLOAT + 2 * meter.itemsize) * rows * channels
    meter.need(5 * x)
    meter.need(4 * x, exact, chunk)
    whole(meter, residual, height)
