"""What the matrix products in Triton share: which tile for which shape, its order on the device, and its epilogue."""

# ruff: noqa: PLR0913  (a kernel takes its pointers, sizes and strides one by one)
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from ..errors import KernelError
from .ahead import Build
from .epilogue import Flat

BAND = 8
"""Tiles of rows that are walked together, so that they find the same weights in the L2 cache."""

FULL = 160
"""Least tiles of 128 x 128 for which this size is taken; fewer leave a device half empty."""

HOPPER = 90

COUNTS = ("M", "split", "period")
"""Arguments that change from picture to picture, for whose values nothing is compiled again."""


@dataclass(frozen=True)
class Tile:
    """How one program works.

    Attributes:
        rows: of x.
        columns: rows of the weight.
        depth: columns of both that are multiplied at a time.
        warps: per program.
        stages: loads that are under way.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """``128x128x64``."""
        return f"{self.rows}x{self.columns}x{self.depth}"

    @property
    def constants(self) -> dict[str, Any]:
        """Those of the kernel's ``constexpr`` arguments that name the tile."""
        return {"BM": self.rows, "BN": self.columns, "BK": self.depth}

    def halves(self, architecture: int) -> bool:
        """Whether the columns are summed as two halves.

        Before capability 9.0 all but the smallest tile are: there Triton carries one product's next operands through
        the loop byte by byte (128x128x64: 243 registers and 256 byte permutations a turn), which it leaves alone where
        a turn has two.
        """
        return architecture < HOPPER and self.columns >= 64


def pick(table: Mapping[str, Tile], rows: int, columns: int) -> Tile:
    """The tile for [rows, K] times [columns, K]: ``few``, ``small`` or ``full``."""
    if rows <= 16:
        return table["few"]
    return table["full" if triton.cdiv(rows, 128) * triton.cdiv(columns, 128) >= FULL else "small"]


def whole(x: torch.Tensor, depth: int) -> torch.Tensor:
    """Rows with zeros after them up to a multiple of ``depth``, so that every turn of a kernel reads whole vectors.

    The columns of the models' layers are such multiples, and nothing is copied.
    """
    extra = -x.shape[1] % depth
    return x if not extra else F.pad(x.view(torch.uint8) if x.itemsize == 1 else x, (0, extra)).view(x.dtype)


@triton.jit
def place(M, N, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr):
    """First row and first column of this program's tile; bands of tiles are walked column by column."""
    tile = tl.program_id(0)
    high, wide = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = tile // (BAND * wide)
    tall = tl.minimum(high - band * BAND, BAND)
    inside = tile % (BAND * wide)
    return (band * BAND + inside % tall) * BM, (inside // tall) * BN


@triton.jit
def gelu(y):
    """``y (1 + tanh u) / 2 = y / (1 + exp(-2 u))`` with ``u = sqrt(2 / pi) (y + 0.044715 y^3)``; no exp overflows."""
    u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
    small = tl.exp(-2.0 * tl.abs(u))
    return y * (tl.where(u < 0, small, 1.0) / (1.0 + small))


@triton.jit
def finish(
    sums, rows, columns, M, N, token_scale_ptr, scale_ptr, bias_ptr, gate_ptr, gate_rest_ptr, residual_ptr, out_ptr,
    residual_stride, out_stride, split, period, GELU: tl.constexpr,
):  # fmt: skip
    """Scale the sums of a tile, add the bias, apply ``kernels.epilogue.Epilogue``, write."""
    real = columns < N
    inside = (rows < M)[:, None] & real[None, :]
    y = sums.to(tl.float32)
    if token_scale_ptr is not None:
        y = y * tl.load(token_scale_ptr + rows, mask=rows < M, other=0.0)[:, None]
    y = y * tl.load(scale_ptr + columns, mask=real, other=0.0)[None, :]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + columns, mask=real, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = gelu(y)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + columns, mask=real, other=0.0).to(tl.float32)[None, :]
        if gate_rest_ptr is not None:
            rest = tl.load(gate_rest_ptr + columns, mask=real, other=0.0).to(tl.float32)[None, :]
            gate = tl.where((rows % period < split)[:, None], gate, rest)
        at = residual_ptr + rows.to(tl.int64)[:, None] * residual_stride + columns[None, :]
        y = tl.load(at, mask=inside, other=0.0).to(tl.float32) + gate * y
    to = out_ptr + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(to, y.to(out_ptr.dtype.element_ty), mask=inside)


def finishing(epilogue: Flat, out: torch.Tensor) -> tuple[Any, ...]:
    """Arguments of a kernel from ``gate_ptr`` to ``period``."""
    residual = epilogue.residual
    stride = 0 if residual is None else residual.stride(0)
    split = epilogue.split or 0
    return epilogue.gate, epilogue.gate_rest, residual, out, stride, out.stride(0), split, epilogue.period


def architecture(x: torch.Tensor) -> int:
    """The compute capability of the device of x, 86 for 8.6; 0 under the interpreter.

    Raises:
        KernelError: the tensor is on no CUDA device, and Triton does not interpret.
    """
    if isinstance(place, InterpretedFunction):
        return 0
    if not x.is_cuda:
        raise KernelError(f"device must be CUDA for Triton, got {x.device}", hint='use implementation="reference"')
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


GATE = ("gate_ptr", "gate_rest_ptr", "residual_ptr")


def builds(
    kernel: Any, table: Mapping[str, Tile], operands: Mapping[str, str], constants: Mapping[str, Any], since: int = 80
) -> tuple[Build, ...]:
    """All tiles with bias, gate, two ranges and residual, the full one also with GELU instead.

    Args:
        kernel: whose arguments after the operands are those of :func:`finish`.
        table: its tiles.
        operands: Triton types of its arguments before ``gate_ptr``, and of further numbers.
        constants: further ``constexpr`` arguments.
        since: least compute capability.
    """
    made = []
    for name, tile in table.items():
        spans = [(since, HOPPER - 1), (HOPPER, None)] if tile.halves(since) else [(since, None)]
        for kind in ("gate", "gelu") if name == "full" else ("gate",):
            for span in spans:
                chosen = {**constants, **_constants(tile, kind, span[0])}
                made.append(_build(kernel, tile, operands, chosen, span))
    return tuple(made)


def _constants(tile: Tile, kind: str, architecture: int) -> dict[str, Any]:
    unused = GATE if kind == "gelu" else ()
    chosen = {"GELU": kind == "gelu", "BAND": BAND, "HALVES": tile.halves(architecture)}
    return {**chosen, **tile.constants, **dict.fromkeys(unused)}


def _build(
    kernel: Any, tile: Tile, operands: Mapping[str, str], constants: dict[str, Any], span: tuple[int, int | None]
) -> Build:
    sizes = dict.fromkeys(("residual_stride", "out_stride", "split", "period", "M", "N", "K"), "i32")
    signature = {
        **dict.fromkeys((*GATE, "out_ptr"), "*bf16"),
        **sizes,
        **operands,
        **dict.fromkeys(constants, "constexpr"),
    }
    unread = {name: None for name, kind in operands.items() if kind == "constexpr"}
    kind = "gelu" if constants["GELU"] else "gate"
    return Build(
        name=f"{tile.name}-{kind}{'-halves' if constants['HALVES'] else ''}",
        kernel=kernel,
        signature=signature,
        constants={**constants, **unread},
        warps=tile.warps,
        stages=tile.stages,
        since=span[0],
        until=span[1],
        multiples=frozenset({"residual_stride", "out_stride", "N", "K", "x_stride"} & signature.keys()),
    )
