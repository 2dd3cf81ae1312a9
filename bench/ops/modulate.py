"""LayerNorm with modulation, and the gated residual, at the true shapes of both streams of Qwen-Image."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from ...kernels import modulate
from . import Case, Maker, error, planned

DIM = 3072
EPS = 1e-6


def _norm(tokens: int, split: int | None, device: torch.device, generator: torch.Generator) -> Case:
    x, (shift, scale, *rest), implementation = _made(tokens, 4, device, generator)
    pair = None if split is None else (rest[0], rest[1])

    def plain(x: torch.Tensor) -> torch.Tensor:
        add, factor = _per_token(x, shift, rest[0], split), _per_token(x, scale, rest[1], split)
        return F.layer_norm(x, (DIM,), eps=EPS) * (1 + factor) + add

    expected = plain(x.double())
    return Case(
        lambda: modulate.modulate(x, shift, scale, pair, split, implementation=implementation),
        expected=expected,
        eager=lambda: plain(x),
        limit="copy",
        work=2 * x.nbytes,
        bound=2 * error(plain(x), expected),
        implementation=implementation,
    )


def _residual(tokens: int, split: int | None, device: torch.device, generator: torch.Generator) -> Case:
    x, (gate, rest), implementation = _made(tokens, 2, device, generator)
    update = torch.randn(x.shape, device=device, generator=generator).to(x.dtype)
    other = None if split is None else rest

    def plain(x: torch.Tensor) -> torch.Tensor:
        return x + _per_token(x, gate, rest, split) * update

    expected = plain(x.double())
    return Case(
        lambda: modulate.add_gated(x, update, gate, other, split, implementation=implementation),
        expected=expected,
        eager=lambda: plain(x),
        limit="copy",
        work=3 * x.nbytes,
        bound=2 * error(plain(x), expected),
        implementation=implementation,
    )


def _made(
    tokens: int, rows: int, device: torch.device, generator: torch.Generator
) -> tuple[torch.Tensor, list[torch.Tensor], str]:
    """States, modulation rows and the implementation, in the dtype that a plan takes on the device."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(1, tokens, DIM, device=device, generator=generator) * 2 + 0.5
    made = torch.randn(rows, DIM, device=device, generator=generator).to(dtype).unbind()
    return x.to(dtype), list(made), planned("modulate", device, str(dtype).removeprefix("torch."))


def _per_token(x: torch.Tensor, first: torch.Tensor, rest: torch.Tensor, split: int | None) -> torch.Tensor:
    """A row per token where there are two ranges, in the dtype of x, as plain programs have it."""
    if split is None:
        return first.to(x.dtype)
    index = (torch.arange(x.shape[1], device=x.device) < split)[None, :, None]
    return torch.where(index, first.to(x.dtype), rest.to(x.dtype))


CASES: dict[str, Maker] = {
    f"{name} {tokens}x{DIM}{' in two ranges' if split else ''}": partial(make, tokens, split)
    for name, make in (("norm", _norm), ("residual", _residual))
    for tokens, split in ((250, None), (8192, None), (8192, 4096))
}
"""The work of the limit is the states read and written, and the update read; a residual adds up over its calls."""
