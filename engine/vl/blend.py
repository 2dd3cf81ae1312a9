"""Picture embeddings and text embeddings made one. In every way, alpha 0 gives the text bit by bit.

Arguments stand as the names have always had them: ``interpolate`` and ``linear`` take (vl, text, alpha), ``adain`` and
``style_delta`` take (text, vl, alpha). All compute in float32 (float64 where given) and return the dtype and device of
the text. The picture's rows are brought to the text's T rows; ``linear`` alone cuts them off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...errors import RequestError
from .adain import adain_global, blend_adain, blend_adain_per_dim
from .delta import blend_with_style_delta
from .knobs import BlendKnobs, Curve, check_choice, check_share
from .mix import Pictures, mix, operands, resampled
from .resample import Resampling

logger = logging.getLogger(__name__)

Alphas = float | Sequence[float] | torch.Tensor

WEIGHT_SHARE = 0.8
"""How much of alpha the token of the largest weight loses."""


def blend_embeddings(vl: torch.Tensor, text: torch.Tensor, alpha: float = BlendKnobs.alpha) -> torch.Tensor:
    """``alpha V[:n] + (1 - alpha) E[:n]`` with n the shorter length: most of a picture is cut off, which is told.

    Use :func:`blend_interpolate` to bring the picture's rows to the text's length instead.

    Args:
        vl: [S, D].
        text: [T, D].
        alpha: share of the picture, 0 to 1.

    Returns:
        [n, D]; the text [T, D] at alpha 0 and the picture [S, D] at alpha 1.

    Raises:
        RequestError: alpha is out of range, or the widths differ.
    """
    check_share("alpha", alpha)
    [(rows, _)], text_rows = operands(vl, text)
    if alpha == 0:
        return text.clone()
    kept = min(len(rows), len(text_rows))
    if alpha == 1:
        if len(rows) != len(text_rows):
            logger.warning("linear blending at alpha 1 gives all %d picture rows, no text", len(rows))
        return rows.to(text.dtype, copy=True)
    if len(rows) > kept:
        logger.warning("linear blending keeps the first %d of %d picture rows; interpolate reads on", kept, len(rows))
    if len(text_rows) > kept:
        logger.warning("linear blending keeps the first %d of %d prompt rows; interpolate keeps all", kept, len(text))
    return mix(rows[:kept], text_rows[:kept], alpha).to(text.dtype)


def blend_interpolate(
    vl: Pictures,
    text: torch.Tensor,
    alpha: float = BlendKnobs.alpha,
    *,
    how: Resampling = "linear",
    weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """``alpha V' + (1 - alpha) E``, V' the picture's rows brought to the text's length; see ``resample``.

    Args:
        vl: [S, D], or several pictures.
        text: [T, D].
        alpha: share of the picture, 0 to 1.
        how: ``linear``, or ``area`` in which every row of the picture counts.
        weights: of several pictures: ``V' = sum w_k V'_k``.

    Returns:
        [T, D].

    Raises:
        RequestError: alpha or a weight is out of range, or the widths differ.
    """
    check_share("alpha", alpha)
    pictures, text_rows = operands(vl, text, weights)
    return mix(resampled(pictures, len(text_rows), how), text_rows, alpha).to(text.dtype)


def blend_style_only(
    vl: Pictures,
    text: torch.Tensor,
    alpha: float = BlendKnobs.alpha,
    *,
    columns: tuple[int, int] | None = None,
    weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """:func:`blend_interpolate` in some columns, the text in the others.

    Args:
        vl: [S, D], or several pictures.
        text: [T, D].
        alpha: share of the picture, 0 to 1.
        columns: first and end; None is the last third.
        weights: of several pictures.

    Raises:
        RequestError: alpha, a weight or the columns are out of range, or the widths differ.
    """
    width = text.shape[-1]
    first, end = (2 * width // 3, width) if columns is None else columns
    if not 0 <= first < end <= width:
        raise RequestError(f"columns must be first and end from 0 to {width}, got {columns}")
    made = text.clone()
    made[:, first:end] = blend_interpolate(vl, text, alpha, weights=weights)[:, first:end]
    return made


def blend_per_token(
    vl: Pictures, text: torch.Tensor, alphas: Alphas, *, weights: Sequence[float] | None = None
) -> torch.Tensor:
    """``A V' + (1 - A) E`` with one share per row of the text.

    Args:
        vl: [S, D], or several pictures.
        text: [T, D].
        alphas: T shares from 0 to 1, or one for all; :func:`graduated_alpha` makes curves.
        weights: of several pictures.

    Raises:
        RequestError: the shares are not T, or one is out of range; or the widths differ.
    """
    pictures, text_rows = operands(vl, text, weights)
    shares = _shares(alphas, len(text_rows))
    return mix(resampled(pictures, len(text_rows)), text_rows, shares).to(text.dtype)


def blend_attention_weighted(
    vl: Pictures,
    text: torch.Tensor,
    token_weights: Alphas,
    alpha: float = BlendKnobs.alpha,
    *,
    weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """:func:`blend_per_token` with ``A = alpha (1 - 0.8 w)``, w brought to 0..1: heavy tokens keep more of the text.

    Args:
        vl: [S, D], or several pictures.
        text: [T, D].
        token_weights: T finite numbers, for example the attention that each token of the prompt gets.
        alpha: share of the picture at the lightest token, 0 to 1.
        weights: of several pictures.

    Raises:
        RequestError: the token weights are not T finite numbers, or alpha is out of range.
    """
    check_share("alpha", alpha)
    given = torch.as_tensor(token_weights, dtype=torch.float64)
    if given.shape != text.shape[:1] or not bool(torch.isfinite(given).all()):
        raise RequestError(f"token weights must be {len(text)} finite numbers, got shape {list(given.shape)}")
    spread = (given - given.min()) / (given.max() - given.min() + 1e-8)
    return blend_per_token(vl, text, alpha * (1 - WEIGHT_SHARE * spread), weights=weights)


def graduated_alpha(length: int, start: float = 0.0, end: float = 0.5, curve: Curve = "linear") -> torch.Tensor:
    """Shares from the first row to the last: ``start + (end - start) c(t)``, t from 0 to 1.

    c is t (``linear``), t^2 (``ease_in``) or 1 - (1 - t)^2 (``ease_out``).

    Returns:
        float64 [length].

    Raises:
        RequestError: a share is out of range, no rows, or no such curve.
    """
    check_share("start of alpha", start)
    check_share("end of alpha", end)
    check_choice("alpha curve", curve, Curve)
    if length < 1:
        raise RequestError(f"rows must be at least 1, got {length}")
    t = torch.linspace(0, 1, length, dtype=torch.float64)
    shape = {"linear": t, "ease_in": t.square(), "ease_out": 1 - (1 - t).square()}[curve]
    return start + (end - start) * shape


def _shares(alphas: Alphas, length: int) -> torch.Tensor:
    shares = torch.as_tensor(alphas, dtype=torch.float64)
    if shares.dim() == 0:
        shares = shares.expand(length)
    if shares.shape != (length,) or not bool(((shares >= 0) & (shares <= 1)).all()):
        raise RequestError(f"alphas must be {length} shares from 0 to 1, one per row of the text, got {alphas}")
    return shares


def blend(
    vl: Pictures,
    text: torch.Tensor,
    knobs: BlendKnobs | None = None,
    *,
    weights: Sequence[float] | None = None,
    concat: bool = False,
    token_weights: Alphas | None = None,
) -> torch.Tensor:
    """One or several pictures with a text, as the knobs say.

    Args:
        vl: [S, D] or several; for ``style_delta`` the delta.
        text: [T, D].
        knobs: the settings; None takes the defaults.
        weights: of several pictures; in ``concat`` not allowed.
        concat: lay the pictures' rows one below the other first, instead of averaging what they become.
        token_weights: T numbers for ``attention_weighted``.

    Returns:
        [T, D] in the dtype of the text; ``linear`` may give another length.

    Raises:
        RequestError: something is out of range, or does not go together.
    """
    knobs = knobs or BlendKnobs()
    pictures = [vl] if isinstance(vl, torch.Tensor) else list(vl)
    if concat and weights is not None:
        raise RequestError("weights must be left out where pictures are concatenated, got both")
    if concat:
        operands(pictures, text)
        pictures = [torch.cat(pictures)]
    if knobs.alpha == 0 and knobs.alphas is None:
        operands(pictures, text, weights)
        return text.clone()
    made = _MODES[knobs.mode](pictures, text, knobs, {"weights": weights, "token_weights": token_weights})
    if knobs.protect_first_token:
        made[0] = text[0].to(made)
    return made


def _one(pictures: Sequence[torch.Tensor], mode: str) -> torch.Tensor:
    if len(pictures) != 1:
        raise RequestError(f"blend mode {mode} must have one picture, got {len(pictures)}", hint="use interpolate")
    return pictures[0]


def _per_token(vl: Pictures, text: torch.Tensor, knobs: BlendKnobs, weights: Any) -> torch.Tensor:
    shares: Alphas = graduated_alpha(len(text), knobs.start_alpha, knobs.alpha, knobs.curve)
    return blend_per_token(vl, text, shares if knobs.alphas is None else knobs.alphas, weights=weights)


def _attention_weighted(vl: Pictures, text: torch.Tensor, knobs: BlendKnobs, more: dict[str, Any]) -> torch.Tensor:
    if more["token_weights"] is None:
        raise RequestError("blend mode attention_weighted must have token weights, got none")
    return blend_attention_weighted(vl, text, more["token_weights"], knobs.alpha, weights=more["weights"])


_Mode = Callable[[Sequence[torch.Tensor], torch.Tensor, BlendKnobs, dict[str, Any]], torch.Tensor]
_MODES: dict[str, _Mode] = {
    "linear": lambda v, e, k, m: blend_embeddings(_one(v, k.mode), e, k.alpha),
    "interpolate": lambda v, e, k, m: blend_interpolate(v, e, k.alpha, weights=m["weights"]),
    "interpolate_area": lambda v, e, k, m: blend_interpolate(v, e, k.alpha, how="area", weights=m["weights"]),
    "adain": lambda v, e, k, m: blend_adain(e, v, k.alpha, weights=m["weights"]),
    "adain_global": lambda v, e, k, m: adain_global(e, v, k.alpha, weights=m["weights"]),
    "adain_per_dim": lambda v, e, k, m: blend_adain_per_dim(e, v, k.alpha, weights=m["weights"]),
    "style_delta": lambda v, e, k, m: blend_with_style_delta(e, _one(v, k.mode), k.alpha),
    "style_only": lambda v, e, k, m: blend_style_only(v, e, k.alpha, weights=m["weights"]),
    "per_token": lambda v, e, k, m: _per_token(v, e, k, m["weights"]),
    "attention_weighted": _attention_weighted,
}
