"""Cases of every op: what is called, what it should give, its eager rival and the physical limit of its work.

One module per op, each with ``CASES``; the pytest-benchmark files and the run on a real card are made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch

Maker = Callable[[torch.device, torch.Generator], "Case"]
"""Makes a case on a device from fresh random inputs."""


@dataclass(frozen=True)
class Case:
    """One call of an op on fixed inputs.

    Attributes:
        call: the op in the implementation that is planned for the device.
        expected: the definition in float64 (or exact), of the shape of the result.
        eager: the same work as a plain torch program does it.
        limit: what bounds it: ``copy`` (bytes moved at copy bandwidth) or ``gemm`` (the best matrix product of torch).
        work: bytes read and written for ``copy``; (M, N, K) for ``gemm``.
        bound: largest ``|out - expected| / |expected|``, norms over all elements; 0 asks for equality.
    """

    call: Callable[[], torch.Tensor]
    expected: torch.Tensor
    eager: Callable[[], torch.Tensor]
    limit: Literal["copy", "gemm"]
    work: int | tuple[int, int, int]
    bound: float


def names() -> tuple[str, ...]:
    """The ops that have cases."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__"))


def cases(op: str) -> Mapping[str, Maker]:
    """Makers of an op's cases by name, e.g. ``8192x3072``."""
    return import_module(f".{op}", __package__).CASES


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """``|out - expected| / |expected|``; NaN is never below a bound."""
    return float((out.double() - expected.double()).norm() / expected.double().norm())
