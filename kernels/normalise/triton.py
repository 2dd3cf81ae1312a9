"""Two passes over x: one for the statistics of its columns, one that masks and moves them.

Between the passes a launch over the columns joins what the row tiles found, takes the ratios and decides what each
column is multiplied by. A mask only multiplies columns, so the statistics after it follow from those before: the mean
and the deviation of a column times its factor. Sums go in an order that the shape alone fixes.
"""
# ruff: noqa: PLR0913  (a kernel takes its pointers, sizes and strides one by one)
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import KernelError
from ..ahead import Build
from . import reference

PART = {"ROWS": 64, "COLUMNS": 128}
PART_WARPS = 8
JOIN = {"ROWS": PART["ROWS"], "TILES": 16, "COLUMNS": 32}
JOIN_WARPS = 4
MOVE = {"ROWS": 16, "COLUMNS": 256, "BLOCK_COLUMNS": JOIN["COLUMNS"]}
MOVE_WARPS = 16

_FLOOR = tl.constexpr(reference.FLOOR)
_INFINITY = tl.constexpr(math.inf)
_NAN = tl.constexpr(math.nan)
_KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _deviation(squares, count):
    """``sqrt(squares / (count - 1))``; NaN where the squares left float32, 0 for one value."""
    variance = tl.div_rn(squares, tl.maximum(count - 1, 1.0))
    return tl.sqrt_rn(tl.where(variance < _INFINITY, variance, _NAN))


@triton.jit
def _between(mean, least, most):
    """A mean lies between the least and the greatest value: of equal values it is that value, whatever was rounded."""
    return tl.minimum(tl.maximum(mean, least, propagate_nan=_KEEP_NAN), most, propagate_nan=_KEEP_NAN)


