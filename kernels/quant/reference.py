"""The definition in float32 torch; rows are worked on a few megabytes at a time and never see each other."""

from __future__ import annotations

from collections.abc import Iterator

import torch

CHUNK_ELEMENTS = 2 << 20
DEVICE_CHUNK_ELEMENTS = 8 << 20
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def rotate(x: torch.Tensor, group: int) -> torch.Tensor:
    """See ``kernels.quant.rotate``: radix-4 stages ``y_j = S / 2 - x_{3 - j}``, S = x_0 + x_1 + x_2 + x_3.

    The index inside a group is the leading dimension while the stages run, so that each of them works on long runs.
    """
    if group == 1:
        return x.float()
    y = x.float().reshape(x.numel() // group, group).t().contiguous()
    stride = 1
    while stride < group:
        y = _stage(y.view(group // (4 * stride), 4, stride, y.shape[1])).view(y.shape)
        stride *= 4
    return y.t().reshape(x.shape)


def _stage(x: torch.Tensor) -> torch.Tensor:
    half = ((x[:, 0] + x[:, 1]) + (x[:, 2] + x[:, 3])).mul_(0.5)
    y = torch.empty_like(x)
    for j in range(4):
        torch.sub(half, x[:, 3 - j], out=y[:, j])
    return y


def quantise(
    x: torch.Tensor, stored_dtype: torch.dtype, group: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.quant.quantise_rows``."""
    stored = torch.empty(x.shape, dtype=stored_dtype, device=x.device)
    scale = torch.empty(x.shape[0], dtype=scale_dtype, device=x.device)
    limit = LIMITS[stored_dtype]
    for rows in chunks(x):
        values = rotate(x[rows], group) if stored_dtype == torch.int8 else x[rows].float()
        step = (values.abs().amax(dim=1) / limit).to(scale_dtype)
        scale[rows] = step.masked_fill_(step == 0, 1)
        values = values / scale[rows, None].float()
        if stored_dtype == torch.int8:
            values.round_()
        stored[rows] = values.clamp_(-limit, limit).to(stored_dtype)
    return stored, scale


def dequantise(stored: torch.Tensor, scale: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """See ``kernels.quant.dequantise_rows``."""
    weight = torch.empty(stored.shape, dtype=dtype, device=stored.device)
    for rows in chunks(stored):
        values = stored[rows].float().mul_(scale[rows, None])
        weight[rows] = rotate(values, group) if stored.dtype == torch.int8 else values
    return weight


def chunks(x: torch.Tensor) -> Iterator[slice]:
    """Ranges of the rows of a matrix, each of about 2 M elements (what caches hold) or 8 M on a device."""
    elements = CHUNK_ELEMENTS if x.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    step = max(1, elements // x.shape[1])
    for start in range(0, len(x), step):
        yield slice(start, start + step)
