"""The VAE's layers as plain data, and the arithmetic that needs no neighbouring rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.quant import dequantise_rows, quantise_rows
from ..formats import rotation_group
from .config import stays_plain
from .cut import ATTENTION_ROWS

if TYPE_CHECKING:
    from ...loaders.checkpoint import Checkpoint


@dataclass(frozen=True)
class Reader:
    """Takes one tensor at a time from a checkpoint and puts it where the layers run."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    weight_format: str = "bf16"

    def exact(self, name: str) -> Tensor:
        """The stored tensor in float32, on the CPU."""
        return self.checkpoint.read(name, torch.float32)

    def place(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Move to the device, in the compute dtype unless another is given; 4-D tensors become channels-last."""
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        return tensor.to(self.device, dtype or self.dtype).contiguous(memory_format=layout)


@dataclass(frozen=True)
class Rows:
    """A convolution's weight as ``stored * scale``: one row [kh * kw * in] of one byte each per output channel."""

    stored: Tensor
    scale: Tensor
    group: int
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor, reader: Reader) -> Rows:
        """Quantise ``weight`` [out, in, kh, kw]."""
        matrix = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)
        group = rotation_group(matrix.shape[1])
        stored, scale = quantise_rows(matrix, reader.weight_format, group)
        return cls(stored.to(reader.device), scale.to(reader.device), group, weight.shape, reader.dtype)

    def weight(self) -> Tensor:
        """A new tensor [out, in, kh, kw], channels-last."""
        outputs, inputs, height, width = self.shape
        matrix = dequantise_rows(self.stored, self.scale, self.group, self.dtype)
        return matrix.view(outputs, height, width, inputs).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Conv:
    """A 2-D convolution: ``weight`` [out, in, kh, kw], plain or as rows of bytes, and ``bias`` [out]."""

    kept: Tensor | Rows
    bias: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight in the compute dtype; made anew at each use from rows of bytes."""
        return self.kept.weight() if isinstance(self.kept, Rows) else self.kept

    @property
    def outputs(self) -> int:
        """Output channels."""
        return len(self.bias)

    @classmethod
    def read(cls, reader: Reader, name: str, outputs: int | None = None) -> Conv:
        """Take the layer ``name``; of a causal 3-D weight only the last temporal tap, the one a single frame meets.

        ``outputs`` keeps only the first output channels.
        """
        weight = reader.exact(f"{name}.weight")[:outputs]
        if weight.ndim == 5:
            weight = weight[:, :, -1].clone()
        return cls._keep(reader, name, weight, reader.exact(f"{name}.bias")[:outputs])

    @classmethod
    def read_upsampling(cls, reader: Reader, name: str) -> Conv:
        """The 2x2 convolution with four times the channels that equals doubling by repetition, then this 3x3 one.

        On a doubled map the three taps of one direction see only two source rows: the even output rows see ``(w0)``
        above and ``(w1 + w2)`` here, the odd ones ``(w0 + w1)`` here and ``(w2)`` below. Channels come out as
        [even/odd row, even/odd column, out]; 16 products take the place of 36, and the doubled map is never stored.
        """
        weight = reader.exact(f"{name}.weight")
        phases = [_pair(_pair(weight, 2, odd_row), 3, odd_column) for odd_row in (0, 1) for odd_column in (0, 1)]
        return cls._keep(reader, name, torch.cat(phases), reader.exact(f"{name}.bias").repeat(4))

    @classmethod
    def _keep(cls, reader: Reader, name: str, weight: Tensor, bias: Tensor) -> Conv:
        plain = reader.weight_format == "bf16" or stays_plain(name)
        return cls(reader.place(weight) if plain else Rows.of(weight, reader), reader.place(bias))

    def pointwise(self, x: Tensor) -> Tensor:
        """Apply a 1x1 convolution."""
        return self.over(x)

    def over(self, x: Tensor, padding: tuple[int, int] = (0, 0), stride: int = 1) -> Tensor:
        """The convolution of [B, C, H, W]; bits of a row do not depend on how many rows there are."""
        return convolve(x, self.weight, self.bias, padding, stride)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int], stride: int) -> Tensor:
    """``F.conv2d`` by one library whatever the size of the map.

    On a CPU torch takes oneDNN for maps above 20,480 numbers and a loop of its own for smaller ones, whose sums are
    ordered otherwise: the height of a band would decide the last bits.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, bias, list(padding), [stride, stride], [1, 1], 1)
    return F.conv2d(x, weight, bias, stride=stride, padding=padding)


