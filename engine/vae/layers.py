"""The VAE's layers as plain data, and the arithmetic that needs no neighbouring rows."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from ...loaders.checkpoint import Checkpoint


@dataclass(frozen=True)
class Reader:
    """Takes one tensor at a time from a checkpoint and puts it where the layers run."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype

    def exact(self, name: str) -> Tensor:
        """The stored tensor in float32, on the CPU."""
        return self.checkpoint.read(name, torch.float32)

    def place(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Move to the device, in the compute dtype unless another is given; 4-D tensors become channels-last."""
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        return tensor.to(self.device, dtype or self.dtype).contiguous(memory_format=layout)


@dataclass(frozen=True)
class Conv:
    """A 2-D convolution: ``weight`` [out, in, kh, kw], ``bias`` [out]."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def read(cls, reader: Reader, name: str, outputs: int | None = None) -> Conv:
        """Take the layer ``name``; of a causal 3-D weight only the last temporal tap, the one a single frame meets.

        ``outputs`` keeps only the first output channels.
        """
        weight = reader.exact(f"{name}.weight")[:outputs]
        if weight.ndim == 5:
            weight = weight[:, :, -1].clone()
        return cls(reader.place(weight), reader.place(reader.exact(f"{name}.bias")[:outputs]))

    @classmethod
    def read_upsampling(cls, reader: Reader, name: str) -> Conv:
        """The 2x2 convolution with four times the channels that equals doubling by repetition, then this 3x3 one.

        On a doubled map the three taps of one direction see only two source rows: the even output rows see ``(w0)``
        above and ``(w1 + w2)`` here, the odd ones ``(w0 + w1)`` here and ``(w2)`` below. Channels come out as
        [even/odd row, even/odd column, out]; 16 products take the place of 36, and the doubled map is never stored.
        """
        weight = reader.exact(f"{name}.weight")
        phases = [_pair(_pair(weight, 2, odd_row), 3, odd_column) for odd_row in (0, 1) for odd_column in (0, 1)]
        return cls(reader.place(torch.cat(phases)), reader.place(reader.exact(f"{name}.bias").repeat(4)))

    def pointwise(self, x: Tensor) -> Tensor:
        """Apply a 1x1 convolution."""
        return F.conv2d(x, self.weight, self.bias)


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
        """Return attention(x) + x for ``x`` [B, C, h, w]; ``x`` itself is overwritten."""
        batch, channels, height, width = x.shape
        normed = torch.empty_like(x, memory_format=torch.channels_last)
        self.norm.into(x, normed)
        tokens = normed.permute(0, 2, 3, 1).reshape(batch, 1, height * width, channels)
        qkv = F.linear(tokens, self.to_qkv.weight[:, :, 0, 0], self.to_qkv.bias)
        query, key, value = qkv.chunk(3, dim=-1)
        # One head of all channels is wider than the flash kernels of CUDA take, and the fallback that would be chosen
        # instead holds the whole [pixels, pixels] matrix.
        pinned = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if x.is_cuda else nullcontext()
        with pinned:
            mixed = F.scaled_dot_product_attention(query, key, value)
        projected = F.linear(mixed, self.proj.weight[:, :, 0, 0], self.proj.bias)
        return x.add_(projected.view(batch, height, width, channels).permute(0, 3, 1, 2))
