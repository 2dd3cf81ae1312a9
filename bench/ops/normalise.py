"""Embeddings at their true shapes: 1504 image tokens of 2560 or 3584 columns, and the 220 of reference statistics."""

from __future__ import annotations

from functools import partial

import torch

from ...kernels import normalise
from . import Case, Maker, planned

BOUND = 1e-6
FLOOR = 1e-6
TARGET_STD, WEIGHT, THRESHOLD, CLIP_SIGMA = 70.0, 0.5, 10.0, 3.0


def _make(
    rows: int, columns: int, outlier_mode: str, mode: str, device: torch.device, generator: torch.Generator
) -> Case:
    mean, std = torch.randn(2, columns, device=device, generator=generator)
    std = std.abs() + 0.5
    x = torch.randn(rows, columns, device=device, generator=generator) * std + 1
    x[:, 396] *= 617.9
    x[:, 4] *= 42.0
    x = x.bfloat16()

    implementation = planned("normalise", device)

    def call() -> torch.Tensor:
        found, _ = normalise.mask_and_normalise(
            *(x, mean, std),
            threshold=THRESHOLD,
            outlier_mode=outlier_mode,
            mode=mode,
            target_std=TARGET_STD,
            clip_sigma=CLIP_SIGMA,
            weight=WEIGHT,
            implementation=implementation,
        )
        return found

    return Case(
        call,
        expected=_plain(x.double(), mean.double(), std.double(), outlier_mode, mode),
        eager=lambda: _plain(x.float(), mean, std, outlier_mode, mode),
        limit="copy",
        work=x.numel() * (2 * x.element_size() + mean.element_size()),
        bound=BOUND,
        implementation=implementation,
    )


def _plain(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, outlier_mode: str, mode: str) -> torch.Tensor:
    """As a torch program does it, in the dtype of its arguments."""
    if outlier_mode != "none":
        ratio = x.std(dim=0) / std.clamp_min(FLOOR)
        change = torch.zeros_like(ratio) if outlier_mode == "zero" else THRESHOLD / ratio
        x = x * torch.where(ratio > THRESHOLD, change, 1.0)
    scaled = x * (TARGET_STD / x.std()) if mode != "per_dim" else x
    if mode == "global":
        return scaled
    z = ((x - x.mean(dim=0)) / x.std(dim=0).clamp_min(FLOOR)).clamp(-CLIP_SIGMA, CLIP_SIGMA)
    moved = z * std.clamp_min(FLOOR) + mean
    return moved if mode == "per_dim" else WEIGHT * moved + (1 - WEIGHT) * scaled


CASES: dict[str, Maker] = {
    f"{rows}x{columns} {outlier_mode} {mode}": partial(_make, rows, columns, outlier_mode, mode)
    for rows, columns, outlier_mode, mode in (
        (220, 2560, "none", "per_dim"),
        (1504, 2560, "none", "global"),
        (1504, 2560, "zero", "per_dim"),
        (1504, 3584, "scale", "hybrid"),
    )
}
"""The work of the limit is x read twice, for what is subtracted is known only at its end, and the result written."""
