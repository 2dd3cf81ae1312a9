"""RMS norm and rotary positions of queries or keys, written where attention reads them."""

from __future__ import annotations

from importlib import import_module

import torch

from ...errors import KernelError

__all__ = ["IMPLEMENTATIONS", "MAX_HEAD_DIM", "norm_rope_joint"]

IMPLEMENTATIONS = ("reference", "triton")
MAX_HEAD_DIM = 256

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def norm_rope_joint(
    x: torch.Tensor,
    weight: torch.Tensor,
    rotations: torch.Tensor,
    out: torch.Tensor,
    *,
    eps: float = 1e-6,
    implementation: str = "reference",
) -> torch.Tensor:
    """``out_2j + i out_2j+1 = (y_2j + i y_2j+1) * r_j`` with ``y = x / sqrt(mean(x^2) + eps) * weight`` of each head.

    The caller hands in its stream's slice of the joint buffer [B, text + image, H, hd], so that the streams are never
    concatenated. NaN and infinity are not looked for: a head that has one does not come out finite.

    Args:
        x: [B, T, H, hd], float32, bfloat16 or float16, any strides but the last; hd is even.
        weight: [hd] in the dtype of x.
        rotations: complex64 [T, hd / 2], contiguous.
        out: [B, T, H, hd] in the dtype of x, any strides but the last; x itself, or no memory of it; overwritten.
        eps: added to the mean square.
        implementation: ``reference`` (the norm is rounded to the dtype of x) or ``triton`` (rounded once, at the end).

    Returns:
        out.

    Raises:
        KernelError: wrong dtype, shape, device or implementation, or no tokens; nothing is written then.

    Source: huggingface/diffusers@v0.42.1:src/diffusers/models/transformers/transformer_qwenimage.py
    (apply_rotary_emb_qwen, QwenDoubleStreamAttnProcessor2_0), which concatenates afterwards.
    """
    _check(x, weight, rotations, out)
    if implementation not in IMPLEMENTATIONS:
        raise KernelError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    return import_module(f".{implementation}", __name__).norm_rope_joint(x, weight, rotations, out, eps)


def _check(x: torch.Tensor, weight: torch.Tensor, rotations: torch.Tensor, out: torch.Tensor) -> None:
    if x.dtype not in _FLOATS or x.dim() != 4:
        raise KernelError(f"x must be float32, bfloat16 or float16 [batch, tokens, heads, head_dim], got {_say(x)}")
    width = x.shape[-1]
    if not x.numel() or width % 2 or width > MAX_HEAD_DIM:
        raise KernelError(
            f"x must have tokens and an even head_dim of at most {MAX_HEAD_DIM}, got shape {list(x.shape)}"
        )
    if weight.shape != (width,) or weight.dtype != x.dtype or weight.device != x.device:
        raise KernelError(f"weight must be {x.dtype} [{width}] on {x.device}, got {_say(weight)}")
    wanted = (x.shape[1], width // 2)
    if rotations.shape != wanted or rotations.dtype != torch.complex64 or rotations.device != x.device:
        raise KernelError(f"rotations must be complex64 {list(wanted)} on {x.device}, got {_say(rotations)}")
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise KernelError(f"out must be {_say(x)}, got {_say(out)}")
    for name, tensor in (("x", x), ("weight", weight), ("out", out)):
        if tensor.stride(-1) != 1:
            raise KernelError(f"{name} must have a dense head_dim, got stride {tensor.stride(-1)}")
    if not rotations.is_contiguous() or rotations.is_conj():
        raise KernelError(f"rotations must be contiguous, got strides {rotations.stride()}")


def _say(x: torch.Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}"
