"""Linear layer with e4m3 weights: stored in 8 bits everywhere, multiplied in 8 bits where the device can."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from ...errors import KernelError
from ..epilogue import Epilogue, flat, result_rows
from ..operands import check_operands, tokens_of
from ..quant import Tokens, check_implementation
from . import reference

__all__ = ["TOKEN_PATHS", "Fp8Path", "linear_fp8"]

Fp8Path = Literal["dequantise", "scaled_mm", "triton", "triton-w8a16"]

TOKEN_PATHS = ("scaled_mm", "triton")
"""Implementations that multiply by tokens of 8 bits."""


def linear_fp8(
    x: torch.Tensor | Tokens,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    implementation: str = "dequantise",
    *,
    epilogue: Epilogue | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ (weight * scale).T + bias``, by the implementation that the caller names and no other.

    They are different numerics, and a plan records which one a run has:

    - ``dequantise`` multiplies in the dtype of x by weights of that dtype, some rows at a time; the chunks depend on
      the shape alone. The definition; any device.
    - ``scaled_mm`` rounds each token to e4m3 with scale ``max|x| / 448`` and multiplies in 8 bits. x bfloat16, K and N
      multiples of 16; CUDA of capability 8.9 and later.
    - ``triton`` does the same for any shape, every 128 products summed in float32; CUDA of capability 8.9 and later.
    - ``triton-w8a16`` leaves x in bfloat16, decodes the weights to bfloat16, exactly, and multiplies the sums by their
      scale; CUDA of capability 8.0 and later.

    The two Triton kernels round once, after the epilogue; the others also before it.

    Args:
        x: [..., K], float32 or bfloat16; bfloat16 for ``scaled_mm`` and ``triton-w8a16``; for ``scaled_mm`` and
            ``triton`` also its tokens, quantised before.
        weight: float8_e4m3fn [N, K], contiguous.
        scale: float32 [N].
        bias: [N] in the dtype of x, or None.
        implementation: see above.
        epilogue: GELU, or gate and residual; None for neither.
        out: [..., N] in the dtype of x, which may be the residual; None for a new tensor.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        KernelError: wrong dtype, shape or device, nothing to multiply, or an implementation that this device or shape
            does not have; nothing is written.
    """
    check_implementation(implementation, get_args(Fp8Path))
    like = x.like if isinstance(x, Tokens) else x
    check_operands(like, weight, scale, bias, torch.float8_e4m3fn)
    if bias is not None and bias.dtype != like.dtype:
        raise KernelError(f"bias must be {like.dtype} [{len(scale)}] or None, got {bias.dtype} {list(bias.shape)}")
    finishing = flat(epilogue, like, len(weight))
    shape = (*like.shape[:-1], len(weight))
    rows = None if out is None else result_rows("out", out, shape, like)
    if implementation == "scaled_mm":
        _check_scaled_mm(like, weight)
        return reference.scaled_mm(tokens_of(x, "fp8", 1, "reference"), weight, scale, bias, epilogue, out)
    if implementation == "dequantise":
        return reference.dequantise(_plain(x, implementation), weight, scale, bias, epilogue, out)
    if implementation == "triton-w8a16" and like.dtype != torch.bfloat16:
        raise KernelError(f"x must be bfloat16 for triton-w8a16, got {like.dtype}")
    from . import triton

    made = torch.empty(shape, dtype=like.dtype, device=like.device) if out is None else out
    rows = made.view(-1, len(weight)) if rows is None else rows
    if implementation == "triton":
        tokens = tokens_of(x, "fp8", 1, "triton")
        triton.multiply(tokens.stored, tokens.scale, weight, scale, bias, finishing, rows)
    else:
        plain = _plain(x, implementation)
        triton.multiply_weights(plain.reshape(-1, plain.shape[-1]), weight, scale, bias, finishing, rows)
    return made


def _plain(x: torch.Tensor | Tokens, implementation: str) -> torch.Tensor:
    if isinstance(x, Tokens):
        raise KernelError(f"x must be a tensor for {implementation}, got tokens of 8 bits")
    return x


def _check_scaled_mm(x: torch.Tensor, weight: torch.Tensor) -> None:
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (8, 9):
        raise KernelError(
            f"device must be CUDA of capability 8.9 or later for scaled_mm, got {x.device}",
            hint='use implementation="dequantise"',
        )
    if x.dtype != torch.bfloat16 or weight.shape[0] % 16 or weight.shape[1] % 16:
        raise KernelError(
            f"x must be bfloat16 and weight multiples of 16 for scaled_mm, got {x.dtype} and {list(weight.shape)}"
        )
