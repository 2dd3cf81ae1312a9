"""Linear layers of 8-bit weights with their epilogues at the shapes of Qwen-Image; tokens are quantised inside."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from ...kernels.epilogue import Epilogue
from ...kernels.linear_fp8 import TOKEN_PATHS, linear_fp8
from ...kernels.linear_int8 import linear_int8
from ...kernels.quant import dequantise_rows, quantise_rows, quantise_tokens
from . import Case, Maker, error, planned

GROUP = 256
Shape = tuple[int, int, int]
"""Tokens, columns and rows of the weight."""


def _case(
    weight_format: Literal["int8", "fp8"], kind: str, shape: Shape, device: torch.device, generator: torch.Generator
) -> Case:
    m, k, n = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    implementation = planned(f"linear_{weight_format}", device, str(dtype).removeprefix("torch."))
    x, dense, bias, gate, residual = _drawn(((m, k), (n, k), (n,), (n,), (m, n)), dtype, device, generator)
    dense /= k**0.5
    group = GROUP if weight_format == "int8" else 1
    stored, scale = quantise_rows(dense, weight_format, group)
    epilogue = {"bias": None, "gelu": Epilogue(gelu=True), "gate": Epilogue(gate=gate, residual=residual)}[kind]

    def plain(x: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, dense, bias.to(x.dtype))
        y = F.gelu(y, approximate="tanh") if kind == "gelu" else y
        return residual + gate * y if kind == "gate" else y

    def run() -> torch.Tensor:
        if weight_format == "int8":
            return linear_int8(x, stored, scale, bias, group, epilogue=epilogue, implementation=implementation)
        return linear_fp8(x, stored, scale, bias, implementation, epilogue=epilogue)

    weight = dequantise_rows(stored, scale, group).double()
    tokens = _tokens(x, weight_format, group, implementation)
    return Case(
        run,
        expected=plain(tokens, weight),
        eager=lambda: plain(x, dense),
        limit="gemm",
        work=(m, n, k),
        bound=2 * error(plain(tokens.to(dtype), weight.to(dtype)), plain(tokens, weight)),
        implementation=implementation,
    )


def _drawn(shapes, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.randn(shape, device=device, generator=generator).to(dtype) for shape in shapes]


def _tokens(x: torch.Tensor, weight_format: str, group: int, implementation: str) -> torch.Tensor:
    """What the layer multiplies by, in float64: x, or what is left of it in 8 bits."""
    if weight_format == "fp8" and implementation not in TOKEN_PATHS:
        return x.double()
    return dequantise_rows(*quantise_tokens(x, weight_format, group), group).double()


SMALL = (("gate", (1, 3072, 3072)), ("bias", (250, 3072, 3072)), ("gate", (250, 12288, 3072)))
BIG = (("bias", (8192, 3072, 3072)), ("gelu", (8192, 3072, 12288)), ("gate", (8192, 12288, 3072)))
CASES: dict[str, Maker] = {
    f"{weight_format} {kind} {'x'.join(map(str, shape))}": partial(_case, weight_format, kind, shape)
    for kind, shape in SMALL + BIG
    for weight_format in ("int8", "fp8")
}
"""An error bound is twice that of the same operands multiplied by torch in the compute dtype."""

LARGE = tuple(name for name in CASES if " 8192x" in name)
