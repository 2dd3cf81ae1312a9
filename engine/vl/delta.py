"""Style as a difference: what a described picture has that a neutral one has not."""

from __future__ import annotations

import math

import torch

from ...errors import RequestError
from .condition import VLExtractionResult, total_std
from .knobs import BlendKnobs
from .mix import operands
from .resample import resample


def compute_style_delta(
    styled: torch.Tensor | VLExtractionResult,
    neutral: torch.Tensor | VLExtractionResult,
    *,
    normalize: bool = True,
) -> torch.Tensor:
    """``styled[:n] - neutral[:n]`` with n the shorter length, divided by its std.

    Args:
        styled: [S, D], or an extraction.
        neutral: [S', D], or an extraction of the same layer, text and selection.
        normalize: divide by the std over all entries, unless it is 0.

    Returns:
        [n, D] in float32 or better.

    Raises:
        RequestError: the widths differ, or the extractions are not alike.
    """
    if isinstance(styled, VLExtractionResult) and isinstance(neutral, VLExtractionResult):
        _check_alike(styled, neutral)
    first, second = (each.embeddings if isinstance(each, VLExtractionResult) else each for each in (styled, neutral))
    [(rows, _)], others = operands(first, second)
    length = min(len(rows), len(others))
    delta = rows[:length] - others[:length]
    size = total_std(delta)
    return delta / size if normalize and size else delta


def blend_with_style_delta(
    text: torch.Tensor, delta: torch.Tensor, alpha: float = BlendKnobs.alpha, *, scale_to_text: bool = True
) -> torch.Tensor:
    """``E + alpha D'``, D' the delta brought to the text's length and, unless it is 0, to the text's std.

    Args:
        text: [T, D].
        delta: [n, D] of :func:`compute_style_delta`.
        alpha: any finite number; below 0 takes the style away.
        scale_to_text: give the delta the std of the text.

    Returns:
        [T, D] in the dtype of the text; at alpha 0 the text.

    Raises:
        RequestError: alpha is not finite, or the widths differ.
    """
    if not math.isfinite(alpha):
        raise RequestError(f"alpha must be a finite number, got {alpha}")
    [(rows, _)], text_rows = operands(delta, text)
    if alpha == 0:
        return text.clone()
    change = resample(rows, len(text_rows))
    size = total_std(change)
    if scale_to_text and size:
        change = change * (total_std(text_rows) / size)
    return (text_rows + alpha * change).to(text.dtype)


def _check_alike(styled: VLExtractionResult, neutral: VLExtractionResult) -> None:
    for name in ("hidden_layer", "text_description", "system_prompt", "token_selection"):
        ours, theirs = getattr(styled, name), getattr(neutral, name)
        if ours != theirs:
            raise RequestError(f"{name} of styled and neutral must be the same, got {ours!r} and {theirs!r}")
