"""Guidance over the latents of a picture of one megapixel, and of four."""

from __future__ import annotations

from functools import partial

import torch

from ...kernels.guidance import combine
from . import Case, Maker, error, planned

CHANNELS = 64
SCALE = 4.0


def _make(tokens: int, device: torch.device, generator: torch.Generator) -> Case:
    positive, negative = torch.randn(2, 1, tokens, CHANNELS, device=device, generator=generator)
    implementation = planned("guidance", device)
    expected = _plain(positive.double(), negative.double())
    return Case(
        lambda: combine(positive, negative, SCALE, implementation=implementation),
        expected=expected,
        eager=lambda: _plain(positive, negative),
        limit="copy",
        work=3 * positive.nbytes,
        bound=2 * error(_plain(positive, negative), expected),
        implementation=implementation,
    )


def _plain(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    combined = negative + SCALE * (positive - negative)
    return combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


CASES: dict[str, Maker] = {f"{tokens}x{CHANNELS}": partial(_make, tokens) for tokens in (4096, 16384)}
"""The work of the limit is both predictions read and the result written."""
