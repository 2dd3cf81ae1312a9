"""What a checkpoint of the image VAE must hold: its config, and the name and shape of every tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]


class Block(NamedTuple):
    """One entry of the encoder's or decoder's chain of blocks.

    ``kind`` is ``"residual"``, ``"down"`` or ``"up"``; ``has_time_conv`` says whether the file also holds a temporal
    convolution there, which a single frame never passes through.
    """

    kind: str
    name: str
    in_dim: int
    out_dim: int
    has_time_conv: bool = False


@dataclass(frozen=True)
class VaeConfig:
    """The sizes of one image VAE, from the ``config.json`` that diffusers writes."""

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temperal_downsample: tuple[bool, ...]
    input_channels: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> VaeConfig:
        """Read a diffusers config.

        Raises:
            CheckpointError: an entry is missing, of the wrong kind, or asks for what this VAE does not have.
        """
        if config.get("attn_scales"):
            raise CheckpointError(f"VAE config attn_scales must be empty, got {config['attn_scales']!r}")
        parsed = cls(
            base_dim=_whole(config, "base_dim"),
            z_dim=_whole(config, "z_dim"),
            dim_mult=tuple(_list(config, "dim_mult", int)),
            num_res_blocks=_whole(config, "num_res_blocks"),
            temperal_downsample=tuple(_list(config, "temperal_downsample", bool)),
            input_channels=_whole({"input_channels": 3, **config}, "input_channels"),
            latents_mean=tuple(float(value) for value in _list(config, "latents_mean", int, float)),
            latents_std=tuple(float(value) for value in _list(config, "latents_std", int, float)),
        )
        parsed._check()
        return parsed

    def _check(self) -> None:
        if not self.dim_mult or min(self.dim_mult) < 1:
            raise CheckpointError(f"VAE config dim_mult must be a list of positive numbers, got {list(self.dim_mult)}")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise CheckpointError(
                f"VAE config temperal_downsample must be {len(self.dim_mult) - 1} long, one less than dim_mult, "
                f"got {len(self.temperal_downsample)}"
            )
        if any(width % 2 for width in self.dims[1:]):
            raise CheckpointError(f"VAE channel counts must be even, got {list(self.dims)}")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise CheckpointError(
                    f"VAE config {name} must be z_dim = {self.z_dim} numbers long, got {len(getattr(self, name))}"
                )
        if min(self.latents_std) <= 0:
            raise CheckpointError(f"VAE config latents_std must be positive, got {min(self.latents_std)}")

    @property
    def dims(self) -> tuple[int, ...]:
        """Channel counts of the levels, from the pixels inwards."""
        return tuple(self.base_dim * factor for factor in (1, *self.dim_mult))

    @property
    def scale_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** len(self.temperal_downsample)

    def encoder_blocks(self) -> Iterator[Block]:
        """The encoder's chain before its middle, in order of execution."""
        index = 0
        for level, (in_dim, out_dim) in enumerate(zip(self.dims[:-1], self.dims[1:], strict=True)):
            for repeat in range(self.num_res_blocks):
                source = out_dim if repeat else in_dim
                yield Block("residual", f"encoder.down_blocks.{index}", source, out_dim)
                index += 1
            if level < len(self.temperal_downsample):
                timed = self.temperal_downsample[level]
                yield Block("down", f"encoder.down_blocks.{index}", out_dim, out_dim, timed)
                index += 1

    def decoder_blocks(self) -> Iterator[Block]:
        """The decoder's chain behind its middle, in order of execution."""
        dims = (self.dims[-1], *self.dims[:0:-1])
        for level, (in_dim, out_dim) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
            source = in_dim // 2 if level else in_dim
            for repeat in range(self.num_res_blocks + 1):
                yield Block("residual", f"decoder.up_blocks.{level}.resnets.{repeat}", source, out_dim)
                source = out_dim
            if level < len(self.temperal_downsample):
                timed = self.temperal_downsample[::-1][level]
                yield Block("up", f"decoder.up_blocks.{level}.upsamplers.0", out_dim, out_dim // 2, timed)


def stays_plain(conv: str) -> bool:
    """Whether the convolution is never quantised: those at the picture and at the latent are few bytes."""
    return conv.endswith(("conv_in", "conv_out", "quant_conv"))


def expected_shapes(config: VaeConfig) -> Shapes:
    """Name and shape of every tensor of the checkpoint, the temporal ones included."""
    shapes: Shapes = {}
    width, pixels, latent = config.dims[-1], config.input_channels, config.z_dim
    _conv(shapes, "encoder.conv_in", pixels, config.base_dim, 3, 3, 3)
    for block in config.encoder_blocks():
        _block(shapes, block)
    _middle(shapes, "encoder", width)
    shapes["encoder.norm_out.gamma"] = (width, 1, 1, 1)
    _conv(shapes, "encoder.conv_out", width, 2 * latent, 3, 3, 3)
    _conv(shapes, "quant_conv", 2 * latent, 2 * latent, 1, 1, 1)
    _conv(shapes, "post_quant_conv", latent, latent, 1, 1, 1)
    _conv(shapes, "decoder.conv_in", latent, width, 3, 3, 3)
    _middle(shapes, "decoder", width)
    for block in config.decoder_blocks():
        _block(shapes, block)
    shapes["decoder.norm_out.gamma"] = (config.dims[1], 1, 1, 1)
    _conv(shapes, "decoder.conv_out", config.dims[1], pixels, 3, 3, 3)
    return shapes


def _conv(shapes: Shapes, name: str, in_dim: int, out_dim: int, *kernel: int) -> None:
    shapes[f"{name}.weight"] = (out_dim, in_dim, *kernel)
    shapes[f"{name}.bias"] = (out_dim,)


def _block(shapes: Shapes, block: Block) -> None:
    if block.kind == "residual":
        _residual(shapes, block.name, block.in_dim, block.out_dim)
        return
    _conv(shapes, f"{block.name}.resample.1", block.in_dim, block.out_dim, 3, 3)
    if block.has_time_conv:
        frames = 2 * block.in_dim if block.kind == "up" else block.in_dim
        _conv(shapes, f"{block.name}.time_conv", block.in_dim, frames, 3, 1, 1)


def _residual(shapes: Shapes, name: str, in_dim: int, out_dim: int) -> None:
    shapes[f"{name}.norm1.gamma"] = (in_dim, 1, 1, 1)
    _conv(shapes, f"{name}.conv1", in_dim, out_dim, 3, 3, 3)
    shapes[f"{name}.norm2.gamma"] = (out_dim, 1, 1, 1)
    _conv(shapes, f"{name}.conv2", out_dim, out_dim, 3, 3, 3)
    if in_dim != out_dim:
        _conv(shapes, f"{name}.conv_shortcut", in_dim, out_dim, 1, 1, 1)


def _middle(shapes: Shapes, half: str, width: int) -> None:
    for index in range(2):
        _residual(shapes, f"{half}.mid_block.resnets.{index}", width, width)
    attention = f"{half}.mid_block.attentions.0"
    shapes[f"{attention}.norm.gamma"] = (width, 1, 1)
    _conv(shapes, f"{attention}.to_qkv", width, 3 * width, 1, 1)
    _conv(shapes, f"{attention}.proj", width, width, 1, 1)


def _whole(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"VAE config {key} must be a positive whole number, got {value!r}")
    return value


def _list(config: Mapping[str, Any], key: str, *kinds: type) -> list[Any]:
    value = config.get(key)
    if not isinstance(value, list | tuple) or any(type(entry) not in kinds for entry in value):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise CheckpointError(f"VAE config {key} must be a list of {names}, got {value!r}")
    return list(value)
