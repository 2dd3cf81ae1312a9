"""Every setting between raw hidden states and a blended conditioning; the defaults stand here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ...errors import RequestError

Selection = Literal["all", "image", "image_no_markers", "text"]
Normalisation = Literal["global", "per_dim", "hybrid"]
OutlierMode = Literal["none", "zero", "clamp", "scale"]
Direction = Literal["high", "low", "both"]
ScaleStat = Literal["global", "robust"]
BlendMode = Literal[
    "interpolate",
    "interpolate_area",
    "linear",
    "adain",
    "adain_global",
    "adain_per_dim",
    "style_delta",
    "style_only",
    "per_token",
    "attention_weighted",
]
Curve = Literal["linear", "ease_in", "ease_out"]
Compression = Literal["truncate", "interpolate", "pool", "attention_pool"]
Layers = int | Mapping[int, float]
"""One hidden layer, or several with their weights."""

Z_IMAGE_WIDTH = 2560
"""Width of the conditioning that Z-Image takes (``cap_feat_dim``)."""

MAX_CAPTION_ROWS = 1504
"""Most conditioning rows that Z-Image takes: 1536 rotary places less one group of 32."""


@dataclass(frozen=True)
class Knobs:
    """From raw hidden states to embeddings.

    Attributes:
        hidden_layer: -1 (after the final norm) to -layers; or {layer: weight} for a weighted mean.
        token_selection: ``all``, ``image`` (with its markers), ``image_no_markers`` or ``text``.
        scale_to_text: normalise at all.
        target_std: std after ``global``; ``auto`` takes that of the text embeddings.
        normalization_mode: ``global``, ``per_dim`` or ``hybrid``.
        scale_stat: what ``global`` measures: the std over all entries, or the median row's root mean square.
        clip_sigma: clamp of ``per_dim`` in standard deviations; None is no clamp.
        hybrid_weight: share of ``per_dim`` in ``hybrid``.
        outlier_masking: ``none``, ``zero``, ``clamp`` or ``scale``, on image rows without markers.
        outlier_threshold: a column is an outlier where its ratio is larger than this.
        outlier_direction: ratio of std to reference (``high``), its inverse (``low``) or the larger of both.

    Raises:
        RequestError: a value is not one of these.
    """

    hidden_layer: Layers = -6
    token_selection: Selection = "all"
    scale_to_text: bool = True
    target_std: float | Literal["auto"] = 70.0
    normalization_mode: Normalisation = "global"
    scale_stat: ScaleStat = "global"
    clip_sigma: float | None = 3.0
    hybrid_weight: float = 0.5
    outlier_masking: OutlierMode = "none"
    outlier_threshold: float = 10.0
    outlier_direction: Direction = "high"

    def __post_init__(self) -> None:
        check_choice("token_selection", self.token_selection, Selection)
        check_choice("normalization_mode", self.normalization_mode, Normalisation)
        check_choice("scale_stat", self.scale_stat, ScaleStat)
        check_choice("outlier_masking", self.outlier_masking, OutlierMode)
        check_choice("outlier_direction", self.outlier_direction, Direction)
        if self.target_std != "auto":
            check_positive("target_std", self.target_std)
        if self.clip_sigma is not None:
            check_positive("clip_sigma", self.clip_sigma)
        check_positive("outlier_threshold", self.outlier_threshold)
        check_share("hybrid_weight", self.hybrid_weight)

    @property
    def layers(self) -> tuple[int, ...]:
        """The hidden layers that are needed."""
        return tuple(self.hidden_layer) if isinstance(self.hidden_layer, Mapping) else (self.hidden_layer,)


@dataclass(frozen=True)
class BlendKnobs:
    """From embeddings to what the transformer takes.

    Attributes:
        alpha: share of the picture, 0 to 1.
        mode: how.
        protect_first_token: keep the text's first row, the attention sink.
        start_alpha: share at the first token in ``per_token``; at the last it is alpha.
        curve: between the two: ``linear``, ``ease_in`` or ``ease_out``.
        alphas: one share per token in ``per_token``, instead of a curve.
        compression: how more rows than the transformer takes become as many; see ``compress_rows``.

    Raises:
        RequestError: a value is not one of these.
    """

    alpha: float = 0.3
    mode: BlendMode = "interpolate"
    protect_first_token: bool = False
    start_alpha: float = 0.0
    curve: Curve = "linear"
    alphas: tuple[float, ...] | None = None
    compression: Compression = "interpolate"

    def __post_init__(self) -> None:
        check_choice("blend mode", self.mode, BlendMode)
        check_choice("alpha curve", self.curve, Curve)
        check_choice("compression", self.compression, Compression)
        check_share("start_alpha", self.start_alpha)
        if self.mode != "style_delta":
            check_share("alpha", self.alpha)


def select_tokens(image_only: bool, text_only: bool, selection: Selection | None) -> Selection:
    """The selection that the two older switches or the one word name; ``all`` where nothing is said.

    Raises:
        RequestError: more than one is given.
    """
    given = [word for word, on in (("image", image_only), ("text", text_only)) if on]
    given += [] if selection is None else [selection]
    if len(given) > 1:
        raise RequestError(
            f"token selection must be given once, got {' and '.join(given)}",
            hint="use token_selection alone: all, image, image_no_markers or text",
        )
    return check_choice("token_selection", given[0], Selection) if given else Knobs.token_selection


def check_choice(subject: str, value: Any, choices: Any) -> Any:
    """The value, if it is one of a Literal's.

    Raises:
        RequestError: it is not.
    """
    if value not in get_args(choices):
        raise RequestError(f"{subject} must be one of {', '.join(get_args(choices))}, got {value!r}")
    return value


def check_positive(subject: str, value: Any) -> float:
    """The value, if it is a number above 0.

    Raises:
        RequestError: it is not.
    """
    if not _is_number(value) or not 0 < value < math.inf:
        raise RequestError(f"{subject} must be a number above 0, got {value!r}")
    return float(value)


def check_share(subject: str, value: Any) -> float:
    """The value, if it is a number from 0 to 1.

    Raises:
        RequestError: it is not.
    """
    if not _is_number(value) or not 0 <= value <= 1:
        raise RequestError(f"{subject} must be from 0 to 1, got {value!r}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
