"""Native rows of a true matrix beside copying its bytes, the torch definition and, where installed, optimum-quanto."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from qengine.bench.limits import copies, fastest
from qengine.bench.rivals import CPU, in_turns, ratio
from qengine.kernels import native
from qengine.kernels.quant import native as rows
from qengine.kernels.quant import reference

SHAPE = (3072, 12288)
"""``img_mlp.net.2`` of a Qwen-Image block."""

CASES = {"int8": (torch.int8, 1), "int8-rotated": (torch.int8, 256), "fp8": (torch.float8_e4m3fn, 1)}
ROUNDS = 5


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """bfloat16, in the manner of trained weights."""
    return (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) / 64).bfloat16()


def quanto(weight: torch.Tensor, stored: torch.dtype) -> Callable[[], object] | None:
    """Rows as optimum-quanto's modules make them; None where it is not installed."""
    if find_spec("optimum") is None or find_spec("optimum.quanto") is None:
        return None
    from optimum.quanto import AbsmaxOptimizer, qfloat8_e4m3fn, qint8, quantize_weight

    qtype, optimizer = (qint8 if stored == torch.int8 else qfloat8_e4m3fn), AbsmaxOptimizer()
    return lambda: quantize_weight(weight, qtype, 0, optimizer(weight, qtype=qtype, axis=0), optimized=False)


@pytest.mark.skipif(native.library() is None, reason=f"no native library: {native.reason()}")
@pytest.mark.parametrize("case", CASES)
def test_quantise(benchmark: Any, weight: torch.Tensor, case: str) -> None:
    """The limit copies as many bytes as are read and written; it and we write to memory that is mapped already.

    ``new_seconds`` is with an output that is not, as the rivals' outputs are.
    """
    stored, group = CASES[case]
    out = torch.zeros(SHAPE, dtype=torch.int8).view(stored), torch.zeros(SHAPE[0])
    found = rows.quantise(weight, stored, group, torch.float32, out=out)
    wanted = reference.quantise(weight, stored, group, torch.float32)
    assert torch.equal(found[0].view(torch.int8), wanted[0].view(torch.int8)) and torch.equal(found[1], wanted[1])
    moved = copies(weight.nbytes + found[0].nbytes, CPU)
    rival = quanto(weight, stored)
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: rows.quantise(weight, stored, group, torch.float32, out=out),
        "new": lambda: rows.quantise(weight, stored, group, torch.float32),
        "limit": moved[fastest(moved, CPU)[0]],
        "torch": lambda: reference.quantise(weight, stored, group, torch.float32),
    } | ({"quanto": rival} if rival else {})
    seconds = dict(zip(sides, in_turns(tuple(sides.values()), rounds=ROUNDS), strict=True))
    rivals = [name for name in ("torch", "quanto") if name in seconds]
    benchmark.extra_info |= {
        "op": "quantise",
        "case": case,
        "implementation": native.isa(),
        "gb_per_second": (weight.nbytes + found[0].nbytes) / min(seconds["ours"]) / 1e9,
        "ours_seconds": min(seconds["ours"]),
        "new_seconds": min(seconds["new"]),
        "rival": rivals[-1],
        "rival_seconds": min(seconds[rivals[-1]]),
        "speedup": ratio(seconds[rivals[-1]], seconds["new"]),
        "speedup_over_torch": ratio(seconds["torch"], seconds["new"]),
        "limit": "copy",
        "limit_seconds": min(seconds["limit"]),
        "fraction_of_limit": ratio(seconds["limit"], seconds["ours"]),
    }
    benchmark.pedantic(sides["ours"], rounds=3)
