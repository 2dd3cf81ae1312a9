"""The definition in torch; only the int32 sums are computed in a way that suits the device, with the same result."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..epilogue import Flat, finish

CHUNK_ROWS = 1024
EXACT_COLUMNS = 1024
"""1024 products of 128 x 128 stay within 2^24, where float32 holds every integer."""


def multiply(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: Flat,
    out: torch.Tensor,
) -> None:
    """See ``kernels.linear_int8.linear_int8``: writes out [M, N]."""
    products = products_padded if tokens.is_cuda else products_in_floats
    _multiply(products, tokens, token_scale, weight, scale, bias, epilogue, out)


def multiply_int_mm(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: Flat,
    out: torch.Tensor,
) -> None:
    """The same by ``torch._int_mm``, on any device."""
    _multiply(products_padded, tokens, token_scale, weight, scale, bias, epilogue, out)


def _multiply(
    products: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: Flat,
    out: torch.Tensor,
) -> None:
    """Output columns are worked in chunks to bound the int32 sums."""
    for start in range(0, len(weight), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        y = products(tokens, weight[rows]).float().mul_(token_scale[:, None]).mul_(scale[rows])
        finish(y if bias is None else y.add_(bias[rows].float()), epilogue, rows, out)


def products_in_floats(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b.T`` of int8 [M, K] and [N, K] as int32 [M, N], by float32 products of at most 1024 columns.

    Exact, and on CPUs without int8 instructions 20 to 30 times faster than ``torch._int_mm``, which is scalar there.
    """
    sums = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], EXACT_COLUMNS):
        columns = slice(start, start + EXACT_COLUMNS)
        sums += (a[:, columns].float() @ b[:, columns].float().t()).int()
    return sums


def products_padded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b.T`` of int8 [M, K] and [N, K] as int32 [M, N], by ``torch._int_mm``.

    On CUDA it takes more than 16 rows and multiples of 8; the zeros added depend on the shapes alone.
    """
    rows = max(32, len(a) + -len(a) % 8)
    depth, columns = -a.shape[1] % 8, -len(b) % 8
    padded = F.pad(a, (0, depth, 0, rows - len(a))) if depth or rows > len(a) else a
    other = F.pad(b, (0, depth, 0, columns)) if depth or columns else b
    return torch._int_mm(padded, other.t())[: len(a), : len(b)]
