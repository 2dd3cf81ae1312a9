"""The definition in torch, and the same with the 8-bit matrix product of torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..epilogue import Epilogue, apply
from ..quant import Tokens, dequantise_rows

CHUNK_ELEMENTS = 8 << 20
CHUNK_MULTIPLE = 256


def dequantise(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: Epilogue | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``kernels.linear_fp8.linear_fp8``; at most 8 M weights are held in the dtype of x."""
    step = max(CHUNK_MULTIPLE, CHUNK_ELEMENTS // weight.shape[1] // CHUNK_MULTIPLE * CHUNK_MULTIPLE)
    if len(weight) <= step:
        return apply(F.linear(x, dequantise_rows(weight, scale, 1, x.dtype), bias), epilogue, out)
    y = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype, device=x.device)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        values = dequantise_rows(weight[rows], scale[rows], 1, x.dtype)
        y[..., rows] = F.linear(x, values, None if bias is None else bias[rows])
    return apply(y, epilogue, out)


def scaled_mm(
    tokens: Tokens,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: Epilogue | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``kernels.linear_fp8.linear_fp8``; the fast accumulation is off, it sums K = 12288 in a short format."""
    y = torch._scaled_mm(
        tokens.stored,
        weight.t(),
        scale_a=tokens.scale[:, None],
        scale_b=scale[None, :],
        bias=bias,
        out_dtype=tokens.like.dtype,
        use_fast_accum=False,
    )
    return apply(y.view(*tokens.like.shape[:-1], len(weight)), epilogue, out)
