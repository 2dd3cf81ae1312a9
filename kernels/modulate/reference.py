"""The definition in torch, in the dtype of x; each range of tokens is worked as a slice."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    rest: tuple[torch.Tensor, torch.Tensor] | None,
    split: int | None,
    eps: float,
) -> torch.Tensor:
    """See ``kernels.modulate.modulate``."""
    y = F.layer_norm(x, x.shape[-1:], eps=eps)
    if rest is None:
        return y.mul_(1 + scale).add_(shift)
    y[:, :split].mul_(1 + scale).add_(shift)
    y[:, split:].mul_(1 + rest[1]).add_(rest[0])
    return y


def add_gated(
    x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor, rest: torch.Tensor | None, split: int | None
) -> torch.Tensor:
    """See ``kernels.modulate.add_gated``."""
    if rest is None:
        return x.addcmul_(update, gate)
    x[:, :split].addcmul_(update[:, :split], gate)
    x[:, split:].addcmul_(update[:, split:], rest)
    return x