def _pair(weight: Tensor, dim: int, odd: int) -> Tensor:
    first, second, third = weight.split(1, dim)
    return torch.cat((first + second, third) if odd else (first, second + third), dim)


@dataclass(frozen=True)
class Norm:
    """``x / max(|x|, 1e-12) * sqrt(C) * gamma``, the length taken over the channels of each pixel, in float32."""

    weight: Tensor
    silu: bool = True

    @classmethod
    def read(cls, reader: Reader, name: str, *, silu: bool = True) -> Norm:
        """Take the gain ``name.gamma``; sqrt(C) is folded into it."""
        gamma = reader.exact(f"{name}.gamma").view(1, -1, 1, 1)
        return cls(reader.place(gamma * gamma.numel() ** 0.5, torch.float32), silu)

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the normalised (and, where asked, silu-activated) ``x`` to ``out``."""
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        inverse = length.clamp_min_(1e-12).reciprocal_()
        if out.dtype == torch.float32:
            torch.mul(x, inverse, out=out)
            y = out
        else:
            y = x * inverse
        y.mul_(self.weight)
        if self.silu:
            F.silu(y, inplace=True)
        if y is not out:
            out.copy_(y)


@dataclass(frozen=True)
class Residual:
    """norm, silu, conv, norm, silu, conv, plus the input (through a 1x1 convolution where the width changes)."""

    norm1: Norm
    conv1: Conv
    norm2: Norm
    conv2: Conv
    shortcut: Conv | None

    @classmethod
    def read(cls, reader: Reader, name: str, *, shortcut: bool) -> Residual:
        """Take the block ``name``."""
        return cls(
            norm1=Norm.read(reader, f"{name}.norm1"),
            conv1=Conv.read(reader, f"{name}.conv1"),
            norm2=Norm.read(reader, f"{name}.norm2"),
            conv2=Conv.read(reader, f"{name}.conv2"),
            shortcut=Conv.read(reader, f"{name}.conv_shortcut") if shortcut else None,
        )


@dataclass(frozen=True)
class Attention:
    """Single-head attention over all pixels of the smallest map, plus its input."""

    norm: Norm
    to_qkv: Conv
    proj: Conv

    @classmethod
    def read(cls, reader: Reader, name: str) -> Attention:
        """Take the block ``name``."""
        norm = Norm.read(reader, f"{name}.norm", silu=False)
        return cls(norm, Conv.read(reader, f"{name}.to_qkv"), Conv.read(reader, f"{name}.proj"))

    def apply(self, x: Tensor) -> Tensor:
        """Return attention(x) + x for ``x`` [1, C, h, w]; ``x`` itself is overwritten.

        The softmax is exact and in float32, for a fixed number of query rows at a time, so that no [pixels, pixels]
        matrix is held and no backend is chosen: one head of all channels is wider than what flash kernels take.
        """
        channels = x.shape[1]
        normed = torch.empty_like(x, memory_format=torch.channels_last)
        self.norm.into(x, normed)
        qkv = F.linear(_tokens(normed), self.to_qkv.weight[:, :, 0, 0], self.to_qkv.bias)
        del normed
        query, key, value = qkv.float().chunk(3, dim=-1)
        projection = self.proj.weight[:, :, 0, 0]
        for rows, out in zip(query.split(ATTENTION_ROWS), _tokens(x).split(ATTENTION_ROWS), strict=True):
            mixed = _attend(rows * channels**-0.5, key, value).to(x.dtype)
            out.add_(F.linear(mixed, projection, self.proj.bias))
        return x


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.T
    scores.sub_(scores.amax(dim=1, keepdim=True)).exp_()
    return (scores @ value).div_(scores.sum(dim=1, keepdim=True))


def _tokens(x: Tensor) -> Tensor:
    """The pixels of a map [1, C, h, w] as a view [h * w, C]."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])
