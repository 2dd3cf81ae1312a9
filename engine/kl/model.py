"""The flux-type autoencoder over bands of rows: pixels to normalised latents and back."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ...errors import RequestError
from ...loaders.zimage.shapes import vae_shapes
from ..formats import check_format
from ..vae.bands import Conv3x3, Downsample, ResidualRows, Split, Stage, Upsample, gather, run
from ..vae.cut import Cut
from ..vae.layers import Conv, Reader
from ..vae.model import PARTS, ImageVAE
from .config import KlConfig
from .cut import kl_cut
from .layers import GroupNorm, MiddleAttention, Residual

if TYPE_CHECKING:
    from ...loaders.component import Component

Chain = list[Stage | Split]


@dataclass(frozen=True)
class Level:
    """The residual blocks of one size, and the convolution to the next size (None at the last)."""

    blocks: tuple[Residual, ...]
    between: Conv | None


@dataclass(frozen=True)
class KlHalf:
    """The encoder or the decoder."""

    conv_in: Conv
    levels: tuple[Level, ...]
    middle: tuple[Residual, MiddleAttention, Residual]
    norm_out: GroupNorm
    conv_out: Conv

    @classmethod
    def read(cls, reader: Reader, config: KlConfig, name: str) -> KlHalf:
        """Take the half ``name`` from a checkpoint."""
        groups, middle = config.norm_num_groups, f"{name}.mid_block"
        # Of the encoder's output only the mean is used, never the variance behind it.
        outputs = config.latent_channels if name == "encoder" else None
        return cls(
            conv_in=Conv.read(reader, f"{name}.conv_in"),
            levels=_read_levels(reader, config, encoding=name == "encoder"),
            middle=(
                Residual.read(reader, f"{middle}.resnets.0", groups),
                MiddleAttention.read(reader, f"{middle}.attentions.0", groups),
                Residual.read(reader, f"{middle}.resnets.1", groups),
            ),
            norm_out=GroupNorm.read(reader, f"{name}.conv_norm_out", groups),
            conv_out=Conv.read(reader, f"{name}.conv_out", outputs),
        )


def _read_levels(reader: Reader, config: KlConfig, *, encoding: bool) -> tuple[Level, ...]:
    widths = config.block_out_channels if encoding else config.block_out_channels[::-1]
    layers = config.layers_per_block + (not encoding)
    levels, before = [], widths[0]
    for index, width in enumerate(widths):
        root = f"encoder.down_blocks.{index}" if encoding else f"decoder.up_blocks.{index}"
        blocks = []
        for layer in range(layers):
            name = f"{root}.resnets.{layer}"
            blocks.append(Residual.read(reader, name, config.norm_num_groups, shortcut=before != width))
            before = width
        between = None
        if index < len(widths) - 1:
            resample = f"{root}.{'down' if encoding else 'up'}samplers.0.conv"
            between = Conv.read(reader, resample) if encoding else Conv.read_upsampling(reader, resample)
        levels.append(Level(tuple(blocks), between))
    return tuple(levels)


class KlVAE(ImageVAE):
    """The flux-type AutoencoderKL with the interface of :class:`ImageVAE`.

    A group norm needs the statistics of the whole map before its first row, so the bands of `engine.vae` cannot run
    through all layers at once: each residual block is a pass that measures, and a pass that computes. Below the size of
    the picture a block holds its input and one map of its output's size. At the size of the picture it holds only the
    map that it reads and overwrites: what its first convolution gives is computed twice, once to be measured. The
    doubled map that enters that size, twice as wide, is not stored either but made anew from the smaller one in each of
    the three passes. So two maps of the picture's size never exist at once.

    Source: semantics of huggingface/diffusers@v0.42.1:src/diffusers/models/autoencoders/autoencoder_kl.py; differs in
    running over bands, folding doubling into the convolution behind it, encoding to the posterior's mode and
    normalising latents.
    """

    def __init__(self, config: KlConfig, halves: dict[str, KlHalf], cut: Cut, reader: Reader) -> None:
        super().__init__(cast(Any, config), cast(Any, halves), cut, reader)

    @classmethod
    def load(
        cls,
        component: Component,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        parts: Collection[str] = PARTS,
        vae_tile: int | None = None,
        weight_format: str = "bf16",
    ) -> KlVAE:
        """Check the whole checkpoint and read the asked parts of it.

        Args:
            component: config and checkpoint with diffusers' tensor names.
            device: where the weights and the computation live.
            dtype: float32 or bfloat16; norms and the latents' scale are float32 in both.
            parts: any of ``"encoder"`` and ``"decoder"``.
            vae_tile: rows of the image that go through the layers at a time (`Cut`); the result is the same within
                float32 rounding. None: fixed by the image's size.
            weight_format: ``"bf16"`` keeps weights in the compute dtype; ``"int8"`` and ``"fp8"`` keep one byte per
                weight of every convolution but the outermost.

        Raises:
            CheckpointError: the config does not fit, or a tensor is missing, unexpected or of another shape.
            RequestError: an argument is not one of those above.
        """
        if not parts or not set(parts) <= set(PARTS):
            raise RequestError(f"VAE parts must be some of {', '.join(PARTS)}, got {sorted(parts)}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise RequestError(f"VAE dtype must be float32 or bfloat16, got {dtype}")
        cut = kl_cut(torch.device(device).type, vae_tile)
        config = KlConfig.parse(component.config)
        component.checkpoint.require(vae_shapes(component.config), f"VAE {component.name}")
        reader = Reader(component.checkpoint, torch.device(device), dtype, check_format(weight_format))
        halves = {name: KlHalf.read(reader, config, name) for name in PARTS if name in parts}
        return cls(config, halves, cut, reader)

    def _encode(self, half: Any, x: Tensor) -> Tensor:
        pixels, scale = x, 1
        x = _empty(pixels, half.conv_in.outputs, *pixels.shape[2:])
        gather(run([Split(self.cut, x.shape[1], 1), Conv3x3(half.conv_in)], pixels), x)
        for level in half.levels:
            for block in level.blocks:
                x = self._large(block, x) if scale == 1 else self._small(block, x, scale)
            if level.between is not None:
                x, scale = self._halve(level.between, x, scale), 2 * scale
        x = self._middle(half, x, scale)
        norm = half.norm_out.measured([x])
        (x,) = run([Conv3x3(half.conv_out, norm)], x)
        return x.float().sub_(self._mean).div_(self._std).contiguous()

    def _decode(self, half: Any, latents: Tensor) -> Any:
        scale = self.scale_factor
        x = self._place(latents.to(self.device, torch.float32) * self._std + self._mean)
        (x,) = run([Conv3x3(half.conv_in)], x)
        x, doubling = self._middle(half, x, scale), None
        for level in half.levels:
            if doubling is not None:
                scale //= 2
            if doubling is not None and scale > 1:
                x, doubling = self._double(doubling, x, scale), None
            for block in level.blocks:
                x = self._small(block, x, scale) if scale > 1 else self._large(block, x, doubling)
                doubling = None
            doubling = level.between
        split = Split(self.cut, x.shape[1], 1)
        norm = half.norm_out.measured(split.bands(x))
        return run([split, Conv3x3(half.conv_out, norm)], x)

    def _middle(self, half: KlHalf, x: Tensor, scale: int) -> Tensor:
        first, attention, second = half.middle
        return self._small(second, attention.apply(self._small(first, x, scale)), scale)

    def _halve(self, conv: Conv, x: Tensor, scale: int) -> Tensor:
        """The halved map of ``x``; ``scale`` is that of ``x``."""
        made = _empty(x, conv.outputs, x.shape[2] // 2, x.shape[3] // 2)
        return gather(run([Split(self.cut, x.shape[1], scale), Downsample(conv)], x), made)

    def _double(self, conv: Conv, x: Tensor, scale: int) -> Tensor:
        """The doubled map of ``x``; ``scale`` is that of the result."""
        made = _empty(x, conv.outputs // 4, 2 * x.shape[2], 2 * x.shape[3])
        return gather(run([Split(self.cut, 2 * made.shape[1], scale), Upsample(conv)], x), made)

    def _small(self, block: Residual, x: Tensor, scale: int) -> Tensor:
        """A residual block that holds its input and one map beside it, which becomes the result."""
        split = Split(self.cut, max(x.shape[1], block.conv1.outputs), scale)
        inner = _empty(x, block.conv1.outputs, *x.shape[2:])
        gather(run([split, Conv3x3(block.conv1, block.norm1.measured(split.bands(x)))], x), inner)
        second = Conv3x3(block.conv2, block.norm2.measured(split.bands(inner)))
        row = 0
        # A convolution lags behind the rows it has read and copied, so what it gives may take their place.
        for band in run([split, second], inner):
            rows = slice(row, row + band.shape[2])
            skip = x[:, :, rows]
            inner[:, :, rows] = band.add_(skip if block.shortcut is None else block.shortcut.pointwise(skip))
            row = rows.stop
        return inner

    def _large(self, block: Residual, x: Tensor, doubling: Conv | None = None) -> Tensor:
        """A residual block at the picture's size that holds one map of it: ``x``, overwritten, or the result."""
        source = self._source(block, x, doubling)
        norm1 = block.norm1.measured(run(source(), x))
        norm2 = block.norm2.measured(run([*source(), Conv3x3(block.conv1, norm1)], x))
        stage = ResidualRows(block.frozen(norm1, norm2))
        times = 1 if doubling is None else 2
        made = x
        if doubling is not None or block.shortcut is not None:
            made = _empty(x, block.conv1.outputs, times * x.shape[2], times * x.shape[3])
        return gather(run([*source(), stage], x), made)

    def _source(self, block: Residual, x: Tensor, doubling: Conv | None) -> Callable[[], Chain]:
        """A maker of the chain that gives a block's input in bands; stages serve one pass."""
        if doubling is None:
            split = Split(self.cut, max(x.shape[1], block.conv1.outputs), 1)
            return lambda: [split]
        width = doubling.outputs // 4
        coarse, fine = Split(self.cut, 2 * width, 2), Split(self.cut, 2 * width, 1)
        return lambda: [coarse, Upsample(doubling), fine]


def _empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (like.shape[0], channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
