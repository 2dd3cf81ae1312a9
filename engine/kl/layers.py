"""Group norms over maps that arrive in bands, and the layers that hold them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..vae.layers import Attention, Conv, Norm, Reader
from ..vae.layers import Residual as FrozenResidual

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Affine(Norm):
    """``x * weight + shift``, then silu where asked: a group norm whose statistics are known.

    Attributes:
        shift: float32 [1, C, 1, 1], as ``weight``.
    """

    shift: Tensor

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the normalised (and, where asked, silu-activated) ``x`` to ``out``."""
        if out.dtype == torch.float32:
            y = torch.addcmul(self.shift, x, self.weight, out=out)
        else:
            y = x.float().mul_(self.weight).add_(self.shift)
        if self.silu:
            F.silu(y, inplace=True)
        if y is not out:
            out.copy_(y)


@dataclass(frozen=True)
class GroupNorm:
    """``(x - mean) / sqrt(var + 1e-6) * weight + bias`` with mean and variance over a group of channels and all pixels.

    Attributes:
        weight: float32 [C].
        bias: float32 [C].
        groups: how many groups the channels form.
        silu: an activation follows.
    """

    weight: Tensor
    bias: Tensor
    groups: int
    silu: bool = True

    @classmethod
    def read(cls, reader: Reader, name: str, groups: int, *, silu: bool = True) -> GroupNorm:
        """Take the norm ``name``."""
        weight, bias = (reader.place(reader.exact(f"{name}.{leaf}"), torch.float32) for leaf in ("weight", "bias"))
        return cls(weight, bias, groups, silu)

    def measured(self, bands: Iterable[Tensor]) -> Affine:
        """The norm of the map that consecutive bands [1, C, n, W] form.

        Every row of pixels gives its mean and variance per channel in float32; rows are joined in float64. So the
        result does not depend on where the map was cut, and no band is held in float64.
        """
        rows = 0
        mean, square = (torch.zeros_like(self.weight, dtype=torch.float64) for _ in range(2))
        for band in bands:
            variance, centre = (s.double() for s in torch.var_mean(band.float(), dim=(0, 3), correction=0))
            mean += centre.sum(dim=1)
            square += (variance + centre.square()).sum(dim=1)
            rows += band.shape[2]
        mean /= rows
        return self._frozen(mean, square / rows - mean.square())

    def _frozen(self, mean: Tensor, variance: Tensor) -> Affine:
        by_group = mean.view(self.groups, -1)
        centre = by_group.mean(dim=1, keepdim=True)
        around = (variance.view(self.groups, -1) + (by_group - centre).square()).mean(dim=1, keepdim=True)
        gain = (around + EPS).rsqrt().expand_as(by_group).reshape(-1) * self.weight
        shift = self.bias - centre.expand_as(by_group).reshape(-1) * gain
        shape = (1, -1, 1, 1)
        return Affine(weight=gain.float().view(shape), shift=shift.float().view(shape), silu=self.silu)


@dataclass(frozen=True)
class Residual:
    """norm, silu, conv, norm, silu, conv, plus the input (through a 1x1 convolution where the width changes)."""

    norm1: GroupNorm
    conv1: Conv
    norm2: GroupNorm
    conv2: Conv
    shortcut: Conv | None

    @classmethod
    def read(cls, reader: Reader, name: str, groups: int, *, shortcut: bool = False) -> Residual:
        """Take the block ``name``."""
        return cls(
            norm1=GroupNorm.read(reader, f"{name}.norm1", groups),
            conv1=Conv.read(reader, f"{name}.conv1"),
            norm2=GroupNorm.read(reader, f"{name}.norm2", groups),
            conv2=Conv.read(reader, f"{name}.conv2"),
            shortcut=Conv.read(reader, f"{name}.conv_shortcut") if shortcut else None,
        )

    def frozen(self, norm1: Affine, norm2: Affine) -> FrozenResidual:
        """The block with its norms measured, as the stages over bands take it."""
        return FrozenResidual(norm1, self.conv1, norm2, self.conv2, self.shortcut)


@dataclass(frozen=True)
class MiddleAttention:
    """Single-head attention over all pixels of the smallest map, plus its input."""

    norm: GroupNorm
    to_qkv: Conv
    proj: Conv

    @classmethod
    def read(cls, reader: Reader, name: str, groups: int) -> MiddleAttention:
        """Take the block ``name``; its three input matrices become one."""
        parts = [f"{name}.to_{letter}" for letter in "qkv"]
        weight = torch.cat([reader.exact(f"{part}.weight") for part in parts])
        bias = torch.cat([reader.exact(f"{part}.bias") for part in parts])
        out = reader.exact(f"{name}.to_out.0.weight")
        return cls(
            norm=GroupNorm.read(reader, f"{name}.group_norm", groups, silu=False),
            to_qkv=Conv(reader.place(weight[:, :, None, None]), reader.place(bias)),
            proj=Conv(reader.place(out[:, :, None, None]), reader.place(reader.exact(f"{name}.to_out.0.bias"))),
        )

    def apply(self, x: Tensor) -> Tensor:
        """Return attention(x) + x for ``x`` [1, C, h, w], channels-last; ``x`` itself is overwritten."""
        return Attention(self.norm.measured([x]), self.to_qkv, self.proj).apply(x)
