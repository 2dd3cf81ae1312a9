"""What all ways of blending share: checked operands, weights of several pictures, pooled statistics, the mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...errors import RequestError
from .resample import Resampling, resample

FLOOR = 1e-6
"""Least standard deviation that divides."""

Pictures = torch.Tensor | Sequence[torch.Tensor]
"""Embeddings [S, D] of one picture, or of several, each with its own S."""

Weighted = list[tuple[torch.Tensor, float]]


def operands(vl: Pictures, text: torch.Tensor, weights: Sequence[float] | None = None) -> tuple[Weighted, torch.Tensor]:
    """Pictures with their shares, which add up to 1, and the text; all in float32 or better on the text's device.

    Pictures of weight 0 are left out, so one of weight 1 is computed as if it were alone.

    Raises:
        RequestError: a matrix is empty, not finite or of another width, or the weights are not one per picture, 0 or
            more, with a sum above 0.
    """
    pictures = [vl] if isinstance(vl, torch.Tensor) else list(vl)
    shares = picture_shares(len(pictures), weights)
    _check_matrix("text embeddings", text, text)
    for picture in pictures:
        _check_matrix("picture embeddings", picture, text)
    wide = torch.promote_types(text.dtype, torch.float32)
    moved = [(picture.to(text.device, wide), share) for picture, share in zip(pictures, shares, strict=True) if share]
    return moved, text.to(wide)


def picture_shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """Weights divided by their sum; equal ones where none are given.

    Raises:
        RequestError: they are not one per picture, 0 or more, with a sum above 0.
    """
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    total = math.fsum(given)
    if len(given) != count or not all(0 <= weight < math.inf for weight in given) or not 0 < total < math.inf:
        raise RequestError(f"picture weights must be {count}, 0 or more with a sum above 0, got {given}")
    return [weight / total for weight in given]


def resampled(pictures: Weighted, length: int, how: Resampling = "linear") -> torch.Tensor:
    """``sum_k w_k resample(V_k)``: [length, D]; added in float64, so that the order of pictures does not show."""
    if len(pictures) == 1:
        return resample(pictures[0][0], length, how)
    parts = [share * resample(rows, length, how).double() for rows, share in pictures]
    return torch.stack(parts).sum(dim=0).to(pictures[0][0].dtype)


def moments(pictures: Weighted, dim: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std (N - 1) along a dimension, or over all entries, pooled over the pictures.

    ``m = sum w_k m_k`` and ``s^2 = sum w_k (s_k^2 + (m_k - m)^2)``.

    Raises:
        RequestError: there are fewer than two values to measure.
    """
    if len(pictures) == 1:
        return _moments(pictures[0][0], dim)
    each = [_moments(rows.double(), dim) for rows, _ in pictures]
    dtype = pictures[0][0].dtype
    shares = [share for _, share in pictures]
    mean = torch.stack([share * m for share, (m, _) in zip(shares, each, strict=True)]).sum(dim=0)
    squares = [share * (s.square() + (m - mean).square()) for share, (m, s) in zip(shares, each, strict=True)]
    return mean.to(dtype), torch.stack(squares).sum(dim=0).sqrt().to(dtype)


def _moments(rows: torch.Tensor, dim: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    count = rows.numel() if dim is None else rows.shape[dim]
    if count < 2:
        words = {None: "entries", 0: "rows", 1: "columns"}[dim]
        raise RequestError(f"embeddings must have at least 2 {words} to measure, got {count}")
    if dim is None:
        return rows.mean(), rows.std()
    return rows.mean(dim=dim, keepdim=True), rows.std(dim=dim, keepdim=True)


def mix(picture: torch.Tensor, text: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    """``alpha V + (1 - alpha) E``; exactly E where alpha is 0 and exactly V where it is 1.

    Args:
        picture: [T, D].
        text: [T, D].
        alpha: one share, or one per row [T].
    """
    if not isinstance(alpha, torch.Tensor):
        if alpha in (0, 1):
            return (picture if alpha else text).clone()
        return alpha * picture + (1 - alpha) * text
    share = alpha.to(text)[:, None]
    mixed = share * picture + (1 - share) * text
    return torch.where(share == 0, text, torch.where(share == 1, picture, mixed))


def _check_matrix(subject: str, rows: torch.Tensor, text: torch.Tensor) -> None:
    if rows.dim() != 2 or not rows.numel() or not rows.is_floating_point():
        raise RequestError(f"{subject} must be a matrix of floats [rows, width], got {rows.dtype} {list(rows.shape)}")
    if rows.shape[1] != text.shape[-1]:
        raise RequestError(f"{subject} must be {text.shape[-1]} wide as the text's, got {rows.shape[1]}")
    if not bool(torch.isfinite(rows).all()):
        raise RequestError(f"{subject} must be finite, got NaN or infinity")
