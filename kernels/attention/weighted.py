"""Attention in which keys weigh more or less, without a mask: parts over runs of keys, joined by their sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .libraries import LIBRARIES
from .sdpa import attend_with_sums as by_torch

Run = tuple[int, float | torch.Tensor]


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, runs: Sequence[Run], mode: str
) -> torch.Tensor:
    """See ``kernels.attention.attend_weighted``; the runs are checked and joined there."""
    out = total = None
    start = 0
    for count, gain in runs:
        part = slice(start, start + count)
        start += count
        made, sums = _part(query, keys[:, part], values[:, part], gain, mode)
        if out is None or total is None:
            out, total = made, sums
            continue
        share = torch.sigmoid(sums - total)
        out = torch.lerp(out.to(share.dtype), made.to(share.dtype), share[..., None])
        total = torch.logaddexp(total, sums)
    if out is None:
        raise ValueError("there are no runs")
    return out.to(query.dtype).flatten(2)


def joined(runs: Sequence[Run]) -> list[Run]:
    """The runs without empty ones, neighbours of one gain as one; only differences of gains matter."""
    made: list[Run] = []
    for count, gain in runs:
        before = made[-1][1] if made else None
        if isinstance(gain, float) and isinstance(before, float) and gain == before:
            made[-1] = (made[-1][0] + count, gain)
        elif count:
            made.append((count, gain))
    return made


def _part(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, gain: float | torch.Tensor, mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over some keys [B, T, H, hd], and the log of its sums with the gain in it [B, T, H]."""
    bias = gain if isinstance(gain, torch.Tensor) else None
    if mode == "math":
        from .reference import attend as by_definition

        made, sums = by_definition(query, keys, values, bias)
        made = made.unflatten(2, query.shape[2:])
    elif mode in LIBRARIES:
        from .libraries import attend_with_sums

        made, sums = attend_with_sums(query, keys, values, bias, mode)
    else:
        made, sums = by_torch(query, keys, values, bias, mode)
    return made, sums if isinstance(gain, torch.Tensor) else sums + gain
