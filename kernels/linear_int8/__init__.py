"""Linear layer with 8-bit weights and 8-bit activations (W8A8), summed exactly in int32."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...errors import KernelError
from ..epilogue import Epilogue, flat, result_rows
from ..operands import check_operands, tokens_of
from ..quant import Tokens, check_group, check_implementation
from . import reference

__all__ = ["IMPLEMENTATIONS", "MAX_COLUMNS", "linear_int8"]

MAX_COLUMNS = 1 << 17
"""Above it a sum of 127 x 127 might leave int32."""

IMPLEMENTATIONS = ("reference", "int_mm", "triton")


def linear_int8(
    x: torch.Tensor | Tokens,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group: int,
    *,
    epilogue: Epilogue | None = None,
    out: torch.Tensor | None = None,
    implementation: str = "reference",
) -> torch.Tensor:
    """``(q(x R) @ weight.T) * token_scale * scale + bias`` with q the rounding of each token to int8.

    Tokens are rotated in groups (R) and divided by their own ``max|x R| / 127`` in float32; the products are summed in
    int32, so no order of summation, no other token and no place of the weights can change a bit of the result. The
    epilogue is float32 too, and the result is rounded once. Implementations have the same bits, but for GELU's.

    Args:
        x: [..., K], float32 or bfloat16; or its tokens, quantised before.
        weight: int8 [N, K], contiguous, rotated in the same groups.
        scale: float32 [N].
        bias: [N], float32 or bfloat16, or None.
        group: rotation group; 1 for weights that are not rotated.
        epilogue: GELU, or gate and residual; None for neither.
        out: [..., N] in the dtype of x, which may be the residual; None for a new tensor.
        implementation: ``reference`` (any device), ``int_mm`` (the same by ``torch._int_mm``) or ``triton`` (CUDA).

    Returns:
        [..., N] in the dtype of x. A token that is not finite gives a row that is not finite.

    Raises:
        KernelError: wrong dtype, shape, device or group, nothing to multiply, or an implementation that this device
            does not have; nothing is written.
    """
    check_implementation(implementation, IMPLEMENTATIONS)
    like = x.like if isinstance(x, Tokens) else x
    check_operands(like, weight, scale, bias, torch.int8)
    if weight.shape[1] > MAX_COLUMNS:
        raise KernelError(f"weight must have at most {MAX_COLUMNS} columns, got {weight.shape[1]}")
    check_group(weight.shape[1], group)
    finishing = flat(epilogue, like, len(weight))
    shape = (*like.shape[:-1], len(weight))
    rows = None if out is None else result_rows("out", out, shape, like)
    tokens = tokens_of(x, "int8", group, "triton" if implementation == "triton" else "reference")
    made = torch.empty(shape, dtype=like.dtype, device=like.device) if out is None else out
    rows = made.view(-1, len(weight)) if rows is None else rows
    _multiply(implementation)(tokens.stored, tokens.scale, weight, scale, bias, finishing, rows)
    return made


def _multiply(implementation: str) -> Callable[..., None]:
    if implementation == "triton":
        from . import triton

        return triton.multiply
    return reference.multiply if implementation == "reference" else reference.multiply_int_mm
