"""The numbers of a report on an extraction: spread by column, outliers against a reference, before and after."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import RequestError
from ...kernels.normalise import column_stats, outlier_ratios
from .condition import VLExtractionResult, blend_layers, condition, total_std
from .knobs import Knobs
from .outliers import above
from .raw import IMAGE, RawExtraction
from .stats import Statistics, default_path, read_statistics, require_statistics

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """Standard deviations of one matrix.

    Attributes:
        name: of the matrix, for a legend.
        rows: it has.
        std: of each column, float64 [D]; None where there are fewer than two rows.
        total: over all entries.
    """

    name: str
    rows: int
    std: Array | None
    total: float

    @classmethod
    def of(cls, name: str, rows: torch.Tensor) -> Spread:
        """Measure a matrix [S, D]."""
        std = column_stats(rows)[1].double().numpy() if len(rows) > 1 else None
        return cls(name, len(rows), std, total_std(rows))


@dataclass(frozen=True)
class Outlier:
    """A column whose spread is far from the reference's.

    Attributes:
        dimension: the column.
        ratio: std over the reference's for ``high``, its inverse for ``low``; above the threshold.
        direction: ``high`` or ``low``.
    """

    dimension: int
    ratio: float
    direction: Literal["high", "low"]


@dataclass(frozen=True)
class Figures:
    """What a report shows.

    Attributes:
        reference: of reference statistics, or of the prompt's embeddings; None without either.
        measured: of the rows in which outliers are looked for: image rows without markers, or all where there are none.
        outliers: by falling ratio; empty without a reference or with fewer than two rows.
        threshold: above which a column is one.
        series: selected rows before, after masking and normalisation, and blended, as far as there are.
        order: columns by falling spread of the reference, or of what was measured; int [D].
        masked: columns that the knobs masked, by falling ratio; None without masking.
        result: of :func:`condition` with the knobs.
    """

    reference: Spread | None
    measured: Spread
    outliers: tuple[Outlier, ...]
    threshold: float
    series: tuple[Spread, ...]
    order: NDArray[np.int64]
    masked: tuple[int, ...] | None
    result: VLExtractionResult


def report_figures(
    raw: RawExtraction,
    knobs: Knobs | None = None,
    statistics: Statistics | str | Path | None = None,
    blended: torch.Tensor | None = None,
    text_embeds: torch.Tensor | None = None,
) -> Figures:
    """Measure an extraction, what the knobs make of it, and what it became with the prompt.

    Args:
        raw: hidden states of the layers that the knobs name.
        knobs: the settings; None takes the defaults.
        statistics: of the text encoder or their file; None takes those in the cache where they have this width.
        blended: [T', D], what the transformer gets.
        text_embeds: [T, D] of the prompt; the reference where there are no statistics.

    Raises:
        RequestError: as :func:`condition`, or the matrices have different widths.
        InputError: the statistics cannot be read.
    """
    knobs = knobs or Knobs()
    states = blend_layers(raw.hidden, knobs.hidden_layer)
    width = states.shape[1]
    for name, rows in {"blended": blended, "text_embeds": text_embeds}.items():
        if rows is not None and (rows.dim() != 2 or rows.shape[1] != width):
            raise RequestError(f"{name} must have {width} columns as the extraction, got {list(rows.shape)}")
    known = _known(statistics, width)
    reference = _reference(known, text_embeds)
    image = raw.kinds == IMAGE
    pictures = bool(image.any())
    result = condition(raw, knobs, statistics=known, text_embeds=text_embeds)
    measured = Spread.of("image tokens" if pictures else "all tokens", states[image] if pictures else states)
    series = [
        Spread.of("before", states[raw.rows(knobs.token_selection)]),
        Spread.of("after", result.embeddings),
        *([] if blended is None else [Spread.of("blended", blended)]),
    ]
    sorting = next((each.std for each in (reference, measured) if each is not None and each.std is not None), None)
    return Figures(
        reference=reference,
        measured=measured,
        outliers=_outliers(states[image] if pictures else states, reference, knobs.outlier_threshold),
        threshold=knobs.outlier_threshold,
        series=tuple(series),
        order=np.argsort(-sorting, kind="stable") if sorting is not None else np.arange(width),
        masked=None if result.masked_dimensions is None else tuple(result.masked_dimensions),
        result=result,
    )


def _known(statistics: Statistics | str | Path | None, width: int) -> Statistics | None:
    if statistics is not None:
        return require_statistics(statistics, width, "a report")
    if not default_path().is_file():
        return None
    found = read_statistics(default_path())
    return found if found.width == width else None


def _reference(known: Statistics | None, text_embeds: torch.Tensor | None) -> Spread | None:
    if known is not None:
        std = known.std.double()
        total = known.global_std
        if math.isnan(total):
            total = float((std.square().mean() + known.mean.double().var(unbiased=False)).sqrt())
        return Spread("reference statistics", known.num_tokens, std.numpy(), total)
    if text_embeds is not None and len(text_embeds) > 1:
        return Spread.of("the prompt's embeddings", text_embeds)
    return None


def _outliers(rows: torch.Tensor, reference: Spread | None, threshold: float) -> tuple[Outlier, ...]:
    if reference is None or reference.std is None or len(rows) < 2:
        return ()
    std = torch.from_numpy(reference.std).float()
    found = [
        Outlier(column, ratio, direction)
        for direction in ("high", "low")
        for column, ratio in above(outlier_ratios(rows, std, direction=direction), threshold)
    ]
    return tuple(sorted(found, key=lambda each: (-each.ratio, each.dimension)))
