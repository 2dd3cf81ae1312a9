"""One row per program, read once and kept in registers; float32 inside, one rounding at the end."""

# ruff: noqa: PLR0913  (a kernel takes its pointers, sizes and strides one by one)
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...errors import KernelError
from ..ahead import Build

COUNTS = ("tokens", "split")
SIZES: frozenset[str] = frozenset((*COUNTS, "x_batch", "x_token", "update_batch", "update_token", "columns"))


@triton.jit(do_not_specialize=COUNTS)
def _modulate_kernel(
    x, shift, scale, rest_shift, rest_scale, out, x_batch, x_token, tokens, split, columns, eps, BLOCK: tl.constexpr
):
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < columns
    if token < split:
        add = tl.load(shift + channel, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(scale + channel, mask=inside, other=0.0).to(tl.float32)
    else:
        add = tl.load(rest_shift + channel, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(rest_scale + channel, mask=inside, other=0.0).to(tl.float32)
    row = batch * x_batch + token.to(tl.int64) * x_token
    value = tl.load(x + row + channel, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=0) / columns
    centred = tl.where(inside, value - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / columns
    y = centred / tl.sqrt_rn(variance + eps) * (1.0 + factor) + add
    to = (batch * tokens + token) * columns
    tl.store(out + to + channel, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("split",))
def _add_gated_kernel(
    x, update, gate, rest, x_batch, x_token, update_batch, update_token, split, columns, BLOCK: tl.constexpr
):
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < columns
    if token < split:
        factor = tl.load(gate + channel, mask=inside, other=0.0).to(tl.float32)
    else:
        factor = tl.load(rest + channel, mask=inside, other=0.0).to(tl.float32)
    at = x + batch * x_batch + token.to(tl.int64) * x_token + channel
    by = update + batch * update_batch + token.to(tl.int64) * update_token + channel
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    value = tl.fma(factor, tl.load(by, mask=inside, other=0.0).to(tl.float32), value)
    tl.store(at, value.to(x.dtype.element_ty), mask=inside)


def modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    rest: tuple[torch.Tensor, torch.Tensor] | None,
    split: int | None,
    eps: float,
) -> torch.Tensor:
    """See ``kernels.modulate.modulate``."""
    batch, tokens, columns = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    other = (shift, scale) if rest is None else rest
    block, warps = configuration(columns)
    check_device(x)
    with torch.cuda.device_of(x):
        _modulate_kernel[(tokens, batch)](
            x,
            shift,
            scale,
            *other,
            out,
            x.stride(0),
            x.stride(1),
            tokens,
            tokens if split is None else split,
            columns,
            eps,
            BLOCK=block,
            num_warps=warps,
            num_stages=1,
            enable_fp_fusion=False,
        )
    return out


def add_gated(
    x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor, rest: torch.Tensor | None, split: int | None
) -> torch.Tensor:
    """See ``kernels.modulate.add_gated``."""
    batch, tokens, columns = x.shape
    block, warps = configuration(columns)
    check_device(x)
    with torch.cuda.device_of(x):
        _add_gated_kernel[(tokens, batch)](
            x,
            update,
            gate,
            gate if rest is None else rest,
            x.stride(0),
            x.stride(1),
            update.stride(0),
            update.stride(1),
            tokens if split is None else split,
            columns,
            BLOCK=block,
            num_warps=warps,
            num_stages=1,
            enable_fp_fusion=False,
        )
    return x


def check_device(x: torch.Tensor) -> None:
    """Refuse what no card holds, unless Triton interprets.

    Raises:
        KernelError: the tensor is on another kind of device.
    """
    if not x.is_cuda and isinstance(_modulate_kernel, triton.JITFunction):
        raise KernelError(f"x must be on a CUDA device for triton, got {x.device}")


def configuration(columns: int) -> tuple[int, int]:
    """Block and warps for a row: the next power of two, 16 of its elements per thread and at most 16 warps."""
    block = max(32, triton.next_power_of_2(columns))
    return block, min(16, max(1, block // 512))


def builds() -> tuple[Build, ...]:
    """Blocks from the least to the widest; the model's in float32 and with strides of any size too."""
    made = []
    for columns, kind, even in (
        (256, "bf16", True),
        (1024, "bf16", True),
        (3072, "bf16", True),
        (3072, "bf16", False),
        (3072, "fp32", True),
        (8192, "bf16", True),
        (8192, "fp32", True),
    ):
        block, warps = configuration(columns)
        for name, kernel in (("modulate", _modulate_kernel), ("add_gated", _add_gated_kernel)):
            sizes = frozenset(kernel.arg_names) & SIZES
            signature = {argument: f"*{kind}" for argument in kernel.arg_names} | dict.fromkeys(sizes, "i32")
            signature |= {"BLOCK": "constexpr"} | ({"eps": "fp32"} if "eps" in signature else {})
            multiples = sizes - set(COUNTS) if even else frozenset()
            name = f"{name} {kind} {block}{'' if even else ' ragged'}"
            made.append(Build(name, kernel, signature, {"BLOCK": block}, warps, multiples=multiples))
    return tuple(made)
