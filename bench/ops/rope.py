"""Norm, rotation and joining of queries at the true shapes of Qwen-Image: text and image tokens, 24 heads of 128."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from ...kernels.rope import norm_rope_joint
from . import Case, Maker, error, planned

HEADS, WIDTH = 24, 128
EPS = 1e-6

Stream = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries [1, T, H, hd], weight [hd] and rotations [T, hd / 2]."""


def _make(text: int, image: int, device: torch.device, generator: torch.Generator) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    streams = [_stream(tokens, dtype, device, generator) for tokens in (text, image)]
    implementation = planned("rope", device, str(dtype).removeprefix("torch."))

    def call() -> torch.Tensor:
        joint = torch.empty(1, text + image, HEADS, WIDTH, dtype=dtype, device=device)
        for part, (x, weight, rotations) in zip((joint[:, :text], joint[:, text:]), streams, strict=True):
            norm_rope_joint(x, weight, rotations, part, eps=EPS, implementation=implementation)
        return joint

    def plain() -> torch.Tensor:
        return torch.cat([_plain(*stream) for stream in streams], dim=1)

    expected = torch.cat([_plain(x.double(), w.double(), r.to(torch.complex128)) for x, w, r in streams], dim=1)
    return Case(
        call,
        expected=expected,
        eager=plain,
        limit="copy",
        work=2 * expected.numel() * dtype.itemsize + sum(rotations.nbytes for *_, rotations in streams),
        bound=2 * error(plain(), expected),
        implementation=implementation,
    )


def _stream(tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Stream:
    x = torch.randn(1, tokens, HEADS, WIDTH, device=device, generator=generator)
    weight = torch.randn(WIDTH, device=device, generator=generator)
    angles = torch.rand(tokens, WIDTH // 2, device=device, generator=generator) * 100
    return x.to(dtype), weight.to(dtype), torch.polar(torch.ones_like(angles), angles)


def _plain(x: torch.Tensor, weight: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    y = F.rms_norm(x, (WIDTH,), weight, EPS)
    wide = y if y.dtype == torch.float64 else y.float()
    pairs = torch.view_as_complex(wide.reshape(*y.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotations[:, None]).flatten(3).type_as(y)


CASES: dict[str, Maker] = {
    f"{text}+{image}x{HEADS}x{WIDTH}": partial(_make, text, image) for text, image in ((250, 1024), (250, 8192))
}
"""The work of the limit is the queries read and written, and the rotations read."""
