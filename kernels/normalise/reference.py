"""The definition in float32 torch: every step by itself, the statistics taken anew after a mask."""

from __future__ import annotations

import torch

FLOOR = 1e-6
"""Least standard deviation that divides."""


def column_stats(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.normalise.column_stats``.

    The mean is held between the least and the greatest value, so a constant column has exactly its value as mean and
    exactly 0 as deviation. Strides are levelled first, for torch sums in the order of memory.
    """
    values = x.float().contiguous()
    mean = values.mean(dim=0).clamp(*torch.aminmax(values, dim=0))
    variance = (values - mean).square().sum(dim=0) / (len(x) - 1)
    return mean, variance.masked_fill(variance.isinf(), float("nan")).sqrt()


def normalise(
    x: torch.Tensor,
    mode: str,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    target_std: float,
    clip_sigma: float | None,
    weight: float,
) -> torch.Tensor:
    """See ``kernels.normalise.normalise``; mean and std are read unless the mode is ``global``."""
    values = x.float().contiguous()
    if mode == "global" or mean is None or std is None:
        return _global(values, target_std)
    moved = _per_dim(values, mean, std, clip_sigma)
    return moved if mode == "per_dim" else weight * moved + (1 - weight) * _global(values, target_std)


def _global(values: torch.Tensor, target_std: float) -> torch.Tensor:
    _, spread = column_stats(values.reshape(-1, 1))
    return values * (target_std / spread).masked_fill_(spread == 0, 1)


def _per_dim(values: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, clip_sigma: float | None) -> torch.Tensor:
    own_mean, own_std = column_stats(values)
    z = (values - own_mean) / own_std.clamp_min(FLOOR)
    if clip_sigma is not None:
        z = z.clamp(-clip_sigma, clip_sigma)
    return z * std.clamp_min(FLOOR) + mean


def outlier_ratios(x: torch.Tensor, std: torch.Tensor, direction: str) -> torch.Tensor:
    """See ``kernels.normalise.outlier_ratios``."""
    high, low = _high_low(column_stats(x)[1], std)
    return _pick(high, low, direction)


def mask_outliers(
    x: torch.Tensor, std: torch.Tensor, threshold: float, mode: str, direction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.normalise.mask_outliers``."""
    _, own = column_stats(x)
    ratios = _pick(*_high_low(own, std), direction)
    factors = _factors(own, std, threshold, mode, direction)
    return (x.float().contiguous() * factors).masked_fill_(factors == 0, 0).to(x.dtype), ratios


def _high_low(own: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return own / std.clamp_min(FLOOR), std / own.clamp_min(FLOOR)


def _pick(high: torch.Tensor, low: torch.Tensor, direction: str) -> torch.Tensor:
    return torch.maximum(high, low) if direction == "both" else {"high": high, "low": low}[direction]


def _factors(own: torch.Tensor, std: torch.Tensor, threshold: float, mode: str, direction: str) -> torch.Tensor:
    """What each column is multiplied by; 1 where it stays."""
    high, low = _high_low(own, std)
    rises = std > own if direction == "both" else torch.full_like(own, direction == "low", dtype=torch.bool)
    fall = threshold * (std if mode == "clamp" else std.clamp_min(FLOOR)) / own
    scaled = torch.where(rises, (low / threshold).masked_fill_(own == 0, 1), fall)
    outlier = _pick(high, low, direction) > threshold
    change = {"none": torch.ones_like(own), "zero": torch.zeros_like(own), "clamp": scaled, "scale": scaled}[mode]
    return torch.where(outlier, change, 1.0)


def mask_and_normalise(  # noqa: PLR0913 (the options of both steps)
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.normalise.mask_and_normalise``; between the two steps nothing is rounded to the dtype of x."""
    masked, ratios = mask_outliers(x.float(), std, threshold, outlier_mode, direction)
    return normalise(masked, mode, mean, std, target_std, clip_sigma, weight), ratios
