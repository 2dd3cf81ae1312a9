"""Sequences of embeddings brought to another number of rows."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from ...errors import RequestError
from .knobs import MAX_CAPTION_ROWS, Compression, check_choice

Resampling = Literal["linear", "area"]


def resample(rows: torch.Tensor, length: int, how: Resampling = "linear") -> torch.Tensor:
    """Rows [S, D] to [length, D].

    ``linear`` interpolates between the two nearest rows (``align_corners=False``, no antialiasing): bringing 1041 rows
    to 11 reads 21 of them. ``area`` averages over equal shares, so every row counts; the weights of a result sum to 1.
    Bringing S rows to S changes nothing.

    Args:
        rows: [S, D], at least one row.
        length: rows of the result.
        how: ``linear`` or ``area``.

    Raises:
        RequestError: no rows, no such way, or a length below 1.
    """
    check_choice("resampling", how, Resampling)
    if rows.dim() != 2 or not len(rows) or length < 1:
        raise RequestError(f"embeddings must be a matrix of at least 1 row to give {length}, got {list(rows.shape)}")
    if len(rows) == length:
        return rows
    columns = rows.T[None]
    if how == "area":
        return F.adaptive_avg_pool1d(columns, length)[0].T
    return F.interpolate(columns, size=length, mode="linear", align_corners=False)[0].T


def compress_rows(rows: torch.Tensor, limit: int = MAX_CAPTION_ROWS, how: Compression = "interpolate") -> torch.Tensor:
    """At most `limit` rows; fewer stay as they are.

    ``truncate`` keeps the first, ``interpolate`` is linear, ``pool`` averages shares of neighbours, ``attention_pool``
    weights the rows of a share by the softmax of their cosine to the share's mean.

    Args:
        rows: [S, D].
        limit: most rows.
        how: one of these.

    Raises:
        RequestError: no such way, or a limit below 1.
    """
    check_choice("compression", how, Compression)
    if limit < 1:
        raise RequestError(f"most rows must be at least 1, got {limit}")
    if len(rows) <= limit:
        return rows
    if how == "truncate":
        return rows[:limit].clone()
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if how == "attention_pool":
        return _attention_pool(wide, limit).to(rows.dtype)
    return resample(wide, limit, "linear" if how == "interpolate" else "area").to(rows.dtype)


def _attention_pool(rows: torch.Tensor, limit: int) -> torch.Tensor:
    """Shares as in adaptive pooling: from floor(k S / limit) to ceil((k + 1) S / limit)."""
    made = []
    for k in range(limit):
        share = rows[k * len(rows) // limit : -(-(k + 1) * len(rows) // limit)]
        weights = F.cosine_similarity(share, share.mean(dim=0, keepdim=True), dim=-1).softmax(dim=0)
        made.append(weights @ share)
    return torch.stack(made)
