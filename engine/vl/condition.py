"""Raw hidden states and knobs to embeddings: a pure function that needs no model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import KernelError, RequestError
from ...kernels.normalise import normalise
from .knobs import Knobs, Layers, ScaleStat
from .outliers import mask_outlier_dimensions
from .raw import IMAGE, RawExtraction
from .stats import Statistics, require_statistics


@dataclass(frozen=True)
class VLExtractionResult:
    """Embeddings of pictures, on the CPU, and how they were made.

    Attributes:
        embeddings: [S', D]; float32 after a normalisation, else in the dtype of computation.
        num_tokens: S'.
        hidden_layer: the layer, or {layer: weight}.
        original_std: of the selected rows after masking, before normalisation.
        scaled_std: of the result.
        scale_factor: target over original std; exact for ``global``, nominal for the others; 1 without scaling.
        token_selection: which rows were kept.
        text_description: what was given with the pictures, or None.
        full_prompt_with_tokens: the whole chat.
        input_token_ids: of the whole chat.
        normalization_mode: as asked.
        system_prompt: or None.
        outlier_masking: as asked.
        outlier_threshold: as asked.
        masked_dimensions: columns by falling ratio; None without masking, empty where nothing was found.
        masked_dim_ratios: column to ratio before the mask, in the same order; None without masking.
        model_variant: ``instruct`` or ``thinking``.
        notes: what the user should hear of these knobs.
    """

    embeddings: torch.Tensor
    num_tokens: int
    hidden_layer: Layers
    original_std: float
    scaled_std: float
    scale_factor: float
    token_selection: str
    text_description: str | None
    full_prompt_with_tokens: str
    input_token_ids: tuple[int, ...]
    normalization_mode: str
    system_prompt: str | None
    outlier_masking: str
    outlier_threshold: float
    masked_dimensions: list[int] | None
    masked_dim_ratios: dict[int, float] | None
    model_variant: str
    notes: tuple[str, ...] = ()


def condition(
    raw: RawExtraction,
    knobs: Knobs | None = None,
    *,
    statistics: Statistics | str | Path | None = None,
    text_embeds: torch.Tensor | None = None,
    implementation: str = "reference",
) -> VLExtractionResult:
    """Pick the layer, mask image rows, select rows, normalise; in this order.

    Args:
        raw: hidden states of the layers that the knobs name.
        knobs: the settings; None takes the defaults.
        statistics: of the text encoder or their file, for ``per_dim``, ``hybrid`` and masking.
        text_embeds: [T, D] for ``target_std="auto"``.
        implementation: of the normalisation ops.

    Raises:
        RequestError: a layer is missing, statistics are missing or of another width, or there are too few rows.
    """
    knobs = knobs or Knobs()
    states = blend_layers(raw.hidden, knobs.hidden_layer)
    states, found = _mask(states, raw, knobs, statistics, implementation)
    kept = states[raw.rows(knobs.token_selection)]
    original = total_std(kept)
    target = target_of(knobs, text_embeds) if knobs.scale_to_text else None
    made = kept if target is None else scale_to_text(kept, target, knobs, statistics, implementation)
    return VLExtractionResult(
        embeddings=made,
        num_tokens=len(made),
        hidden_layer=knobs.hidden_layer,
        original_std=original,
        scaled_std=total_std(made),
        scale_factor=1.0 if target is None else target / spread(kept, knobs.scale_stat) if spread(kept) else 1.0,
        token_selection=knobs.token_selection,
        text_description=raw.text,
        full_prompt_with_tokens=raw.prompt,
        input_token_ids=tuple(raw.input_ids.tolist()),
        normalization_mode=knobs.normalization_mode,
        system_prompt=raw.system_prompt,
        outlier_masking=knobs.outlier_masking,
        outlier_threshold=knobs.outlier_threshold,
        masked_dimensions=None if found is None else list(found),
        masked_dim_ratios=found,
        model_variant=raw.variant,
        notes=advice(knobs),
    )


def blend_layers(hidden: Mapping[int, torch.Tensor], weights: Layers) -> torch.Tensor:
    """``sum_k w_k h[k]`` with the weights divided by their sum; a single layer is returned as it is.

    Layer -1 is after the final norm and has another scale than the others.

    Args:
        hidden: layer to [S, D].
        weights: layer to weight, or one layer.

    Returns:
        [S, D] in the dtype of the states.

    Raises:
        RequestError: no weights, one that is negative or not finite, a sum of 0, or a layer that is not there.
    """
    chosen = weights if isinstance(weights, Mapping) else {weights: 1.0}
    total = math.fsum(chosen.values())
    if not chosen or not all(0 <= weight < math.inf for weight in chosen.values()) or total <= 0:
        raise RequestError(f"layer weights must be 0 or more with a sum above 0, got {dict(chosen)}")
    missing = [layer for layer in chosen if layer not in hidden]
    if missing:
        raise RequestError(f"hidden layer must be one of those extracted ({sorted(hidden)}), got {missing[0]}")
    used = {layer: weight / total for layer, weight in chosen.items() if weight}
    if len(used) == 1:
        return hidden[next(iter(used))]
    first = hidden[next(iter(used))]
    made = sum(weight * hidden[layer].to(_wide(first)) for layer, weight in used.items())
    return torch.as_tensor(made).to(first.dtype)


def scale_to_text(
    rows: torch.Tensor,
    target: float,
    knobs: Knobs,
    statistics: Statistics | str | Path | None = None,
    implementation: str = "reference",
) -> torch.Tensor:
    """Normalise rows as the knobs say; float32 [S', D].

    Raises:
        RequestError: statistics are missing or of another width, or there is one row where columns are measured.
    """
    mean = std = None
    if knobs.normalization_mode != "global":
        reference = require_statistics(statistics, rows.shape[-1], f"normalization_mode {knobs.normalization_mode}")
        mean, std = reference.mean.to(rows.device), reference.std.to(rows.device)
        if len(rows) < 2:
            raise RequestError(
                f"normalization_mode {knobs.normalization_mode} must have at least 2 rows to measure columns, "
                f"got {len(rows)}",
                hint="use global, or select more tokens",
            )
    measured = spread(rows, knobs.scale_stat)
    aim = target if knobs.scale_stat == "global" or not measured else target * total_std(rows) / measured
    try:
        return normalise(
            rows,
            knobs.normalization_mode,
            mean=mean,
            std=std,
            target_std=aim,
            clip_sigma=knobs.clip_sigma,
            weight=knobs.hybrid_weight,
            implementation=implementation,
        )
    except KernelError as error:
        raise RequestError(f"embeddings must be normalisable: {error.message}") from error


def target_of(knobs: Knobs, text_embeds: torch.Tensor | None) -> float:
    """The number that ``target_std`` stands for.

    Raises:
        RequestError: it is ``auto`` and there are no text embeddings.
    """
    if knobs.target_std != "auto":
        return float(knobs.target_std)
    if text_embeds is None:
        raise RequestError("target_std auto must have text embeddings to measure, got none", hint="give a number")
    return spread(text_embeds, knobs.scale_stat)


def total_std(rows: torch.Tensor) -> float:
    """Standard deviation over all entries, dividing by N - 1, in float64; 0 for fewer than two."""
    return float(rows.double().std()) if rows.numel() > 1 else 0.0


def spread(rows: torch.Tensor, stat: ScaleStat = "global") -> float:
    """What ``global`` scaling measures: the std over all entries, or the median row's root mean square.

    The std of a text is nearly that of its first token, the attention sink; the median row does not feel it.
    """
    if stat == "global":
        return total_std(rows)
    return float(rows.double().square().mean(dim=-1).sqrt().median())


def advice(knobs: Knobs) -> tuple[str, ...]:
    """What the user should hear of settings that do nothing, or less than they seem to."""
    notes: list[str] = []
    image_only = knobs.token_selection.startswith("image")
    masked = knobs.outlier_masking in ("clamp", "scale")
    if image_only and knobs.scale_to_text and knobs.normalization_mode == "global":
        notes.append("image rows lack the text's sink token, so their std says little; per_dim suits them better")
    if image_only and knobs.scale_to_text and knobs.normalization_mode == "per_dim" and masked:
        notes.append(f"outlier_masking {knobs.outlier_masking} before per_dim changes nothing")
    if knobs.token_selection == "text":
        notes.append("text rows carry the picture through attention only; the picture's influence is weak")
    if isinstance(knobs.hidden_layer, Mapping) and -1 in knobs.hidden_layer and len(knobs.hidden_layer) > 1:
        notes.append("layer -1 is after the final norm; its scale differs from that of the other layers")
    return tuple(notes)


def _wide(states: torch.Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


def _mask(
    states: torch.Tensor,
    raw: RawExtraction,
    knobs: Knobs,
    statistics: Statistics | str | Path | None,
    implementation: str,
) -> tuple[torch.Tensor, dict[int, float] | None]:
    """The states with masked image rows, and column to ratio by falling ratio; None without masking."""
    if knobs.outlier_masking == "none":
        return states, None
    image = raw.kinds == IMAGE
    if int(image.sum()) < 2:
        raise RequestError(f"outlier_masking must have at least 2 image tokens to measure, got {int(image.sum())}")
    rows, info = mask_outlier_dimensions(
        states[image],
        knobs.outlier_threshold,
        knobs.outlier_masking,
        direction=knobs.outlier_direction,
        statistics=statistics,
        implementation=implementation,
    )
    masked = states.clone()
    masked[image] = rows
    return masked, dict(sorted(info["ratios"].items(), key=lambda item: (-item[1], item[0])))
