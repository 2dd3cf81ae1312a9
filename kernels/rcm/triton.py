"""Three launches: blur along the width, blur along the height with the distance, threshold with mean and dilation.

Float32 sums go in the order of ``reference.py``, so the masks are equal bit by bit.
"""
# ruff: noqa: PLR0913  (a kernel takes its pointers, sizes and strides one by one)
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import KernelError
from ..ahead import Build
from . import reference

PIXELS = 256
TOKENS = 128
WARPS = 4

_KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _reflected(i, size):
    i = tl.where(i < 0, -i, i)
    return tl.where(i >= size, 2 * (size - 1) - i, i)


@triton.jit
def _across(
    x,
    control,
    out,
    height,
    width,
    x_channel,
    x_row,
    x_column,
    control_channel,
    control_row,
    control_column,
    TAPS: tl.constexpr,
    SIZE: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Blur ``x - control`` of one channel along the width."""
    channel = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    row = pixel // width
    inside = pixel < height * width
    here = x + channel * x_channel + row * x_row
    there = control + channel * control_channel + row * control_row
    total = tl.zeros([PIXELS], dtype=tl.float32)
    for tap in tl.static_range(SIZE):
        column = _reflected(pixel % width + (tap - SIZE // 2), width)
        apart = tl.load(here + column * x_column, mask=inside, other=0.0)
        apart -= tl.load(there + column * control_column, mask=inside, other=0.0)
        total += TAPS[tap] * apart
    tl.store(out + channel * height * width + pixel, total, mask=inside)


@triton.jit(do_not_specialize=["channels"])
def _down(
    across,
    distance,
    peaks,
    height,
    width,
    channels,
    TAPS: tl.constexpr,
    SIZE: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Blur along the height, then the mean over channels of the absolute value, and the largest of this program."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < height * width
    total = tl.zeros([PIXELS], dtype=tl.float32)
    for channel in range(0, channels):
        blurred = tl.zeros([PIXELS], dtype=tl.float32)
        for tap in tl.static_range(SIZE):
            row = _reflected(pixel // width + (tap - SIZE // 2), height)
            place = (channel * height + row) * width + pixel % width
            blurred += TAPS[tap] * tl.load(across + place, mask=inside, other=0.0)
        total += tl.abs(blurred)
    total = tl.div_rn(total, channels * 1.0)
    tl.store(distance + pixel, total, mask=inside)
    tl.store(peaks + tl.program_id(0), tl.max(total) + tl.sum(total - total))


@triton.jit
def _tokens(
    distance,
    peaks,
    out,
    height,
    width,
    threshold,
    dilate,
    RELATIVE: tl.constexpr,
    PEAKS: tl.constexpr,
    PIXELS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Mean over 2 x 2 pixels of what reaches the threshold, and the largest of the tokens around."""
    least = threshold
    if RELATIVE:
        program = tl.arange(0, PEAKS)
        peak = tl.load(peaks + program, mask=program * PIXELS < height * width, other=0.0)
        least = threshold * (tl.max(peak) + tl.sum(peak - peak))
    tokens_across = width // 2
    tokens_down = height // 2
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens_across * tokens_down
    largest = tl.zeros([TOKENS], dtype=tl.float32)
    for step in range(0, (2 * dilate + 1) * (2 * dilate + 1)):
        row = token // tokens_across + (step // (2 * dilate + 1) - dilate)
        column = token % tokens_across + (step % (2 * dilate + 1) - dilate)
        known = inside & (row >= 0) & (row < tokens_down) & (column >= 0) & (column < tokens_across)
        mean = tl.zeros([TOKENS], dtype=tl.float32)
        for corner in tl.static_range(4):
            place = (2 * row + corner // 2) * width + 2 * column + corner % 2
            value = tl.load(distance + place, mask=known, other=0.0)
            mean += tl.where(value >= least, 0.25, 0.0) + (value - value) + (least - least)
        largest = tl.maximum(largest, tl.where(known, mean, 0.0), propagate_nan=_KEEP_NAN)
    tl.store(out + token, largest, mask=inside)


def change_mask(
    x: torch.Tensor, control: torch.Tensor, threshold: float, relative: bool, kernel_size: int, dilate_size: int
) -> torch.Tensor:
    """See ``kernels.rcm.change_mask``."""
    distance, peaks = _distance(x.reshape(x.shape[-3:]), control.reshape(x.shape[-3:]), kernel_size)
    height, width = distance.shape
    out = torch.empty(height // 2, width // 2, dtype=torch.float32, device=x.device)
    numbers = (height, width, float(threshold), dilate_size)
    kinds = {"RELATIVE": relative, "PEAKS": triton.next_power_of_2(len(peaks)), "PIXELS": PIXELS, "TOKENS": TOKENS}
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(out.numel(), TOKENS),)
        _tokens[grid](distance, peaks, out, *numbers, **kinds, **_options())
    return out


def _distance(x: torch.Tensor, control: torch.Tensor, kernel_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``mean_c |blur(x - control)|`` [h, w], and its maxima over runs of pixels; NaN where one is not finite."""
    if not x.is_cuda and isinstance(_across, triton.JITFunction):
        raise KernelError(f"x must be on a CUDA device for triton, got {x.device}")
    channels, height, width = x.shape
    across = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    distance = torch.empty(height, width, dtype=torch.float32, device=x.device)
    programs = triton.cdiv(height * width, PIXELS)
    peaks = torch.empty(programs, dtype=torch.float32, device=x.device)
    taps = reference.weights(kernel_size)
    kinds = {"TAPS": taps, "SIZE": len(taps), "PIXELS": PIXELS}
    with torch.cuda.device_of(x):
        strides = (*x.stride(), *control.stride())
        _across[programs, channels](x, control, across, height, width, *strides, **kinds, **_options())
        _down[(programs,)](across, distance, peaks, height, width, channels, **kinds, **_options())
    return distance, peaks


def _options() -> dict[str, Any]:
    return {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False}


def builds() -> tuple[Build, ...]:
    """The kernels as they are launched for 16 channels of 128 x 128 to 256 x 256 and a blur of 1 to 31."""
    blurs = []
    for size in (1, 3, 31):
        taps = {"TAPS": reference.weights(size), "SIZE": size, "PIXELS": PIXELS}
        blurs += [_build(f"across {size}", _across, {**taps, "x_column": 1, "control_column": 1})]
        blurs += [_build(f"down {size}", _down, taps)]
    strided = _build("across 3 strided", _across, {"TAPS": reference.weights(3), "SIZE": 3, "PIXELS": PIXELS})
    tokens = [
        _build(
            f"tokens {'relative' if relative else 'absolute'} {peaks}",
            _tokens,
            {"RELATIVE": relative, "PEAKS": peaks, "PIXELS": PIXELS, "TOKENS": TOKENS},
        )
        for relative, peaks in ((False, 64), (True, 64), (True, 256))
    ]
    return (*blurs, strided, *tokens)


_SIZES = {"height", "width"}
_STRIDES = {"x_channel", "x_row", "control_channel", "control_row"}


def _build(name: str, kernel: Any, constants: dict[str, Any]) -> Build:
    pointers = ("x", "control", "out", "across", "distance", "peaks")
    kinds = dict.fromkeys(pointers, "*fp32") | {"threshold": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {key: kinds.get(key, "i32") for key in kernel.arg_names}
    multiples = _SIZES | _STRIDES if "x_column" in constants else _SIZES
    return Build(name, kernel, signature, constants, WARPS, multiples=frozenset(multiples))
