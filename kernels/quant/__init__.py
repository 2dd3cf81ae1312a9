"""One byte per weight: group rotation, quantisation of rows to int8 or e4m3 with one scale each, and back.

Always stored x scale = value. int8 rows are rotated before they are quantised, so an outlier is spread over its group.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch

from ...errors import KernelError
from . import reference

__all__ = [
    "GROUPS",
    "IMPLEMENTATIONS",
    "SCALES",
    "STORED",
    "Tokens",
    "check_group",
    "check_implementation",
    "check_stored",
    "dequantise_rows",
    "make_tokens",
    "quantise_rows",
    "quantise_tokens",
    "rotate",
]

GROUPS = (1, 4, 16, 64, 256)
STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Storage dtype by weight format."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (torch.float32, torch.bfloat16)

IMPLEMENTATIONS = ("reference", "triton", "native")


@dataclass(frozen=True, eq=False)
class Tokens:
    """Activations that were quantised once, for the layers that share them.

    Attributes:
        stored: [M, K], int8 or float8_e4m3fn.
        scale: float32 [M].
        group: in which they were rotated.
        like: the activations [..., K], for the shape, dtype and device of results; they are unchanged.
    """

    stored: torch.Tensor
    scale: torch.Tensor
    group: int
    like: torch.Tensor


def rotate(x: torch.Tensor, group: int) -> torch.Tensor:
    """``x @ blockdiag(R, R, ...)`` with R the regular Hadamard matrix [group, group], in float32.

    R is the Kronecker power of ``[[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]] / 2``; it is symmetric
    and orthogonal, so rotating twice gives x back up to rounding. The Sylvester matrix is another and does not fit.

    Args:
        x: [..., K], float32, bfloat16 or float16.
        group: 1 (no rotation), 4, 16, 64 or 256; divides K.

    Returns:
        float32 [..., K]; x itself when the group is 1 and x is float32.

    Raises:
        KernelError: wrong dtype, or a group that does not exist or does not divide K.

    Source: ConvRot, https://arxiv.org/abs/2512.03673; leejet/stable-diffusion.cpp@97d2990:docs/int8_convrot.md.
    """
    _check_floats("x", x, _FLOATS)
    check_group(x.shape[-1] if x.dim() else 0, group)
    return reference.rotate(x, group)


def quantise_rows(
    weight: torch.Tensor,
    weight_format: str,
    group: int,
    *,
    scale_dtype: torch.dtype = torch.float32,
    implementation: str = "reference",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``stored = round(row / scale)`` with ``scale = max|row| / 127`` (int8) or ``/ 448`` (fp8).

    The scale is rounded to its stored dtype before it divides, halves round to even, and a row of zeros gets scale 1.
    At most a few megabytes of rows are held in float32 at a time. All implementations give the same bytes and scales.

    Args:
        weight: [N, K], float32, bfloat16 or float16.
        weight_format: ``int8``, whose rows are rotated first, or ``fp8``, whose rows never are.
        group: rotation group of int8 rows; 1 for none.
        scale_dtype: float32, or bfloat16 for files of other programs.
        implementation: ``reference`` (any device), ``triton`` (CUDA) or ``native`` (CPU).

    Returns:
        stored [N, K] in int8 or float8_e4m3fn, and scale [N].

    Raises:
        KernelError: wrong dtype, shape, format or group, a weight that is NaN or infinite, or an implementation that
            this device does not have.
    """
    _check_floats("weight", weight, _FLOATS)
    if weight.dim() != 2 or not len(weight):
        raise KernelError(f"weight must be a matrix [rows, columns], got shape {list(weight.shape)}")
    if weight_format not in STORED:
        raise KernelError(f"weight_format must be one of {', '.join(STORED)}, got {weight_format!r}")
    if scale_dtype not in SCALES:
        raise KernelError(f"scale_dtype must be one of {_names(SCALES)}, got {scale_dtype}")
    check_group(weight.shape[1], group)
    check_implementation(implementation, IMPLEMENTATIONS)
    stored, scale = _module(implementation).quantise(weight, STORED[weight_format], group, scale_dtype)
    _check_finite(weight, scale)
    return stored, scale


