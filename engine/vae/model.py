"""The image VAE: pixels to normalised latents and back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import RequestError
from ..formats import check_format
from .bands import Conv3x3, Downsample, Join, ResidualRows, Split, Stage, Upsample, gather, run
from .config import Block, VaeConfig, expected_shapes
from .cut import PROJECTION_CELLS, Cut
from .layers import Attention, Conv, Norm, Reader, Residual

if TYPE_CHECKING:
    from ...loaders.source import Component

PARTS = ("encoder", "decoder")
Chain = list[Stage | Split]


@dataclass(frozen=True)
class Half:
    """The encoder or the decoder.

    ``quant`` is the 1x1 convolution at the latent's side: last in the encoder, first in the decoder.
    """

    quant: Conv
    conv_in: Conv
    blocks: tuple[tuple[Block, Residual | Conv], ...]
    middle: tuple[Residual, Attention, Residual]
    norm_out: Norm
    conv_out: Conv

    @classmethod
    def read(cls, reader: Reader, config: VaeConfig, name: str) -> Half:
        """Take the half ``name`` from a checkpoint."""
        encoding = name == "encoder"
        middle = f"{name}.mid_block"
        blocks = config.encoder_blocks() if encoding else config.decoder_blocks()
        return cls(
            # Of the encoder's output only the mean is used, never the variance behind it.
            quant=Conv.read(reader, "quant_conv", config.z_dim) if encoding else Conv.read(reader, "post_quant_conv"),
            conv_in=Conv.read(reader, f"{name}.conv_in"),
            blocks=tuple((block, _read_block(reader, block)) for block in blocks),
            middle=(
                Residual.read(reader, f"{middle}.resnets.0", shortcut=False),
                Attention.read(reader, f"{middle}.attentions.0"),
                Residual.read(reader, f"{middle}.resnets.1", shortcut=False),
            ),
            norm_out=Norm.read(reader, f"{name}.norm_out"),
            conv_out=Conv.read(reader, f"{name}.conv_out"),
        )

    def run_middle(self, x: Tensor) -> Tensor:
        """The middle on a whole map [B, C, h, w]: its attention sees every pixel."""
        first, attention, second = self.middle
        x = _whole(ResidualRows(first), x)
        x = attention.apply(x)
        return _whole(ResidualRows(second), x)

    def chain(self, cut: Cut, scale: int) -> Chain:
        """The blocks outside the middle as stages over bands, the first of them at 1/scale of the image's size."""
        stages: Chain = []
        for block, layer in self.blocks:
            if isinstance(layer, Residual):
                stages.append(ResidualRows(layer))
            elif block.kind == "up":
                scale //= 2
                stages += [Upsample(layer), Split(cut, 2 * block.out_dim, scale)]
            else:
                scale *= 2
                stages += [Downsample(layer), Join(cut, block.out_dim, scale)]
        return stages


def _read_block(reader: Reader, block: Block) -> Residual | Conv:
    if block.kind == "residual":
        return Residual.read(reader, block.name, shortcut=block.in_dim != block.out_dim)
    if block.kind == "up":
        return Conv.read_upsampling(reader, f"{block.name}.resample.1")
    return Conv.read(reader, f"{block.name}.resample.1")


def _whole(stage: Stage, x: Tensor) -> Tensor:
    (result,) = run([stage], x)
    return result


