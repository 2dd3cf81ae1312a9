"""A few tokens per program: both predictions are read once and the result is written once."""

# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...errors import KernelError
from ..ahead import Build

ELEMENTS = 1024
"""Of a program, where a token has no more of them."""


@triton.jit(do_not_specialize=("tokens", "scale"))
def _combine_kernel(positive, negative, out, tokens, channels, scale, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (channel < channels)[None, :]
    at = token[:, None] * channels + channel[None, :]
    p = tl.load(positive + at, mask=inside, other=0.0)
    n = tl.load(negative + at, mask=inside, other=0.0)
    combined = n + scale * (p - n)
    norm = tl.sqrt_rn(tl.sum(combined * combined, axis=1))
    wanted = tl.sqrt_rn(tl.sum(p * p, axis=1))
    factor = wanted / tl.where(norm > 0, norm, 1.0)
    tl.store(out + at, combined * factor[:, None], mask=inside)


def combine(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """See ``kernels.guidance.combine``."""
    channels = positive.shape[-1]
    tokens = positive.numel() // channels
    out = torch.empty(positive.shape, dtype=positive.dtype, device=positive.device)
    rows, block, warps = configuration(channels)
    check_device(positive)
    with torch.cuda.device_of(positive):
        _combine_kernel[(triton.cdiv(tokens, rows),)](
            positive.contiguous(),
            negative.contiguous(),
            out,
            tokens,
            channels,
            float(scale),
            TOKENS=rows,
            BLOCK=block,
            num_warps=warps,
            num_stages=1,
            enable_fp_fusion=False,
        )
    return out


def check_device(x: torch.Tensor) -> None:
    """Refuse what no card holds, unless Triton interprets.

    Raises:
        KernelError: the tensor is on another kind of device.
    """
    if not x.is_cuda and isinstance(_combine_kernel, triton.JITFunction):
        raise KernelError(f"positive must be on a CUDA device for triton, got {x.device}")


def configuration(channels: int) -> tuple[int, int, int]:
    """Tokens, block and warps of a program: powers of two, 8 elements per thread until 16 warps are reached."""
    block = triton.next_power_of_2(channels)
    rows = max(1, ELEMENTS // block)
    return rows, block, min(16, max(4, block // 256))


def builds() -> tuple[Build, ...]:
    """The latents' channels, an odd number of them, and the most."""
    made = []
    for channels in (64, 63, 8192):
        rows, block, warps = configuration(channels)
        signature = dict.fromkeys(("positive", "negative", "out"), "*fp32") | {"tokens": "i32", "channels": "i32"}
        signature |= {"scale": "fp32", "TOKENS": "constexpr", "BLOCK": "constexpr"}
        multiples = frozenset() if channels % 16 else frozenset({"channels"})
        constants = {"TOKENS": rows, "BLOCK": block}
        name = f"{rows}x{channels}"
        made.append(Build(name, _combine_kernel, signature, constants, warps, multiples=multiples))
    return tuple(made)
