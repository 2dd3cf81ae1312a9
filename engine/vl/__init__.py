"""Pictures as conditioning for Z-Image: hidden states of Qwen3-VL, normalised, masked and blended with a prompt's."""

from __future__ import annotations

from .adain import adain_global, blend_adain, blend_adain_per_dim
from .blend import (
    blend,
    blend_attention_weighted,
    blend_embeddings,
    blend_interpolate,
    blend_per_token,
    blend_style_only,
    graduated_alpha,
)
from .condition import VLExtractionResult, blend_layers, condition
from .delta import blend_with_style_delta, compute_style_delta
from .encoder import VLEncoder
from .extractor import UnloadedError, VLEmbeddingExtractor
from .knobs import MAX_CAPTION_ROWS, BlendKnobs, Knobs
from .masking import region_tokens
from .outliers import get_outlier_dimensions, mask_outlier_dimensions
from .presets import ALPHA_EFFECTS, COMPLEXITY, EXPERIMENTAL, RECIPES, Recipe, recipe
from .raw import RawExtraction, Seen
from .refine import Round, refine, rounds
from .report import blend_report, likeness, report
from .resample import compress_rows, resample
from .stats import Statistics, compute_statistics, default_path, read_statistics, write_statistics

__all__ = [
    "ALPHA_EFFECTS",
    "COMPLEXITY",
    "EXPERIMENTAL",
    "MAX_CAPTION_ROWS",
    "RECIPES",
    "BlendKnobs",
    "Knobs",
    "RawExtraction",
    "Recipe",
    "Round",
    "Seen",
    "Statistics",
    "UnloadedError",
    "VLEmbeddingExtractor",
    "VLEncoder",
    "VLExtractionResult",
    "adain_global",
    "blend",
    "blend_adain",
    "blend_adain_per_dim",
    "blend_attention_weighted",
    "blend_embeddings",
    "blend_interpolate",
    "blend_layers",
    "blend_per_token",
    "blend_report",
    "blend_style_only",
    "blend_with_style_delta",
    "compress_rows",
    "compute_statistics",
    "compute_style_delta",
    "condition",
    "default_path",
    "get_outlier_dimensions",
    "graduated_alpha",
    "likeness",
    "mask_outlier_dimensions",
    "read_statistics",
    "recipe",
    "refine",
    "region_tokens",
    "report",
    "resample",
    "rounds",
    "write_statistics",
]