def quantise_tokens(
    x: torch.Tensor, weight_format: str, group: int, *, implementation: str = "reference"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise activations as :func:`quantise_rows` does weights, without waiting for the device to look for NaN.

    A token that is not finite gets a scale that is not finite, so whatever is computed from it is not finite either.
    x itself is left as it is, for a side branch that wants it unrotated.

    Args:
        x: [M, K], float32, bfloat16 or float16.
        weight_format: ``int8`` or ``fp8``.
        group: rotation group for int8; 1 for none.
        implementation: as in :func:`quantise_rows`.

    Returns:
        stored [M, K] and scale float32 [M].

    Raises:
        KernelError: wrong dtype, shape, format or group, or an implementation that this device does not have.
    """
    _check_floats("x", x, _FLOATS)
    if x.dim() != 2 or not len(x) or weight_format not in STORED:
        raise KernelError(f"x must be a matrix for int8 or fp8, got shape {list(x.shape)} for {weight_format!r}")
    check_group(x.shape[1], group)
    check_implementation(implementation, IMPLEMENTATIONS)
    return _module(implementation).quantise(x, STORED[weight_format], group, torch.float32)


def make_tokens(x: torch.Tensor, weight_format: str, group: int, implementation: str) -> Tokens:
    """:func:`quantise_tokens` of activations [..., K], for any number of layers.

    Raises:
        KernelError: as :func:`quantise_tokens`.
    """
    if not x.dim():
        raise KernelError("x must be [..., columns], got a number")
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    stored, scale = quantise_tokens(rows, weight_format, group, implementation=implementation)
    return Tokens(stored, scale, group, x)


def dequantise_rows(
    stored: torch.Tensor, scale: torch.Tensor, group: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``stored * scale``, rotated back if the rows are int8: the matrix that :func:`quantise_rows` was given, nearly.

    Args:
        stored: [N, K], int8 or float8_e4m3fn.
        scale: [N], float32 or bfloat16.
        group: rotation group of int8 rows; fp8 rows are never rotated.
        dtype: of the result; the arithmetic is float32.

    Returns:
        [N, K] in ``dtype``.

    Raises:
        KernelError: wrong dtype or shape, or a group that does not fit.
    """
    if stored.dtype not in STORED.values():
        raise KernelError(f"stored must be one of {_names(tuple(STORED.values()))}, got {stored.dtype}")
    check_stored(stored, scale, stored.dtype, SCALES)
    check_group(stored.shape[1], group)
    return reference.dequantise(stored, scale, group, dtype)


def check_group(columns: int, group: int) -> None:
    """Check that the rotation group exists and divides the columns.

    Raises:
        KernelError: it does not.
    """
    if group not in GROUPS:
        raise KernelError(f"group must be one of {', '.join(map(str, GROUPS))}, got {group}")
    if columns < 1 or columns % group:
        raise KernelError(f"columns must be a positive multiple of the group {group}, got {columns}")


def check_stored(
    stored: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    scales: tuple[torch.dtype, ...] = (torch.float32,),
) -> None:
    """Check a quantised matrix: [N, K] of the storage dtype, with one scale per row.

    Raises:
        KernelError: it is something else.
    """
    if stored.dtype != dtype or stored.dim() != 2:
        raise KernelError(f"weight must be a matrix of {dtype}, got {stored.dtype} {list(stored.shape)}")
    if scale.dtype not in scales or scale.shape != stored.shape[:1]:
        raise KernelError(
            f"scale must be {_names(scales)} [{stored.shape[0]}], got {scale.dtype} {list(scale.shape)}",
            hint="stored x scale = value, one scale per row",
        )


def check_implementation(name: str, names: tuple[str, ...]) -> None:
    """Check the name of an implementation.

    Raises:
        KernelError: the op has no such implementation.
    """
    if name not in names:
        raise KernelError(f"implementation must be one of {', '.join(names)}, got {name!r}")


def _module(implementation: str) -> ModuleType:
    return import_module(f".{implementation}", __name__)


def _check_floats(subject: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        raise KernelError(f"{subject} must be one of {_names(dtypes)}, got {x.dtype}")


def _check_finite(weight: torch.Tensor, scale: torch.Tensor) -> None:
    if bool(scale.isfinite().all()):
        return
    row = int((~scale.isfinite()).nonzero()[0])
    bad = (~weight[row].isfinite()).nonzero()
    if len(bad):
        column = int(bad[0])
        raise KernelError(f"weight must be finite, got {float(weight[row, column])} in row {row}, column {column}")
    raise KernelError(f"weight must be small enough to rotate in float32, got {float(weight[row].abs().max())}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
