"""What was extracted and blended, in lines that a command can print."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .condition import VLExtractionResult, total_std
from .presets import EXPERIMENTAL
from .raw import IMAGE, RawExtraction

_SHOWN = 10


def report(found: RawExtraction | VLExtractionResult) -> list[str]:
    """Sizes and standard deviations before and after, masked columns, and what the user should hear."""
    return _raw_lines(found) if isinstance(found, RawExtraction) else _result_lines(found)


def blend_report(text: torch.Tensor, vl: torch.Tensor, blended: torch.Tensor) -> list[str]:
    """Rows and standard deviation of the text, the picture and what they became."""
    named = {"text": text, "picture": vl, "blended": blended}
    return [f"{name}: {len(rows)} rows, std {total_std(rows):.4f}" for name, rows in named.items()]


def likeness(text: torch.Tensor, vl: torch.Tensor) -> str:
    """How alike the columns of a picture and of a text are; one says little, both may be ruled by a few columns."""
    sides = [(rows.double().mean(dim=0), rows.double().std(dim=0)) for rows in (text, vl) if len(rows) > 1]
    if len(sides) < 2:
        return "columns beside the prompt's: too few rows to correlate"
    means, spreads = (float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(*sides, strict=True))
    return f"columns beside the prompt's: correlation of means {means:.4f}, of stds {spreads:.4f}"


def _raw_lines(raw: RawExtraction) -> list[str]:
    image = raw.kinds == IMAGE
    pictures = ", ".join(f"{rows}x{columns} patches" for _, rows, columns in raw.grid_thw.tolist()) or "none"
    lines = [
        f"variant: {raw.variant}",
        f"tokens: {len(image)}, of which {int(image.sum())} image tokens",
        f"pictures: {pictures}",
    ]
    for layer in sorted(raw.hidden, reverse=True):
        parts = {"all": raw.hidden[layer], "image": raw.hidden[layer][image], "text": raw.hidden[layer][~image]}
        words = ", ".join(f"{name} {total_std(rows):.4f}" for name, rows in parts.items() if len(rows))
        lines.append(f"layer {layer}: std of {words}")
    return lines


def _result_lines(result: VLExtractionResult) -> list[str]:
    lines = [
        EXPERIMENTAL,
        f"variant: {result.model_variant}",
        f"layer: {_layer_words(result)}",
        f"tokens: {result.num_tokens} ({result.token_selection}) of {len(result.input_token_ids)}",
        f"std before: {result.original_std:.4f}",
        f"std after: {result.scaled_std:.4f} ({result.normalization_mode}, factor {result.scale_factor:.4f})",
    ]
    if result.masked_dim_ratios is not None:
        lines.append(
            f"outliers above {result.outlier_threshold:g} ({result.outlier_masking}): "
            f"{_columns(result.masked_dim_ratios)}"
        )
    return [*lines, *(f"note: {note}" for note in result.notes)]


def _layer_words(result: VLExtractionResult) -> str:
    chosen = result.hidden_layer
    if isinstance(chosen, Mapping):
        return ", ".join(f"{layer} x {weight:g}" for layer, weight in chosen.items())
    return str(chosen)


def _columns(ratios: Mapping[int, float]) -> str:
    shown = [f"{column} ({ratio:.1f}x)" for column, ratio in list(ratios.items())[:_SHOWN]]
    more = len(ratios) - len(shown)
    return ", ".join([*shown, *([f"{more} more"] if more else [])]) or "none"
