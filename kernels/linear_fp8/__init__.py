"""Linear layer with e4m3 weights: stored in 8 bits everywhere, multiplied in 8 bits where the device can."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from ...errors import KernelError
from ..quant import check_stored
from . import reference

__all__ = ["Fp8Path", "linear_fp8"]

Fp8Path = Literal["dequantise", "scaled_mm"]

_FLOATS = (torch.float32, torch.bfloat16)


def linear_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    path: Fp8Path = "dequantise",
) -> torch.Tensor:
    """``x @ (weight * scale).T + bias``, by the path that the caller names and no other.

    ``dequantise`` multiplies in the dtype of x by weights of that dtype, some rows at a time; the chunks depend on the
    shape alone. ``scaled_mm`` also rounds each token to e4m3 with scale ``max|x| / 448`` and multiplies in 8 bits.

    Args:
        x: [..., K], float32 or bfloat16; bfloat16 for ``scaled_mm``.
        weight: float8_e4m3fn [N, K].
        scale: float32 [N].
        bias: [N] in the dtype of x, or None.
        path: ``dequantise`` (any device) or ``scaled_mm`` (CUDA of capability 8.9 and later, K and N multiples of 16).

    Returns:
        [..., N] in the dtype of x.

    Raises:
        KernelError: wrong dtype or shape, or a path that this device or shape does not have.
    """
    if path not in get_args(Fp8Path):
        raise KernelError(f"path must be one of {', '.join(get_args(Fp8Path))}, got {path!r}")
    if x.dtype not in _FLOATS or not x.dim():
        raise KernelError(f"x must be float32 or bfloat16 [..., columns], got {x.dtype} {list(x.shape)}")
    check_stored(weight, scale, torch.float8_e4m3fn)
    if x.shape[-1] != weight.shape[1]:
        raise KernelError(f"weight must have the {x.shape[-1]} columns of x, got {weight.shape[1]}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != scale.shape):
        raise KernelError(f"bias must be {x.dtype} [{len(scale)}] or None, got {bias.dtype} {list(bias.shape)}")
    if path == "scaled_mm":
        _check_scaled_mm(x, weight)
    return reference.PATHS[path](x, weight, scale, bias)


def _check_scaled_mm(x: torch.Tensor, weight: torch.Tensor) -> None:
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (8, 9):
        raise KernelError(
            f"device must be CUDA of capability 8.9 or later for scaled_mm, got {x.device}",
            hint='use path="dequantise"',
        )
    if x.dtype != torch.bfloat16 or weight.shape[0] % 16 or weight.shape[1] % 16:
        raise KernelError(
            f"x must be bfloat16 and weight multiples of 16 for scaled_mm, got {x.dtype} and {list(weight.shape)}"
        )
