"""Every kernel against a float64 reference on fresh random inputs, and its time beside the same product in bfloat16.

A kernel joins by a line in ``CHECKS``.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from ...engine.formats import rotation_group
from ...engine.quant import quantise_weight, row_group
from ...kernels import quant
from ...kernels.linear_fp8 import Fp8Path, linear_fp8
from ...kernels.linear_int8 import linear_int8
from .worker import Line, Run, median_seconds, pick_device, serve

SHAPES = ((1, 3072, 3072), (250, 3072, 12288), (250, 12288, 3072), (423, 3072, 213 * 16), (8192, 3072, 12288))
TOY_SHAPES = ((1, 64, 64), (5, 64, 48))
TIMED_ROWS = 1024
SLACK = 2e-6


@dataclass(frozen=True)
class Case:
    """One call of a kernel and what it should give.

    Attributes:
        call: the kernel on its inputs.
        expected: the definition in float64.
        eager: the same product in the dtype of x, to compare times with.
    """

    call: Callable[[], torch.Tensor]
    expected: torch.Tensor
    eager: Callable[[], torch.Tensor]


Make = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Case]
"""From x [M, K], weight [N, K] and bias [N] to a case."""


def _int8(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Case:
    stored, scale = quantise_weight(weight, "int8")
    group = row_group(x.shape[1], "int8")
    tokens, token_scale = quant.quantise_tokens(x, "int8", group)
    expected = _scaled(tokens, token_scale, stored, scale) + bias.double()
    return Case(partial(linear_int8, x, stored, scale, bias, group), expected, partial(F.linear, x, weight, bias))


def _fp8(path: Fp8Path, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Case:
    stored, scale = quantise_weight(weight, "fp8")
    if path == "scaled_mm":
        expected = _scaled(*quant.quantise_tokens(x, "fp8", 1), stored, scale)
    else:
        expected = x.double() @ quant.dequantise_rows(stored, scale, 1, x.dtype).double().t()
    call = partial(linear_fp8, x, stored, scale, bias, path)
    return Case(call, expected + bias.double(), partial(F.linear, x, weight, bias))


def _scaled(tokens: torch.Tensor, token_scale: torch.Tensor, stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    sums = tokens.to(torch.float64) @ stored.to(torch.float64).t()
    return sums * token_scale.double()[:, None] * scale.double()


def _rotate(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Case:
    group = rotation_group(x.shape[1])
    expected = x.double().unflatten(-1, (-1, group)) @ hadamard(group).to(x.device)
    return Case(partial(quant.rotate, x, group), expected.flatten(-2), partial(F.linear, x, weight, bias))


def hadamard(group: int) -> torch.Tensor:
    """The regular Hadamard matrix in float64 [group, group], by Kronecker products."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < group:
        matrix = torch.kron(matrix, four)
    return matrix


CHECKS: dict[str, Make] = {
    "linear_int8": _int8,
    "linear_fp8.dequantise": partial(_fp8, "dequantise"),
    "linear_fp8.scaled_mm": partial(_fp8, "scaled_mm"),
    "rotate": _rotate,
}
CUDA_ONLY = frozenset({"linear_fp8.scaled_mm"})


def cases(toy: bool) -> tuple[str, ...]:
    """``NAME ROWSxCOLUMNSxOUTPUTS`` of all checks that this device has; one that raises costs no other."""
    names = [name for name in CHECKS if not (toy and name in CUDA_ONLY)]
    shapes = TOY_SHAPES if toy else SHAPES
    return tuple(f"{name} {'x'.join(map(str, shape))}" for name in names for shape in shapes)


def kernels(toy: bool) -> Run:
    """What checks a kernel."""
    device = pick_device(toy)

    def run(case: str) -> Iterator[Line]:
        name, _, sizes = case.partition(" ")
        rows, columns, outputs = map(int, sizes.split("x"))
        yield check(name, device, rows, columns, outputs)

    return run


@torch.no_grad()
def check(name: str, device: torch.device, rows: int, columns: int, outputs: int) -> Line:
    """Error of a kernel against float64, relative in norm; the bound is twice that of rounding the reference."""
    seed = secrets.randbits(32)
    generator = torch.Generator(device).manual_seed(seed)
    x, weight, bias = (
        torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)
        for shape in ((rows, columns), (outputs, columns), (outputs,))
    )
    made = CHECKS[name](x, weight, bias)
    out = made.call()
    bound = 2 * error(made.expected.to(out.dtype), made.expected) + SLACK
    found = error(out, made.expected)
    line = {"seed": seed, "error": found, "bound": bound, "passed": found <= bound, "shape": [rows, columns, outputs]}
    if rows < TIMED_ROWS:
        return line
    return line | {"seconds": median_seconds(made.call, device), "bf16_seconds": median_seconds(made.eager, device)}


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """``|out - expected| / |expected|``; NaN is never below a bound."""
    return float((out.double() - expected).norm() / expected.norm())


if __name__ == "__main__":
    serve(kernels)
