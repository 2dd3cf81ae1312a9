"""Columns whose spread is far from the reference's: found, and tamed."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

import torch

from ...errors import KernelError, RequestError
from ...kernels.normalise import mask_outliers, outlier_ratios
from .knobs import Direction, Knobs, OutlierMode, check_choice, check_positive
from .stats import Statistics, require_statistics


class OutlierInfo(TypedDict):
    """What a mask did: ascending columns, ratio of each before it, and its settings."""

    masked_dimensions: list[int]
    ratios: dict[int, float]
    mode: str
    threshold: float


def get_outlier_dimensions(
    emb: torch.Tensor,
    threshold: float = Knobs.outlier_threshold,
    *,
    direction: Direction = Knobs.outlier_direction,
    statistics: Statistics | str | Path | None = None,
    implementation: str = "reference",
) -> list[tuple[int, float]]:
    """Columns whose ratio is above the threshold, with their ratios, largest first.

    Args:
        emb: [S, D] with at least two rows.
        threshold: above it, not at it, a column is an outlier.
        direction: std over reference (``high``), its inverse (``low``), or the larger of both.
        statistics: of the text encoder; None takes those in the cache.
        implementation: of the op.

    Raises:
        RequestError: there are no statistics of this width, or an option or the embeddings are not usable.
    """
    check_positive("outlier_threshold", threshold)
    check_choice("outlier_direction", direction, Direction)
    reference = require_statistics(statistics, emb.shape[-1], "outlier dimensions")
    try:
        ratios = outlier_ratios(emb, reference.std.to(emb.device), direction=direction, implementation=implementation)
    except KernelError as error:
        raise RequestError(f"embeddings must have measurable columns: {error.message}") from error
    return above(ratios, threshold)


def mask_outlier_dimensions(
    emb: torch.Tensor,
    threshold: float = Knobs.outlier_threshold,
    mode: OutlierMode = "zero",
    *,
    direction: Direction = Knobs.outlier_direction,
    statistics: Statistics | str | Path | None = None,
    implementation: str = "reference",
) -> tuple[torch.Tensor, OutlierInfo]:
    """Tame the columns that :func:`get_outlier_dimensions` finds; the input stays as it is.

    ``zero`` sets them to 0; ``clamp`` and ``scale`` multiply them so that their ratio becomes the threshold.

    Args:
        emb: [S, D] with at least two rows.
        threshold: as in :func:`get_outlier_dimensions`.
        mode: ``none``, ``zero``, ``clamp`` or ``scale``.
        direction: as in :func:`get_outlier_dimensions`.
        statistics: as in :func:`get_outlier_dimensions`; not needed for ``none``.
        implementation: of the op.

    Returns:
        the masked matrix in the dtype of ``emb``, and what was done.

    Raises:
        RequestError: as :func:`get_outlier_dimensions`.
    """
    check_positive("outlier_threshold", threshold)
    check_choice("outlier_masking", mode, OutlierMode)
    check_choice("outlier_direction", direction, Direction)
    if mode == "none":
        return emb.clone(), OutlierInfo(masked_dimensions=[], ratios={}, mode=mode, threshold=threshold)
    reference = require_statistics(statistics, emb.shape[-1], f"outlier_masking {mode}")
    try:
        masked, ratios = mask_outliers(
            emb,
            reference.std.to(emb.device),
            threshold=threshold,
            mode=mode,
            direction=direction,
            implementation=implementation,
        )
    except KernelError as error:
        raise RequestError(f"embeddings must have measurable columns: {error.message}") from error
    found = sorted(above(ratios, threshold))
    return masked, OutlierInfo(
        masked_dimensions=[column for column, _ in found], ratios=dict(found), mode=mode, threshold=threshold
    )


def above(ratios: torch.Tensor, threshold: float) -> list[tuple[int, float]]:
    """Columns and ratios above the threshold, largest first."""
    columns = (ratios > threshold).nonzero().flatten().tolist()
    found = [(column, float(ratios[column])) for column in columns]
    return sorted(found, key=lambda item: (-item[1], item[0]))