class ImageVAE:
    """The Qwen-Image autoencoder for single images, in two dimensions.

    Every causal 3-D convolution meets two frames of zeros before the only frame, so its last temporal tap as a 2-D
    convolution is exact, and the temporal resampling never runs. All norms are per pixel and only the middle's
    attention is global; the rest runs over bands of rows (`bands`), so that beside the smallest maps and the result the
    peak memory grows with the width of the image only.

    Source: semantics of huggingface/diffusers@v0.42.1:src/diffusers/models/autoencoders/autoencoder_kl_qwenimage.py;
    differs in being 2-D, streaming rows, folding doubling into the convolution behind it, and normalising latents.
    """

    def __init__(self, config: VaeConfig, halves: dict[str, Half], cut: Cut, reader: Reader) -> None:
        device = reader.device
        self.config = config
        self.device = device
        self.dtype = reader.dtype
        self.weight_format = reader.weight_format
        self.cut = cut
        self._halves = halves
        shape = (1, config.z_dim, 1, 1)
        self._mean = torch.tensor(config.latents_mean, device=device).view(shape)
        self._std = torch.tensor(config.latents_std, device=device).view(shape)
        self._projection: Tensor | None = None

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
    ) -> ImageVAE:
        """Check the whole checkpoint and read the asked parts of it.

        Args:
            component: config and checkpoint with diffusers' tensor names and (3-D) shapes.
            device: where the weights and the computation live.
            dtype: float32 or bfloat16; norms and the latents' scale are float32 in both.
            parts: any of ``"encoder"`` and ``"decoder"``.
            vae_tile: rows of the image that go through the layers at a time (`Cut`); fewer take less memory and more
                time. None: fixed by the image's size. The result is the same within float32 rounding.
            weight_format: ``"bf16"`` keeps weights in the compute dtype; ``"int8"`` and ``"fp8"`` keep one byte per
                weight of every convolution but the outermost and make the compute dtype at each use.

        Raises:
            CheckpointError: the config does not fit, or a tensor is missing, unexpected or of another shape.
            RequestError: an argument is not one of those above.
        """
        if not parts or not set(parts) <= set(PARTS):
            raise RequestError(f"VAE parts must be some of {', '.join(PARTS)}, got {sorted(parts)}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise RequestError(f"VAE dtype must be float32 or bfloat16, got {dtype}")
        cut = Cut.of(torch.device(device).type, vae_tile)
        config = VaeConfig.parse(component.config)
        component.checkpoint.require(expected_shapes(config), f"VAE {component.name}")
        reader = Reader(component.checkpoint, torch.device(device), dtype, check_format(weight_format))
        halves = {name: Half.read(reader, config, name) for name in PARTS if name in parts}
        return cls(config, halves, cut, reader)

    @property
    def scale_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return self.config.scale_factor

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.config.z_dim

    @property
    def parts(self) -> tuple[str, ...]:
        """The loaded parts."""
        return tuple(self._halves)

    def release(self, part: str) -> None:
        """Give up the weights of ``"encoder"`` or ``"decoder"``; using that part then is an error."""
        self._half(part)
        del self._halves[part]

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The latents' mode, ``(mean - latents_mean) / latents_std``.

        Args:
            pixels: [B, 3, H, W] in [-1, 1]; H and W multiples of `scale_factor`.

        Returns:
            float32 [B, z, 1, H / scale_factor, W / scale_factor].

        Raises:
            RequestError: wrong shape, or the encoder is not loaded.
        """
        half = self._half("encoder")
        _check_shape("pixels", pixels, (None, self.config.input_channels, None, None))
        height, width = pixels.shape[-2:]
        if not height or not width or height % self.scale_factor or width % self.scale_factor:
            raise RequestError(
                f"pixels must be a multiple of {self.scale_factor} wide and high, got {width}x{height}",
                hint=f"resize to {_near(width, self.scale_factor)}x{_near(height, self.scale_factor)}",
            )
        return torch.cat([self._encode(half, self._place(image)) for image in pixels.split(1)]).unsqueeze(2)

    def _encode(self, half: Half, x: Tensor) -> Tensor:
        x = half.run_middle(self._shrink(half, x))
        x = half.quant.pointwise(_whole(Conv3x3(half.conv_out, half.norm_out), x))
        return x.float().sub_(self._mean).div_(self._std).contiguous()

    def _shrink(self, half: Half, x: Tensor) -> Tensor:
        height, width = (size // self.scale_factor for size in x.shape[-2:])
        stages: Chain = [Split(self.cut, self.config.base_dim, 1), Conv3x3(half.conv_in), *half.chain(self.cut, 1)]
        bands = run(stages, x)
        shape = (1, self.config.dims[-1], height, width)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        return gather(bands, out)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The pixels of normalised latents.

        Args:
            latents: [B, z, 1, h, w].

        Returns:
            float32 [B, 3, h * scale_factor, w * scale_factor], clamped to [-1, 1].

        Raises:
            RequestError: wrong shape, or the decoder is not loaded.
        """
        half = self._half("decoder")
        _check_shape("latents", latents, (None, self.latent_channels, 1, None, None))
        batch, _, _, height, width = latents.shape
        size = (height * self.scale_factor, width * self.scale_factor)
        out = torch.empty((batch, self.config.input_channels, *size), device=self.device)
        for image, pixels in zip(latents.squeeze(2).split(1), out.split(1), strict=True):
            gather(self._decode(half, image), pixels)
        return out.clamp_(-1, 1)

    def _decode(self, half: Half, latents: Tensor) -> Iterator[Tensor]:
        x = self._place(latents.to(self.device, torch.float32) * self._std + self._mean)
        x = half.run_middle(_whole(Conv3x3(half.conv_in), half.quant.pointwise(x)))
        stages: Chain = [Split(self.cut, x.shape[1], self.scale_factor), *half.chain(self.cut, self.scale_factor)]
        stages.append(Conv3x3(half.conv_out, half.norm_out))
        return run(stages, x)

    def rgb_projection(self) -> Tensor:
        """An affine map [z + 1, 3] from a normalised latent cell (and a last 1) to the RGB of its pixels, for previews.

        Fitted by least squares, once, to the decoded cells of a fixed random latent.
        """
        if self._projection is None:
            half = PROJECTION_CELLS // 2
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(1, self.latent_channels, half, half, generator=generator)
            # Patches of 2x2 equal cells: a cell of a picture resembles its neighbours, one of white noise does not.
            latents = noise.repeat_interleave(2, 2).repeat_interleave(2, 3)
            pixels = self.decode(latents.unsqueeze(2))[:, :3].cpu()
            cells = torch.nn.functional.avg_pool2d(pixels, self.scale_factor)
            inputs = latents.flatten(2)[0].T.double()
            inputs = torch.cat((inputs, inputs.new_ones(len(inputs), 1)), 1)
            projection: Tensor = torch.linalg.lstsq(inputs, cells.flatten(2)[0].T.double()).solution
            self._projection = projection.float()
        return self._projection

    def _half(self, part: str) -> Half:
        if part not in self._halves:
            loaded = ", ".join(self._halves) or "nothing"
            raise RequestError(f"VAE {part} must be loaded, got {loaded}", hint=f'name "{part}" in parts when loading')
        return self._halves[part]

    def _place(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)


def _near(size: int, multiple: int) -> int:
    return max(1, round(size / multiple)) * multiple


def _check_shape(name: str, tensor: Tensor, expected: Sequence[int | None]) -> None:
    fits = tensor.ndim == len(expected) and all(
        want is None or want == size for want, size in zip(expected, tensor.shape, strict=True)
    )
    if not fits or not tensor.numel():
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise RequestError(f"{name} must be of shape [{wanted}], got {list(tensor.shape)}")
