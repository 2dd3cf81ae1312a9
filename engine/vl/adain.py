"""Text embeddings that take on the statistics of a picture's: AdaIN over rows, columns or all entries.

Source: Huang and Belongie, arXiv:1703.06868. Unlike in the code behind the guides, no row of a picture is left out and
the result is as long as the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .knobs import BlendKnobs, check_share
from .mix import FLOOR, Pictures, mix, moments, operands
from .resample import resample


def blend_adain(
    text: torch.Tensor, vl: Pictures, alpha: float = BlendKnobs.alpha, *, weights: Sequence[float] | None = None
) -> torch.Tensor:
    """``alpha ((E - m(E)) / s(E) s(V') + m(V')) + (1 - alpha) E``, m and s of each row over its columns.

    Args:
        text: [T, D].
        vl: [S, D], brought to T rows first; or several.
        alpha: share of the picture's statistics, 0 to 1.
        weights: of several pictures, whose statistics are pooled.

    Returns:
        [T, D] in the dtype of the text; at alpha 0 the text.

    Raises:
        RequestError: alpha or a weight is out of range, or the widths differ.
    """
    return _adain(text, vl, alpha, weights, dim=1)


def adain_global(
    text: torch.Tensor, vl: Pictures, alpha: float = BlendKnobs.alpha, *, weights: Sequence[float] | None = None
) -> torch.Tensor:
    """As :func:`blend_adain` with one m and one s over all entries of all rows."""
    return _adain(text, vl, alpha, weights, dim=None)


def blend_adain_per_dim(
    text: torch.Tensor, vl: Pictures, alpha: float = BlendKnobs.alpha, *, weights: Sequence[float] | None = None
) -> torch.Tensor:
    """As :func:`blend_adain` with m and s of each column: E's over its T rows, V's over all its S rows.

    Raises:
        RequestError: also where text or picture has a single row.
    """
    return _adain(text, vl, alpha, weights, dim=0)


def _adain(
    text: torch.Tensor, vl: Pictures, alpha: float, weights: Sequence[float] | None, dim: int | None
) -> torch.Tensor:
    check_share("alpha", alpha)
    pictures, rows = operands(vl, text, weights)
    if alpha == 0:
        return text.clone()
    if dim == 1:
        pictures = [(resample(picture, len(rows)), share) for picture, share in pictures]
    mean, std = moments(pictures, dim)
    own_mean, own_std = moments([(rows, 1.0)], dim)
    styled = (rows - own_mean) / own_std.clamp_min(FLOOR) * std + mean
    return mix(styled, rows, alpha).to(text.dtype)
