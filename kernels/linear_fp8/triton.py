"""e4m3 weights in tensor cores: times e4m3 tokens, or decoded by integer operations and times bfloat16 tokens."""

# ruff: noqa: PLR0913  (a kernel takes its pointers, sizes and strides one by one)
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ...errors import KernelError
from .. import tiles
from ..ahead import Build
from ..epilogue import Flat
from ..quant.triton import decode_e4m3
from ..tiles import Tile

TILES = {
    "few": Tile(16, 32, 128, 4, 4),
    "small": Tile(64, 64, 128, 4, 4),
    "full": Tile(128, 128, 128, 8, 3),
}
"""Of e4m3 times e4m3: 128 products are summed in the tensor core's short format, and these sums in float32."""

WEIGHT_TILES = {
    "few": Tile(16, 32, 128, 4, 4),
    "small": Tile(64, 64, 64, 4, 4),
    "full": Tile(128, 128, 64, 8, 3),
}
"""Of bfloat16 times e4m3."""

OLDEST_FP8 = 89


@triton.jit
def _product(x, weight, sums, BK: tl.constexpr, DECODED: tl.constexpr):
    """``sums + x @ weight``; DECODED is the type that bytes are decoded to, None where both are e4m3."""
    if DECODED is None:
        sums = sums + tl.dot(x, weight, max_num_imprecise_acc=BK)
    else:
        sums = tl.dot(x.to(DECODED), decode_e4m3(weight).to(DECODED), sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=tiles.COUNTS)
def _linear_fp8(
    x_ptr, weight_ptr, token_scale_ptr, scale_ptr, bias_ptr, gate_ptr, gate_rest_ptr, residual_ptr, out_ptr,
    residual_stride, out_stride, split, period, M, N, K, x_stride,
    GELU: tl.constexpr, BAND: tl.constexpr, HALVES: tl.constexpr, DECODED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BN // 2 if HALVES else BN
    top, left = tiles.place(M, N, BM, BN, BAND)
    rows, columns, depth = top + tl.arange(0, BM), left + tl.arange(0, WIDTH), tl.arange(0, BK)
    x_at = x_ptr + (rows % M).to(tl.int64)[:, None] * x_stride + depth[None, :]
    weight_at = weight_ptr + (columns % N).to(tl.int64)[None, :] * K + depth[:, None]
    second_at = weight_ptr + ((columns + WIDTH) % N).to(tl.int64)[None, :] * K + depth[:, None]
    sums = tl.zeros((BM, WIDTH), dtype=tl.float32)
    second_sums = tl.zeros((BM, WIDTH), dtype=tl.float32)
    for _ in range(0, K, BK):
        x = tl.load(x_at)
        sums = _product(x, tl.load(weight_at), sums, BK, DECODED)
        if HALVES:
            second_sums = _product(x, tl.load(second_at), second_sums, BK, DECODED)
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
    """``triton``: e4m3 tokens times e4m3 weights."""
    architecture = tiles.architecture(tokens)
    if 0 < architecture < OLDEST_FP8:
        raise KernelError(
            f"device must be of capability 8.9 or later for triton, got {architecture / 10}",
            hint='use implementation="triton-w8a16"',
        )
    _launch(tokens, token_scale, weight, scale, bias, epilogue, out)


def multiply_weights(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: Flat,
    out: torch.Tensor,
) -> None:
    """``triton-w8a16``: bfloat16 tokens times decoded weights, whose scale multiplies the sums."""
    x = x if x.stride(1) == 1 else x.contiguous()
    _launch(x, None, weight.view(torch.uint8), scale, bias, epilogue, out)


def _launch(
    x: torch.Tensor,
    token_scale: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: Flat,
    out: torch.Tensor,
) -> None:
    rows, columns = len(x), len(weight)
    architecture = tiles.architecture(x)
    tile = tiles.pick(TILES if token_scale is not None else WEIGHT_TILES, rows, columns)
    x, weight = tiles.whole(x, tile.depth), tiles.whole(weight, tile.depth)
    _linear_fp8[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
        x,
        weight,
        token_scale,
        scale,
        bias,
        *tiles.finishing(epilogue, out),
        rows,
        columns,
        weight.shape[1],
        x.stride(0),
        GELU=epilogue.gelu,
        BAND=tiles.BAND,
        HALVES=tile.halves(architecture),
        DECODED=None if token_scale is not None else _decoded(architecture),
        **tile.constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )


def _decoded(architecture: int) -> tl.dtype:
    """bfloat16; float32, which holds the same numbers, under the interpreter, whose products know no bfloat16."""
    return tl.bfloat16 if architecture else tl.float32


def builds() -> tuple[Build, ...]:
    """Every tile of both, see ``kernels.tiles.builds``; GELU in one, its epilogue is the same in both."""
    scales = {"scale_ptr": "*fp32", "bias_ptr": "*bf16"}
    both = {"x_ptr": "*fp8e4nv", "weight_ptr": "*fp8e4nv", "token_scale_ptr": "*fp32", **scales}
    both["x_stride"] = "i32"
    weights = {"x_ptr": "*bf16", "weight_ptr": "*u8", "token_scale_ptr": "constexpr", **scales}
    weights["x_stride"] = "i32"
    made = tiles.builds(_linear_fp8, TILES, both, {"DECODED": None}, OLDEST_FP8)
    more = tiles.builds(_linear_fp8, WEIGHT_TILES, weights, {"DECODED": tl.bfloat16})
    return made + tuple(replace(build, name=f"w8a16-{build.name}") for build in more if not build.constants["GELU"])
