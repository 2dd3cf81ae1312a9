"""All heads of a token per program: one read of x, one read of the token's rotations, one write."""

# ruff: noqa: PLR0913  (a kernel takes its pointers, sizes and strides one by one)
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...errors import KernelError
from ..ahead import Build

ELEMENTS = 4096
"""Of a program at most; heads that do not fit go to the next one."""

SIZES: frozenset[str] = frozenset(
    ("x_batch", "x_token", "x_head", "out_batch", "out_token", "out_head", "heads", "width")
)


@triton.jit(do_not_specialize=("heads",))
def _norm_rope_kernel(
    x,
    weight,
    rotations,
    out,
    x_batch,
    x_token,
    x_head,
    out_batch,
    out_token,
    out_head,
    heads,
    width,
    eps,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, BLOCK)
    dense = channel < width
    inside = (head < heads)[:, None] & dense[None, :]
    at = x + batch * x_batch + token * x_token + head[:, None] * x_head + channel[None, :]
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    square = tl.sum(value * value, axis=1) / width
    factor = tl.load(weight + channel, mask=dense, other=0.0).to(tl.float32)
    y = value / tl.sqrt_rn(square + eps)[:, None] * factor[None, :]
    turn = tl.load(rotations + token * width + channel, mask=dense, other=0.0)
    cosine, sine = tl.split(tl.reshape(turn, (BLOCK // 2, 2)))
    real, imaginary = tl.split(tl.reshape(y, (HEADS, BLOCK // 2, 2)))
    turned_real = real * cosine[None, :] - imaginary * sine[None, :]
    turned_imaginary = real * sine[None, :] + imaginary * cosine[None, :]
    turned = tl.reshape(tl.join(turned_real, turned_imaginary), (HEADS, BLOCK))
    to = out + batch * out_batch + token * out_token + head[:, None] * out_head + channel[None, :]
    tl.store(to, turned.to(out.dtype.element_ty), mask=inside)


def norm_rope_joint(
    x: torch.Tensor, weight: torch.Tensor, rotations: torch.Tensor, out: torch.Tensor, eps: float
) -> torch.Tensor:
    """See ``kernels.rope.norm_rope_joint``."""
    batch, tokens, heads, width = x.shape
    rows, block, warps = configuration(heads, width)
    check_device(x)
    with torch.cuda.device_of(x):
        _norm_rope_kernel[(tokens, triton.cdiv(heads, rows), batch)](
            x,
            weight,
            torch.view_as_real(rotations),
            out,
            *x.stride()[:3],
            *out.stride()[:3],
            heads,
            width,
            eps,
            HEADS=rows,
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
    if not x.is_cuda and isinstance(_norm_rope_kernel, triton.JITFunction):
        raise KernelError(f"x must be on a CUDA device for triton, got {x.device}")


def configuration(heads: int, width: int) -> tuple[int, int, int]:
    """Heads, block and warps of a program: powers of two, 16 elements per thread."""
    block = triton.next_power_of_2(width)
    rows = min(triton.next_power_of_2(heads), ELEMENTS // block)
    return rows, block, min(8, max(1, rows * block // 512))


def builds() -> tuple[Build, ...]:
    """The model's heads in bfloat16 and float32, wider and narrower ones, and one whose strides are of any size."""
    made = []
    for heads, width, kind, even in (
        (24, 128, "bf16", True),
        (24, 128, "bf16", False),
        (24, 128, "fp32", True),
        (2, 16, "bf16", True),
        (30, 256, "fp32", True),
    ):
        rows, block, warps = configuration(heads, width)
        signature = {name: f"*{kind}" for name in _norm_rope_kernel.arg_names} | dict.fromkeys(SIZES, "i32")
        signature |= {"rotations": "*fp32", "eps": "fp32", "HEADS": "constexpr", "BLOCK": "constexpr"}
        constants = {"HEADS": rows, "BLOCK": block}
        multiples = SIZES - {"heads"} if even else frozenset()
        name = f"{kind} {rows}x{block}{'' if even else ' ragged'}"
        made.append(Build(name, _norm_rope_kernel, signature, constants, warps, multiples=multiples))
    return tuple(made)
