"""The definition in float32 torch."""

from __future__ import annotations

import torch


def combine(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """See ``kernels.guidance.combine``."""
    combined = negative + scale * (positive - negative)
    norm = combined.norm(dim=-1, keepdim=True)
    return combined * (positive.norm(dim=-1, keepdim=True) / norm.where(norm > 0, torch.ones_like(norm)))
