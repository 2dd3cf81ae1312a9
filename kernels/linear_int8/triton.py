"""Int8 times int8 in tensor cores, summed in int32, with the epilogue in the same program."""

# ruff: noqa: PLR0913  (a kernel takes its pointers, sizes and strides one by one)
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import tiles
from ..ahead import Build
from ..epilogue import Flat
from ..tiles import Tile

TILES = {
    "few": Tile(16, 32, 256, 4, 4),
    "small": Tile(64, 64, 128, 4, 4),
    "full": Tile(128, 128, 64, 8, 4),
}
"""Sums of integers are exact, so a tile changes no bit."""


@triton.jit(do_not_specialize=tiles.COUNTS)
def _linear_int8(
    x_ptr, weight_ptr, token_scale_ptr, scale_ptr, bias_ptr, gate_ptr, gate_rest_ptr, residual_ptr, out_ptr,
    residual_stride, out_stride, split, period, M, N, K,
    GELU: tl.constexpr, BAND: tl.constexpr, HALVES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BN // 2 if HALVES else BN
    top, left = tiles.place(M, N, BM, BN, BAND)
    rows, columns, depth = top + tl.arange(0, BM), left + tl.arange(0, WIDTH), tl.arange(0, BK)
    x_at = x_ptr + (rows % M).to(tl.int64)[:, None] * K + depth[None, :]
    weight_at = weight_ptr + (columns % N).to(tl.int64)[None, :] * K + depth[:, None]
    second_at = weight_ptr + ((columns + WIDTH) % N).to(tl.int64)[None, :] * K + depth[:, None]
    sums = tl.zeros((BM, WIDTH), dtype=tl.int32)
    second_sums = tl.zeros((BM, WIDTH), dtype=tl.int32)
    for _ in range(0, K, BK):
        x = tl.load(x_at)
        sums = tl.dot(x, tl.load(weight_at), sums, out_dtype=tl.int32)
        if HALVES:
            second_sums = tl.dot(x, tl.load(second_at), second_sums, out_dtype=tl.int32)
        x_at += BK
        weight_at += BK
        second_at += BK
    tiles.finish(
        sums, rows, columns, M, N, token_scale_ptr, scale_ptr, bias_ptr, gate_ptr, gate_rest_ptr, residual_ptr, out_ptr,
        residual_stride, out_stride, split, period, GELU,
    )  # fmt: skip
    if HALVES:
        tiles.finish(
            second_sums, rows, columns + WIDTH, M, N, token_scale_ptr, scale_ptr, bias_ptr, gate_ptr, gate_rest_ptr,
            residual_ptr, out_ptr, residual_stride, out_stride, split, period, GELU,
        )  # fmt: skip


def multiply(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: Flat,
    out: torch.Tensor,
) -> None:
    """See ``kernels.linear_int8.linear_int8``; a fused multiply-add is forbidden, so the floats are the reference's."""
    rows, columns = len(tokens), len(weight)
    architecture = tiles.architecture(tokens)
    tile = tiles.pick(TILES, rows, columns)
    tokens, weight = tiles.whole(tokens, tile.depth), tiles.whole(weight, tile.depth)
    _linear_int8[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
        tokens,
        weight,
        token_scale,
        scale,
        bias,
        *tiles.finishing(epilogue, out),
        rows,
        columns,
        weight.shape[1],
        GELU=epilogue.gelu,
        BAND=tiles.BAND,
        HALVES=tile.halves(architecture),
        **tile.constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )


def builds() -> tuple[Build, ...]:
    """Every tile; see ``kernels.tiles.builds``."""
    operands = {
        "x_ptr": "*i8",
        "weight_ptr": "*i8",
        "token_scale_ptr": "*fp32",
        "scale_ptr": "*fp32",
        "bias_ptr": "*bf16",
    }
    return tiles.builds(_linear_int8, TILES, operands, {})
