"""Linear layer with 8-bit weights and 8-bit activations (W8A8), summed exactly in int32."""

from __future__ import annotations

import torch

from ...errors import KernelError
from ..quant import check_group, check_stored
from . import reference

__all__ = ["MAX_COLUMNS", "linear_int8"]

MAX_COLUMNS = 1 << 17
"""Above it a sum of 127 x 127 might leave int32."""

_FLOATS = (torch.float32, torch.bfloat16)


def linear_int8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, group: int
) -> torch.Tensor:
    """``(q(x R) @ weight.T) * token_scale * scale + bias`` with q the rounding of each token to int8.

    Tokens are rotated in groups (R) and divided by their own ``max|x R| / 127`` in float32; the products are summed in
    int32, so no order of summation, no other token and no place of the weights can change a bit of the result.

    Args:
        x: [..., K], float32 or bfloat16.
        weight: int8 [N, K], rotated in the same groups.
        scale: float32 [N].
        bias: [N], float32 or bfloat16, or None.
        group: rotation group; 1 for weights that are not rotated.

    Returns:
        [..., N] in the dtype of x. A token that is not finite gives a row that is not finite.

    Raises:
        KernelError: wrong dtype, shape or group.
    """
    if x.dtype not in _FLOATS or not x.dim():
        raise KernelError(f"x must be float32 or bfloat16 [..., columns], got {x.dtype} {list(x.shape)}")
    check_stored(weight, scale, torch.int8)
    if x.shape[-1] != weight.shape[1] or weight.shape[1] > MAX_COLUMNS:
        raise KernelError(
            f"weight must have the {x.shape[-1]} columns of x, at most {MAX_COLUMNS}, got {weight.shape[1]}"
        )
    if bias is not None and (bias.dtype not in _FLOATS or bias.shape != scale.shape):
        raise KernelError(
            f"bias must be float32 or bfloat16 [{len(scale)}] or None, got {bias.dtype} {list(bias.shape)}"
        )
    check_group(x.shape[-1], group)
    return reference.linear_int8(x, weight, scale, bias, group)
