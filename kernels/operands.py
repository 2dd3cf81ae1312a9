"""What the linear layers of 8-bit weights ask of their arguments."""

from __future__ import annotations

import torch

from ..errors import KernelError
from .quant import Tokens, check_stored, make_tokens

FLOATS = (torch.float32, torch.bfloat16)


def check_operands(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, stored: torch.dtype
) -> None:
    """Check x [..., K], weight [N, K] of the storage dtype, scale [N] and bias [N]: dtypes, shapes and one device.

    Raises:
        KernelError: one of them is something else, or there is nothing to multiply.
    """
    if x.dtype not in FLOATS or not x.numel():
        raise KernelError(f"x must be float32 or bfloat16 [..., columns], got {x.dtype} {list(x.shape)}")
    check_stored(weight, scale, stored)
    if x.shape[-1] != weight.shape[1]:
        raise KernelError(f"weight must have the {x.shape[-1]} columns of x, got {weight.shape[1]}")
    if not len(weight) or not weight.is_contiguous() or not scale.is_contiguous():
        raise KernelError(f"weight and scale must be contiguous and not empty, got strides {weight.stride()}")
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != scale.shape or not bias.is_contiguous()):
        raise KernelError(
            f"bias must be float32 or bfloat16 [{len(scale)}] or None, got {bias.dtype} {list(bias.shape)}"
        )
    for name, tensor in (("weight", weight), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise KernelError(f"{name} must be on {x.device} as x is, got {tensor.device}")


def tokens_of(x: torch.Tensor | Tokens, weight_format: str, group: int, implementation: str) -> Tokens:
    """The tokens of a layer: those given, which must fit its weights, or x quantised now.

    Raises:
        KernelError: tokens of another format or rotation, or as ``kernels.quant.quantise_tokens``.
    """
    if not isinstance(x, Tokens):
        return make_tokens(x, weight_format, group, implementation)
    made = "int8" if x.stored.dtype == torch.int8 else "fp8"
    if (made, x.group) != (weight_format, group):
        raise KernelError(f"tokens must be {weight_format} in groups of {group}, got {made} in groups of {x.group}")
    return x
