"""What bounds a kernel on this machine, measured: bytes at the speed of a plain copy, products at that of a library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F

from .rivals import in_turns

Runs = Mapping[str, Callable[[], object]]


def fastest(runs: Runs, device: torch.device, rounds: int = 3) -> tuple[str, float]:
    """Name and least seconds of the run that is fastest; one that is four times as slow as another is dropped early.

    Raises:
        ValueError: there is none.
    """
    once = {name: min(found) for name, found in _timed(runs, device, 1)}
    near = {name: runs[name] for name, found in once.items() if found <= 4 * min(once.values())}
    again = {name: min(found) for name, found in _timed(near, device, rounds)}
    best = min(again, key=lambda name: again[name])
    return best, again[best]


def _timed(runs: Runs, device: torch.device, rounds: int) -> Iterator[tuple[str, tuple[float, ...]]]:
    found = in_turns(tuple(runs.values()), rounds=rounds, warmup=2, device=device, calls=None)
    return zip(runs, found, strict=True)


def copies(nbytes: int, device: torch.device) -> Runs:
    """The plain copies there are: torch's, and on a CPU the C library's."""
    size = max(1, nbytes // 2)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source).copy_(source)
    runs: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    if device.type == "cpu":
        # ctypes takes addresses, which keep nothing alive: the default arguments do.
        runs["memmove"] = lambda a=target, b=source: ctypes.memmove(a.data_ptr(), b.data_ptr(), size)
    return runs


def gemms(m: int, n: int, k: int, device: torch.device) -> Runs:
    """The library products of [M, K] and [N, K] transposed that work here, on random values."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(rows, k, generator=generator, device=device) for rows in (m, n))
    made = {name: PRODUCTS[name](x, weight) for name in KINDS[device.type]}
    return {name: run for name, run in made.items() if _works(run)}


def _works(run: Callable[[], object]) -> bool:
    """Whether torch has the product for this device and shape; it says no by raising."""
    try:
        run()
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True


def _plain(dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], Callable[[], object]]:
    def make(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
        a, b = x.to(dtype), weight.to(dtype)
        return lambda: F.linear(a, b)

    return make


def _int8(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    """On CUDA the product takes more than 16 rows, a multiple of 8; rows of zeros make up for them."""
    a, b = (values.mul(30).round_().clamp_(-127, 127).to(torch.int8) for values in (x, weight))
    a = F.pad(a, (0, 0, 0, max(32, len(a) + -len(a) % 8) - len(a)))
    return lambda: torch._int_mm(a, b.t())


def _fp8(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    a, b = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    rows, columns = torch.ones(len(a), 1, device=x.device), torch.ones(1, len(b), device=x.device)
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16, use_fast_accum=False
    )


PRODUCTS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], Callable[[], object]]] = {
    "float32": _plain(torch.float32),
    "bf16": _plain(torch.bfloat16),
    "int8": _int8,
    "fp8": _fp8,
}
"""From x [M, K] and weight [N, K] to their product by a library, ready to be called."""

KINDS = {"cpu": ("float32", "bf16"), "cuda": ("bf16", "int8", "fp8")}
