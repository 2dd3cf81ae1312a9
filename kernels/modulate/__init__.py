"""Adaptive LayerNorm and gated residual over two contiguous ranges of tokens."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from ...errors import KernelError

__all__ = ["IMPLEMENTATIONS", "MAX_COLUMNS", "add_gated", "modulate"]

IMPLEMENTATIONS = ("reference", "triton")
MAX_COLUMNS = 8192
"""A Triton program keeps a row in registers."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    rest: tuple[torch.Tensor, torch.Tensor] | None = None,
    split: int | None = None,
    *,
    eps: float = 1e-6,
    implementation: str = "reference",
) -> torch.Tensor:
    """``(x - mean) / sqrt(variance + eps) * (1 + scale) + shift`` with mean and variance over the channels.

    The first ``split`` tokens take ``shift`` and ``scale``, the others the pair in ``rest``, so no copy of the rows is
    made per token. NaN and infinity are not looked for: a token that has one becomes NaN as a whole.

    Args:
        x: [B, T, D], float32, bfloat16 or float16, any strides of B and T.
        shift: [D] in the dtype of x.
        scale: [D] in the dtype of x.
        rest: shift and scale of the tokens from ``split`` on; None where all tokens share one pair.
        split: how many tokens the first pair is for; given with ``rest``, else None.
        eps: added to the biased variance.
        implementation: ``reference`` (which rounds to the dtype of x after each of its steps) or ``triton`` (float32
            throughout, rounded once).

    Returns:
        [B, T, D] in the dtype of x, contiguous.

    Raises:
        KernelError: wrong dtype, shape, device or implementation, no tokens, one of ``rest`` and ``split`` alone.

    Source: huggingface/diffusers@v0.42.1:src/diffusers/models/transformers/transformer_qwenimage.py (_modulate), which
    selects a row per token instead.
    """
    _check_tokens(x, split, rest is None)
    _check_rows(x, {"shift": shift, "scale": scale})
    if rest is not None:
        _check_rows(x, {"rest shift": rest[0], "rest scale": rest[1]})
    return _twin(implementation).modulate(x, shift, scale, rest, split, eps)


def add_gated(
    x: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor,
    rest: torch.Tensor | None = None,
    split: int | None = None,
    *,
    implementation: str = "reference",
) -> torch.Tensor:
    """``x + gate * update``, written over x.

    Args:
        x: [B, T, D], float32, bfloat16 or float16, any strides of B and T; overwritten.
        update: [B, T, D] in the dtype of x, any strides of B and T.
        gate: [D] in the dtype of x, for the first ``split`` tokens.
        rest: gate of the tokens from ``split`` on; None where all tokens share one.
        split: given with ``rest``, else None.
        implementation: ``reference`` or ``triton``; both round once.

    Returns:
        x.

    Raises:
        KernelError: as :func:`modulate`, or an update of another shape; x is then as it was.
    """
    _check_tokens(x, split, rest is None)
    if update.shape != x.shape or update.dtype != x.dtype or update.device != x.device or update.stride(-1) != 1:
        raise KernelError(f"update must be {_say(x)} with dense channels, got {_say(update)}")
    _check_rows(x, {"gate": gate} if rest is None else {"gate": gate, "rest gate": rest})
    return _twin(implementation).add_gated(x, update, gate, rest, split)


def _twin(implementation: str) -> ModuleType:
    if implementation not in IMPLEMENTATIONS:
        raise KernelError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    return import_module(f".{implementation}", __name__)


def _check_tokens(x: torch.Tensor, split: int | None, whole: bool) -> None:
    if x.dtype not in _FLOATS or x.dim() != 3:
        raise KernelError(f"x must be float32, bfloat16 or float16 [batch, tokens, channels], got {_say(x)}")
    if not x.numel() or x.shape[-1] > MAX_COLUMNS:
        raise KernelError(f"x must have tokens and 1 to {MAX_COLUMNS} channels, got shape {list(x.shape)}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise KernelError(f"x must have dense channels, got stride {x.stride(-1)}", hint="pass x.contiguous()")
    if whole != (split is None):
        raise KernelError(f"rest and split must be given together, got {'split' if whole else 'rest'} alone")
    if split is not None and not 0 <= split <= x.shape[1]:
        raise KernelError(f"split must be 0 to {x.shape[1]} tokens, got {split}")


def _check_rows(x: torch.Tensor, rows: dict[str, torch.Tensor]) -> None:
    for name, row in rows.items():
        if row.shape != x.shape[-1:] or row.dtype != x.dtype or row.device != x.device:
            raise KernelError(f"{name} must be {x.dtype} [{x.shape[-1]}] on {x.device}, got {_say(row)}")
        if not row.is_contiguous():
            raise KernelError(f"{name} must be contiguous, got stride {row.stride(0)}")


def _say(x: torch.Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}"
