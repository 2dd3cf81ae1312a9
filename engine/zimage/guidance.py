"""Guidance as Z-Image defines it: the scale is one less than that of ordinary classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...errors import RequestError


@dataclass(frozen=True)
class Guidance:
    """``p + g * (p - n)`` over the prompt's velocity p and the negative prompt's n, where ``g > 0``.

    Attributes:
        scale: g; at 0 the prompt runs alone.
        normalisation: k; where it is above 0 and ``|result| > k * |p|`` over the whole picture, the result is scaled
            to that length.
        truncation: model time 1 - sigma above which the prompt runs alone; at 1 never.

    Raises:
        RequestError: a value is out of range.

    Source: huggingface/diffusers@v0.42.1:src/diffusers/pipelines/z_image/pipeline_z_image.py
    """

    scale: float = 0.0
    normalisation: float = 0.0
    truncation: float = 1.0

    def __post_init__(self) -> None:
        for name in ("scale", "normalisation"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RequestError(f"guidance {name} must be 0 or more, got {getattr(self, name):g}")
        if not 0 <= self.truncation <= 1:
            raise RequestError(f"guidance truncation must be 0 to 1, got {self.truncation:g}")

    def is_on(self, timestep: float) -> bool:
        """The step at this model time needs both velocities."""
        return self.scale > 0 and timestep <= self.truncation

    def combine(self, velocities: Sequence[torch.Tensor]) -> torch.Tensor:
        """One velocity from the prompt's (alone, or with the negative prompt's), float32 of the same shape."""
        positive = velocities[0].float()
        if len(velocities) == 1:
            return positive
        combined = positive + self.scale * (positive - velocities[1].float())
        if not self.normalisation:
            return combined
        longest = self.normalisation * torch.linalg.vector_norm(positive)
        length = torch.linalg.vector_norm(combined)
        return combined * torch.where(length > longest, longest / length, torch.ones_like(length))
