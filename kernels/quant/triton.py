"""Rows to one byte per element on a GPU: one row per program, rotated, measured and divided in registers.

Every float32 operation is that of ``reference.py`` in its order, so int8 and e4m3 bytes and scales have its bits.
"""

# ruff: noqa: PLR0913  (a kernel takes its pointers, sizes and strides one by one)
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..ahead import Build
from ..tiles import architecture

WHOLE_ROW = 16384
"""Longest row (padded to a power of two of groups) that is held in registers: it is read once, a longer one twice."""

PIECE = 8192
"""Elements of a longer row worked at a time."""

ELEMENTS_PER_WARP = 1024

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@triton.jit
def encode_e4m3(x):
    """The byte of float32 in e4m3: nearest, halves to even, at most 448; NaN is 0x7f.

    Integer operations alone, and one float addition that rounds the subnormals to multiples of 2^-9: capability 8.0 and
    8.6 have no instruction for it, and one way for all gives one result on all.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)
    normal = (size - (120 << 23) + 0x7FFFF + ((size >> 20) & 1)) >> 20
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
    byte = tl.where(size < (121 << 23), small, normal)
    byte = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7F, byte)
    return (byte | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode_e4m3(byte):
    """The float32 that a byte of e4m3 stands for: its bits moved to their places, times 2^120 for the other bias."""
    bits = byte.to(tl.int32)
    size = bits & 0x7F
    value = (size << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    whole = value.to(tl.int32, bitcast=True) | ((bits & 0x80) << 24)
    return tl.where(size == 0x7F, 0x7FC00000, whole).to(tl.float32, bitcast=True)


@triton.jit
def _stage(x, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """``y_j = S / 2 - x_{3 - j}`` over four numbers that lie STRIDE apart, S their sum."""
    OUTER: tl.constexpr = SIZE // (4 * STRIDE)
    last = tl.permute(tl.reshape(x, [OUTER, 4, STRIDE]), (0, 2, 1))
    even, odd = tl.split(tl.reshape(last, [OUTER, STRIDE, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    half = ((x0 + x1) + (x2 + x3)) * 0.5
    y = tl.join(tl.join(half - x3, half - x1), tl.join(half - x2, half - x0))
    return tl.reshape(tl.permute(tl.reshape(y, [OUTER, STRIDE, 4]), (0, 2, 1)), [SIZE])


@triton.jit
def _rotated(x, SIZE: tl.constexpr, GROUP: tl.constexpr):
    if GROUP >= 4:
        x = _stage(x, SIZE, 1)
    if GROUP >= 16:
        x = _stage(x, SIZE, 4)
    if GROUP >= 64:
        x = _stage(x, SIZE, 16)
    if GROUP >= 256:
        x = _stage(x, SIZE, 64)
    return x


@triton.jit
def _peak_bits(x):
    """Bits of ``max|x|``: those of floats without a sign are ordered as integers, and NaN is above all."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)


@triton.jit
def _step(peak_bits, limit, scale_ptr, row):
    """Store the scale of a row in its dtype; back comes what divides."""
    step = tl.div_rn(peak_bits.to(tl.float32, bitcast=True), limit).to(scale_ptr.dtype.element_ty).to(tl.float32)
    step = tl.where(step == 0.0, 1.0, step)
    tl.store(scale_ptr + row, step.to(scale_ptr.dtype.element_ty))
    return step


@triton.jit
def _stored(x, step, INT8: tl.constexpr):
    values = tl.div_rn(x, tl.zeros_like(x) + step)
    if INT8:
        whole = (values + 12582912.0) - 12582912.0
        stored = tl.minimum(tl.maximum(whole, -127.0), 127.0).to(tl.int8)
    else:
        stored = encode_e4m3(values)
    return stored


@triton.jit
def _quantise(
    x_ptr, stored_ptr, scale_ptr, row_stride, columns, limit,
    INT8: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SIZE)
    inside = place < columns
    x = tl.load(x_ptr + row * row_stride + place, mask=inside, other=0.0).to(tl.float32)
    if INT8:
        x = _rotated(x, SIZE, GROUP)
    step = _step(_peak_bits(x), limit, scale_ptr, row)
    tl.store(stored_ptr + row * columns + place, _stored(x, step, INT8), mask=inside)


@triton.jit
def _quantise_long(
    x_ptr, stored_ptr, scale_ptr, row_stride, columns, limit,
    INT8: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    peak = 0
    for start in range(0, columns, SIZE):
        place = start + tl.arange(0, SIZE)
        x = tl.load(x_ptr + row * row_stride + place, mask=place < columns, other=0.0).to(tl.float32)
        if INT8:
            x = _rotated(x, SIZE, GROUP)
        peak = tl.maximum(peak, _peak_bits(x))
    step = _step(peak, limit, scale_ptr, row)
    for start in range(0, columns, SIZE):
        place = start + tl.arange(0, SIZE)
        x = tl.load(x_ptr + row * row_stride + place, mask=place < columns, other=0.0).to(tl.float32)
        if INT8:
            x = _rotated(x, SIZE, GROUP)
        tl.store(stored_ptr + row * columns + place, _stored(x, step, INT8), mask=place < columns)


def quantise(
    x: torch.Tensor, stored_dtype: torch.dtype, group: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.quant.quantise_rows``."""
    rows, columns = x.shape
    architecture(x)
    x = x if x.stride(1) == 1 else x.contiguous()
    stored = torch.empty(x.shape, dtype=stored_dtype, device=x.device)
    scale = torch.empty(rows, dtype=scale_dtype, device=x.device)
    int8 = stored_dtype == torch.int8
    size, warps = shape(columns, group)
    kernel = _quantise if size >= columns else _quantise_long
    kernel[(rows,)](
        x,
        stored if int8 else stored.view(torch.uint8),
        scale,
        x.stride(0),
        columns,
        LIMITS[stored_dtype],
        INT8=int8,
        GROUP=group,
        SIZE=size,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return stored, scale


def shape(columns: int, group: int) -> tuple[int, int]:
    """Elements worked at a time and warps, from the columns alone."""
    size = group * triton.next_power_of_2(columns // group)
    size = PIECE if size > WHOLE_ROW else size
    return size, min(16, max(1, size // ELEMENTS_PER_WARP))


def builds() -> tuple[Build, ...]:
    """The widths of the models' layers, and rows that are read twice."""
    widths = {torch.int8: (3072, 12288, 18944), torch.float8_e4m3fn: (12288, 18944)}
    return tuple(_build(stored_dtype, columns) for stored_dtype, each in widths.items() for columns in each)


def _build(stored_dtype: torch.dtype, columns: int) -> Build:
    int8 = stored_dtype == torch.int8
    group = 256 if int8 else 1
    size, warps = shape(columns, group)
    return Build(
        name=f"{'int8' if int8 else 'fp8'}-{columns}",
        kernel=_quantise if size >= columns else _quantise_long,
        signature={
            "x_ptr": "*bf16",
            "stored_ptr": "*i8" if int8 else "*u8",
            "scale_ptr": "*fp32",
            "row_stride": "i32",
            "columns": "i32",
            "limit": "fp32",
            "INT8": "constexpr",
            "GROUP": "constexpr",
            "SIZE": "constexpr",
        },
        constants={"INT8": int8, "GROUP": group, "SIZE": size},
        warps=warps,
        multiples=frozenset({"row_stride", "columns"}),
    )
