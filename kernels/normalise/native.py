"""The native columns: statistics in float64 in one pass, and one more pass that masks and normalises at once.

A mask multiplies columns, so the statistics after it are those before it times the same factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...errors import KernelError
from .. import native
from .reference import FLOOR


@dataclass(frozen=True)
class _Stats:
    """Float64 [D] of a matrix of so many rows."""

    rows: int
    mean: torch.Tensor
    std: torch.Tensor

    def times(self, factors: torch.Tensor) -> _Stats:
        return _Stats(self.rows, self.mean * factors, self.std * factors)

    def overall(self) -> float:
        """Standard deviation over all entries; exactly 0 for a constant matrix."""
        first = self.mean[0]
        centre = first + (self.mean - first).mean()
        between = self.rows * (self.mean - centre).square().sum()
        within = (self.rows - 1) * self.std.square().sum() if self.rows > 1 else 0.0
        return math.sqrt(float(between + within) / (self.rows * len(self.mean) - 1))


def column_stats(
    x: torch.Tensor, threads: int | None = None, *, isa: str = "best"
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.normalise.column_stats``."""
    stats = _stats(native.readable(x), threads, isa)
    return stats.mean.float(), stats.std.float()


def normalise(  # noqa: PLR0913 (the arguments of the reference, and how to run)
    x: torch.Tensor,
    mode: str,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    target_std: float,
    clip_sigma: float | None,
    weight: float,
    threads: int | None = None,
    *,
    isa: str = "best",
) -> torch.Tensor:
    """See ``kernels.normalise.normalise``; two passes over x."""
    x = native.readable(x)
    stats = _stats(x, threads, isa)
    ones = torch.ones_like(stats.mean)
    terms = _terms(stats, ones, mode, mean, std, target_std, weight)
    return _affine(x, terms, clip_sigma, threads, isa)


def outlier_ratios(
    x: torch.Tensor, std: torch.Tensor, direction: str, threads: int | None = None, *, isa: str = "best"
) -> torch.Tensor:
    """See ``kernels.normalise.outlier_ratios``."""
    return _ratios(_stats(native.readable(x), threads, isa), std, direction).float()


def mask_outliers(
    x: torch.Tensor,
    std: torch.Tensor,
    threshold: float,
    mode: str,
    direction: str,
    threads: int | None = None,
    *,
    isa: str = "best",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.normalise.mask_outliers``; two passes over x."""
    x = native.readable(x)
    stats = _stats(x, threads, isa)
    factors = _factors(stats, std, threshold, mode, direction).float()
    masked = torch.empty(x.shape, dtype=x.dtype)
    count, number = native.thread_count(threads), native.isa_number(isa)
    native.call("qengine_scale_columns", native.Matrix.of(x), factors.data_ptr(), masked.data_ptr(), count, number)
    return masked, _ratios(stats, std, direction).float()


def mask_and_normalise(  # noqa: PLR0913 (the arguments of the reference, and how to run)
    x: torch.Tensor,
    mean: torch.Tensor | None,
    std: torch.Tensor,
    threshold: float,
    outlier_mode: str,
    direction: str,
    mode: str,
    target_std: float,
    clip_sigma: float | None,
    weight: float,
    threads: int | None = None,
    *,
    isa: str = "best",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.normalise.mask_and_normalise``; two passes over x."""
    x = native.readable(x)
    stats = _stats(x, threads, isa)
    factors = _factors(stats, std, threshold, outlier_mode, direction)
    terms = _terms(stats.times(factors), factors, mode, mean, std, target_std, weight)
    return _affine(x, terms, clip_sigma, threads, isa), _ratios(stats, std, direction).float()


def _stats(x: torch.Tensor, threads: int | None, isa: str) -> _Stats:
    mean, std = torch.empty(2, x.shape[1], dtype=torch.float64)
    count, number = native.thread_count(threads), native.isa_number(isa)
    native.call("qengine_column_stats", native.Matrix.of(x), mean.data_ptr(), std.data_ptr(), count, number)
    return _Stats(len(x), mean, std)


def _high_low(stats: _Stats, std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wanted = _vector("std", std, stats)
    return stats.std / wanted.clamp_min(FLOOR), wanted / stats.std.clamp_min(FLOOR)


def _ratios(stats: _Stats, std: torch.Tensor, direction: str) -> torch.Tensor:
    high, low = _high_low(stats, std)
    return torch.maximum(high, low) if direction == "both" else {"high": high, "low": low}[direction]


def _factors(stats: _Stats, std: torch.Tensor, threshold: float, mode: str, direction: str) -> torch.Tensor:
    """What each column is multiplied by, float64 [D]; 1 where it stays."""
    high, low = _high_low(stats, std)
    wanted = std.double() if mode == "clamp" else std.double().clamp_min(FLOOR)
    falling = threshold * wanted / stats.std
    rising = (low / threshold).masked_fill(stats.std == 0, 1)
    rises = low > high if direction == "both" else torch.full_like(low, direction == "low", dtype=torch.bool)
    scaled = torch.where(rises, rising, falling)
    change = {"none": torch.ones_like(low), "zero": torch.zeros_like(low), "clamp": scaled, "scale": scaled}[mode]
    return torch.where(_ratios(stats, std, direction).float() > threshold, change, 1.0)


def _terms(
    stats: _Stats,
    factors: torch.Tensor,
    mode: str,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    target_std: float,
    weight: float,
) -> torch.Tensor:
    """What ``qengine_affine_columns`` takes of x before the mask, float64 [5, D]: shift, scale, gain, offset, linear.

    stats are those after the mask, which has multiplied the columns by the factors.
    """
    terms = torch.zeros(5, len(factors), dtype=torch.float64)
    shift, scale, gain, offset, linear = terms
    share = {"global": 0.0, "per_dim": 1.0, "hybrid": weight}[mode]
    if mode != "global":
        if mean is None or std is None:
            raise KernelError(f"mean and std must be the reference's for {mode}, got None")
        shift.copy_(torch.where(factors == 0, 0, stats.mean / factors))
        scale.copy_(factors / stats.std.clamp_min(FLOOR))
        gain.copy_(share * _vector("std", std, stats).clamp_min(FLOOR))
        offset.copy_(share * _vector("mean", mean, stats))
    if mode != "per_dim":
        spread = stats.overall()
        linear.copy_((1 - share) * factors * (target_std / spread if spread else 1.0))
    return terms


def _affine(
    x: torch.Tensor, terms: torch.Tensor, clip_sigma: float | None, threads: int | None, isa: str
) -> torch.Tensor:
    addresses = (row.data_ptr() for row in terms)
    affine = native.Affine(*addresses, math.inf if clip_sigma is None else clip_sigma)
    target = torch.empty(x.shape, dtype=torch.float32)
    count, number = native.thread_count(threads), native.isa_number(isa)
    native.call("qengine_affine_columns", native.Matrix.of(x), affine, target.data_ptr(), count, number)
    return target


def _vector(subject: str, vector: torch.Tensor, stats: _Stats) -> torch.Tensor:
    if vector.shape != stats.mean.shape or vector.device.type != "cpu":
        raise KernelError(
            f"{subject} must be [{len(stats.mean)}] on the CPU, got {list(vector.shape)} on {vector.device}"
        )
    return vector.double()