@triton.jit
def _places(x, x_row, x_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the values of this program's tile lie; the distance to its corner alone may need 64 bits."""
    corner = tl.program_id(1).to(tl.int64) * ROWS * x_row + tl.program_id(0).to(tl.int64) * COLUMNS * x_column
    return x + corner + (tl.arange(0, ROWS)[:, None] * x_row + tl.arange(0, COLUMNS)[None, :] * x_column)


@triton.jit(do_not_specialize=["rows"])
def _part(x, means, squares, rows, columns, x_row, x_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean of each column over a tile of rows, and the sum of the squares around it."""
    tile = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = ((tile * ROWS + tl.arange(0, ROWS)) < rows)[:, None]
    inside = known & (column < columns)[None, :]
    values = tl.load(_places(x, x_row, x_column, ROWS, COLUMNS), mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(rows - tile * ROWS, ROWS) * 1.0
    mean = tl.div_rn(tl.sum(values, axis=0), count)
    least = tl.min(tl.where(known, values, _INFINITY), axis=0)
    mean = _between(mean, least, tl.max(tl.where(known, values, -_INFINITY), axis=0))
    apart = tl.where(inside, values - mean[None, :], 0.0)
    tl.store(means + tile * columns + column, mean, mask=column < columns)
    tl.store(squares + tile * columns + column, tl.sum(apart * apart, axis=0), mask=column < columns)


@triton.jit
def _tile(values, first, tiles, column, columns, TILES: tl.constexpr):
    """What some row tiles found, [TILES, COLUMNS]; 0 beyond the last."""
    tile = first + tl.arange(0, TILES)
    inside = (tile < tiles)[:, None] & (column < columns)[None, :]
    return tl.load(values + tile[:, None] * columns + column[None, :], mask=inside, other=0.0)


@triton.jit
def _counts(first, rows, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Rows of some row tiles, [TILES, 1]; 0 beyond the last."""
    tile = first + tl.arange(0, TILES)
    return (tl.minimum(tl.maximum(rows - tile * ROWS, 0), ROWS) * 1.0)[:, None]


@triton.jit
def _over_tiles(means, squares, rows, columns, column, ROWS: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean of each column over all rows, and the sum of the squares around it."""
    tiles = tl.cdiv(rows, ROWS)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    least = tl.full([COLUMNS], _INFINITY, tl.float32)
    most = tl.full([COLUMNS], -_INFINITY, tl.float32)
    for first in range(0, tiles, TILES):
        found = _tile(means, first, tiles, column, columns, TILES)
        count = _counts(first, rows, ROWS, TILES)
        total += tl.sum(found * count, axis=0)
        least = tl.minimum(least, tl.min(tl.where(count > 0, found, _INFINITY), axis=0))
        most = tl.maximum(most, tl.max(tl.where(count > 0, found, -_INFINITY), axis=0))
    mean = _between(tl.div_rn(total, rows * 1.0), least, most)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in range(0, tiles, TILES):
        apart = _tile(means, first, tiles, column, columns, TILES) - mean[None, :]
        around = _tile(squares, first, tiles, column, columns, TILES)
        total += tl.sum(around + apart * apart * _counts(first, rows, ROWS, TILES), axis=0)
    return mean, total


@triton.jit
def _ratio(own, std, DIRECTION: tl.constexpr):
    """How far the spread of a column is from the reference's."""
    high = tl.div_rn(own, tl.maximum(std, _FLOOR, propagate_nan=_KEEP_NAN))
    low = tl.div_rn(std, tl.maximum(own, _FLOOR, propagate_nan=_KEEP_NAN))
    if DIRECTION == "high":
        ratio = high
    elif DIRECTION == "low":
        ratio = low
    else:
        ratio = tl.maximum(high, low, propagate_nan=_KEEP_NAN)
    return ratio


@triton.jit
def _factor(own, std, ratio, threshold, OUTLIERS: tl.constexpr, DIRECTION: tl.constexpr):
    """What a column is multiplied by; 1 where it stays."""
    if OUTLIERS == "none":
        change = tl.full(own.shape, 1.0, tl.float32)
    elif OUTLIERS == "zero":
        change = tl.full(own.shape, 0.0, tl.float32)
    else:
        least = std if OUTLIERS == "clamp" else tl.maximum(std, _FLOOR, propagate_nan=_KEEP_NAN)
        change = tl.div_rn(threshold * least, tl.where(own == 0, 1.0, own))
        if DIRECTION != "high":
            grown = tl.where(own == 0, 1.0, tl.div_rn(ratio, threshold))
            change = tl.where((std > own) | (DIRECTION == "low"), grown, change)
    return tl.where(ratio > threshold, change, 1.0)


@triton.jit(do_not_specialize=["rows"])
def _join(
    means,
    squares,
    std,
    stats,
    blocks,
    rows,
    columns,
    threshold,
    OUTLIERS: tl.constexpr,
    DIRECTION: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Statistics, ratio and factor of each column, and the statistics of each block of columns after the mask."""
    block = tl.program_id(0)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    mean, around = _over_tiles(means, squares, rows, columns, column, ROWS, TILES, COLUMNS)
    own = _deviation(around, rows * 1.0)
    factor = tl.full(own.shape, 1.0, tl.float32)
    tl.store(stats + column, mean, mask=inside)
    tl.store(stats + columns + column, own, mask=inside)
    if OUTLIERS != "off":
        wanted = tl.load(std + column, mask=inside, other=1.0)
        ratio = _ratio(own, wanted, DIRECTION)
        factor = _factor(own, wanted, ratio, threshold, OUTLIERS, DIRECTION)
        tl.store(stats + 3 * columns + column, ratio, mask=inside)
    tl.store(stats + 2 * columns + column, factor, mask=inside)
    mean *= factor
    count = tl.minimum(columns - block * COLUMNS, COLUMNS) * 1.0
    middle = tl.div_rn(tl.sum(tl.where(inside, mean, 0.0)), count)
    least = tl.min(tl.where(inside, mean, _INFINITY))
    middle = _between(middle, least, tl.max(tl.where(inside, mean, -_INFINITY)))
    apart = mean - middle
    around = around * factor * factor + apart * apart * rows
    tl.store(blocks + block, middle)
    tl.store(blocks + tl.num_programs(0) + block, tl.sum(tl.where(inside, around, 0.0)))


@triton.jit
def _spread(blocks, rows, columns, BLOCKS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Standard deviation over all entries."""
    block = tl.arange(0, BLOCKS)
    inside = block * BLOCK_COLUMNS < columns
    middle = tl.load(blocks + block, mask=inside, other=0.0)
    around = tl.load(blocks + tl.cdiv(columns, BLOCK_COLUMNS) + block, mask=inside, other=0.0)
    count = tl.maximum(tl.minimum(columns - block * BLOCK_COLUMNS, BLOCK_COLUMNS), 0) * (rows * 1.0)
    total = (rows * 1.0) * columns
    mean = tl.div_rn(tl.sum(middle * count), total)
    least = tl.min(tl.where(inside, middle, _INFINITY))
    mean = _between(mean, least, tl.max(tl.where(inside, middle, -_INFINITY)))
    apart = middle - mean
    return _deviation(tl.sum(around + apart * apart * count), total)


@triton.jit(do_not_specialize=["rows"])
def _move(
    x,
    out,
    stats,
    blocks,
    mean,
    std,
    rows,
    columns,
    x_row,
    x_column,
    target_std,
    clip_sigma,
    weight,
    rest,
    MODE: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Mask a tile (``MODE == "mask"``), or mask and normalise it."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < columns
    inside = ((tl.program_id(1) * ROWS + tl.arange(0, ROWS)) < rows)[:, None] & known[None, :]
    values = tl.load(_places(x, x_row, x_column, ROWS, COLUMNS), mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(stats + 2 * columns + column, mask=known, other=1.0)[None, :]
    if MODE == "per_dim" or MODE == "hybrid":
        own_mean = tl.load(stats + column, mask=known, other=0.0)[None, :]
        own_std = tl.load(stats + columns + column, mask=known, other=1.0)[None, :]
        wanted = tl.load(std + column, mask=known, other=1.0)[None, :]
        z = tl.div_rn((values - own_mean) * factor, tl.maximum(own_std * factor, _FLOOR, propagate_nan=_KEEP_NAN))
        z = tl.maximum(z, -clip_sigma, propagate_nan=_KEEP_NAN)
        z = tl.minimum(z, clip_sigma, propagate_nan=_KEEP_NAN)
        moved = z * tl.maximum(wanted, _FLOOR, propagate_nan=_KEEP_NAN)
        moved += tl.load(mean + column, mask=known, other=0.0)[None, :]
    masked = tl.where(factor == 0, 0.0, values * factor)
    if MODE == "global" or MODE == "hybrid":
        spread = _spread(blocks, rows, columns, BLOCKS, BLOCK_COLUMNS)
        scaled = masked * tl.div_rn(tl.where(spread == 0, 1.0, target_std), tl.where(spread == 0, 1.0, spread))
    if MODE == "mask":
        result = masked
    elif MODE == "global":
        result = scaled
    elif MODE == "per_dim":
        result = moved
    else:
        result = weight * moved + rest * scaled
    tl.store(_places(out, columns, 1, ROWS, COLUMNS), result.to(out.dtype.element_ty), mask=inside)


def column_stats(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.normalise.column_stats``."""
    stats, _ = _statistics(x, None, 1.0, "off", "high")
    return stats[0], stats[1]


def normalise(
    x: torch.Tensor,
    mode: str,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    target_std: float,
    clip_sigma: float | None,
    weight: float,
) -> torch.Tensor:
    """See ``kernels.normalise.normalise``."""
    found = _statistics(x, None, 1.0, "off", "high")
    return _moved(x, found, mode, mean, std, (target_std, clip_sigma, weight))


def outlier_ratios(x: torch.Tensor, std: torch.Tensor, direction: str) -> torch.Tensor:
    """See ``kernels.normalise.outlier_ratios``."""
    return _statistics(x, std, 1.0, "none", direction)[0][3]


def mask_outliers(
    x: torch.Tensor, std: torch.Tensor, threshold: float, mode: str, direction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.normalise.mask_outliers``."""
    found = _statistics(x, std, threshold, mode, direction)
    return _moved(x, found, "mask", None, None, (1.0, None, 1.0)), found[0][3]


def mask_and_normalise(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    std: torch.Tensor,
    threshold: float,
    outlier_mode: str,
    direction: str,
    mode: str,
    target_std: float,
    clip_sigma: float | None,
    weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.normalise.mask_and_normalise``."""
    found = _statistics(x, std, threshold, outlier_mode, direction)
    return _moved(x, found, mode, mean, std, (target_std, clip_sigma, weight)), found[0][3]


def _statistics(
    x: torch.Tensor, std: torch.Tensor | None, threshold: float, outliers: str, direction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean, deviation, factor and ratio of each column [4, D], and mean and squares of each block of columns."""
    if not x.is_cuda and isinstance(_part, triton.JITFunction):
        raise KernelError(f"x must be on a CUDA device for triton, got {x.device}")
    rows, columns = x.shape
    tiles, blocks = triton.cdiv(rows, PART["ROWS"]), triton.cdiv(columns, JOIN["COLUMNS"])
    parts = torch.empty(2, tiles, columns, dtype=torch.float32, device=x.device)
    stats = torch.empty(4, columns, dtype=torch.float32, device=x.device)
    joined = torch.empty(2, blocks, dtype=torch.float32, device=x.device)
    options = {"num_stages": 1, "enable_fp_fusion": False}
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(columns, PART["COLUMNS"]), tiles)
        _part[grid](x, *parts, rows, columns, *x.stride(), **PART, num_warps=PART_WARPS, **options)
        wanted = stats if std is None else std.contiguous()
        kinds = {"OUTLIERS": outliers, "DIRECTION": direction}
        arguments = (*parts, wanted, stats, joined, rows, columns, float(threshold))
        _join[(blocks,)](*arguments, **kinds, **JOIN, num_warps=JOIN_WARPS, **options)
    return stats, joined


def _moved(
    x: torch.Tensor,
    found: tuple[torch.Tensor, torch.Tensor],
    mode: str,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    amounts: tuple[float, float | None, float],
) -> torch.Tensor:
    rows, columns = x.shape
    stats, joined = found
    target_std, clip_sigma, weight = amounts
    clip = math.inf if clip_sigma is None else float(clip_sigma)
    out = torch.empty(x.shape, dtype=x.dtype if mode == "mask" else torch.float32, device=x.device)
    references = [stats if vector is None else vector.contiguous() for vector in (mean, std)]
    numbers = (rows, columns, *x.stride(), float(target_std), clip, float(weight), float(1 - weight))
    kinds = {"MODE": mode, "BLOCKS": triton.next_power_of_2(joined.shape[1]), **MOVE}
    grid = (triton.cdiv(columns, MOVE["COLUMNS"]), triton.cdiv(rows, MOVE["ROWS"]))
    with torch.cuda.device_of(x):
        _move[grid](
            *(x, out, *found, *references, *numbers),
            **kinds,
            num_warps=MOVE_WARPS,
            num_stages=1,
            enable_fp_fusion=False,
        )
    return out


def builds() -> tuple[Build, ...]:
    """The kernels as they are launched for 2560 and 3584 columns and any number of rows."""
    parts = [_build(f"part {kind}", _part, {**PART, "x_column": 1}, PART_WARPS, x=kind) for kind in _TYPES]
    masks = (("off", "high"), ("none", "both"), ("zero", "high"), ("clamp", "low"), ("scale", "both"))
    joins = [
        _build(
            f"join {outliers} {direction}", _join, {**JOIN, "OUTLIERS": outliers, "DIRECTION": direction}, JOIN_WARPS
        )
        for outliers, direction in masks
    ]
    moves = [
        _build(f"move {mode} {kind}", _move, {**MOVE, "MODE": mode, "BLOCKS": 128, "x_column": 1}, MOVE_WARPS, x=kind)
        for mode in ("mask", "global", "per_dim", "hybrid")
        for kind in _TYPES
    ]
    strided = _build("move hybrid fp32 strided", _move, {**MOVE, "MODE": "hybrid", "BLOCKS": 128}, MOVE_WARPS)
    return (*parts, *joins, *moves, strided)


_TYPES = ("fp32", "bf16", "fp16")
_POINTERS = ("x", "out", "means", "squares", "stats", "blocks", "mean", "std")
_FLOATS = ("threshold", "target_std", "clip_sigma", "weight", "rest")


def _build(name: str, kernel: Any, constants: dict[str, Any], warps: int, x: str = "fp32") -> Build:
    kinds = dict.fromkeys(_POINTERS, "*fp32") | dict.fromkeys(_FLOATS, "fp32") | dict.fromkeys(constants, "constexpr")
    kinds |= {"x": f"*{x}"} | ({"out": f"*{x}"} if constants.get("MODE") == "mask" else {})
    signature = {key: kinds.get(key, "i32") for key in kernel.arg_names}
    multiples = {"columns", "x_row"} if "x_column" in constants else {"columns"}
    return Build(name, kernel, signature, constants, warps, multiples=frozenset(multiples))
