"""Cases of every op: what is called, what it should give, its eager rival and the physical limit of its work.

One module per op, each with ``CASES``, the smallest first; ``LARGE`` names those that take a card, if any. A
pytest-benchmark file is then

    @pytest.mark.parametrize("case", listed("modulate"))
    def test_modulate(benchmark, case):
        measure(benchmark, "modulate", case)

and the run on a real card takes the same cases.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from ...engine.probes import triton
from ...errors import KernelError
from ...kernels import native
from ...kernels.dispatch import OPS, Machine, choose
from ..limits import copies, fastest, gemms
from ..rivals import in_turns, ratio

Maker = Callable[[torch.device, torch.Generator], "Case"]
"""Makes a case on a device from fresh random inputs."""

SECONDS = 8.0
"""What the rounds of one case may take together, after a first one."""

ROUNDS = (3, 20)
POISON = 0xFF
"""A byte of which NaN is made in every float format, and -1 in every integer."""


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
        implementation: the one that ``call`` uses, where it is not the only one.
    """

    call: Callable[[], torch.Tensor]
    expected: torch.Tensor
    eager: Callable[[], torch.Tensor]
    limit: Literal["copy", "gemm"]
    work: int | tuple[int, int, int]
    bound: float
    implementation: str = ""


def names() -> tuple[str, ...]:
    """The ops that have cases."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__"))


def cases(op: str) -> Mapping[str, Maker]:
    """Makers of an op's cases by name, e.g. ``8192x3072``, the smallest first."""
    return _module(op).CASES


def listed(op: str, device: torch.device | None = None) -> tuple[str, ...]:
    """Names of the cases that a device can run in seconds: all on CUDA, all but ``LARGE`` on a CPU."""
    large = () if (device or here()).type == "cuda" else getattr(_module(op), "LARGE", ())
    return tuple(name for name in cases(op) if name not in large)


def _module(op: str) -> Any:
    if op not in names():
        raise KernelError(f"op must be one of {', '.join(names())}, got {op!r}")
    return import_module(f".{op}", __package__)


def here() -> torch.device:
    """The card if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


_PIN: ContextVar[str] = ContextVar("pin", default="")


@contextmanager
def pinned(implementation: str) -> Iterator[None]:
    """Inside, :func:`planned` gives this implementation for the ops that have it; "" pins nothing."""
    token = _PIN.set(implementation)
    try:
        yield
    finally:
        _PIN.reset(token)


def planned(op: str, device: torch.device, dtype: str = "bfloat16") -> str:
    """The implementation of an op that a plan prefers on a device, or the pinned one.

    Products of libraries count as working.

    Args:
        op: as ``kernels.dispatch`` names it.
        device: where it runs.
        dtype: compute dtype.

    Raises:
        KernelError: the pinned one cannot run here; the message says why.
    """
    pin = _PIN.get()
    return choose(op, machine_of(device, dtype), pin if pin in OPS[op] else None)


def machine_of(device: torch.device, dtype: str = "bfloat16") -> Machine:
    """What decides between implementations on a device."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    architecture = None if capability is None else 10 * capability[0] + capability[1]
    return Machine(device.type, architecture, triton(), native.reason(), dtype)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """``|out - expected| / |expected|``, 0 where both are equal; NaN is never below a bound."""
    off = float((out.double() - expected.double()).norm())
    return off and off / float(expected.double().norm())


def check(op: str, name: str, device: torch.device) -> tuple[Case, dict[str, Any]]:
    """Make a case from a fresh seed, call it over poisoned memory, and compare.

    Returns:
        The case, and ``op``, ``case``, ``seed``, ``error`` and ``bound``.

    Raises:
        KernelError: the result is of another shape, or further from ``expected`` than the case allows.
    """
    seed = secrets.randbits(32)
    case = cases(op)[name](device, torch.Generator(device).manual_seed(seed))
    _poison(case.expected)
    out = case.call()
    if out.shape != case.expected.shape:
        raise KernelError(f"{op} {name} must give {list(case.expected.shape)}, got {list(out.shape)}")
    found = error(out, case.expected)
    if not found <= case.bound:
        raise KernelError(f"error of {op} {name} must be at most {case.bound:.3g}, got {found:.3g} (seed {seed})")
    told = {"op": op, "case": name, "seed": seed, "error": found, "bound": case.bound}
    return case, told | ({"implementation": case.implementation} if case.implementation else {})


def _poison(expected: torch.Tensor) -> None:
    """Fill what an allocator hands out next for a result of this size."""
    for size in (4, 2, 1):
        torch.full((expected.numel() * size,), POISON, dtype=torch.uint8, device=expected.device)


def timings(case: Case, device: torch.device, seconds: float = SECONDS) -> dict[str, Any]:
    """Seconds of the op, its rival and its limit, in turns, and the medians of the rounds' ratios.

    Args:
        case: what is measured, checked before.
        device: where it runs.
        seconds: what the rounds may take together; there are at least 3 and at most 20.
    """
    runs = limit_runs(case, device)
    limit = fastest(runs, device)[0]
    sides = (case.call, case.eager, runs[limit])
    once = sum(min(found) for found in in_turns(sides, rounds=1, device=device))
    rounds = min(ROUNDS[1], max(ROUNDS[0], int(seconds / once)))
    ours, theirs, bound = in_turns(sides, rounds=rounds, warmup=2, device=device, calls=None)
    return {
        "ours_seconds": min(ours),
        "rival_seconds": min(theirs),
        "speedup": ratio(theirs, ours),
        "limit": case.limit if limit == "copy" else f"{case.limit} {limit}",
        "limit_seconds": min(bound),
        "fraction_of_limit": ratio(bound, ours),
    }


def limit_runs(case: Case, device: torch.device) -> Mapping[str, Callable[[], object]]:
    """What the limit of a case is measured by.

    Raises:
        KernelError: the work does not fit the limit.
    """
    if case.limit == "copy" and isinstance(case.work, int):
        return copies(case.work, device)
    if case.limit == "gemm" and isinstance(case.work, tuple):
        return gemms(*case.work, device)
    raise KernelError(f"work must be bytes for copy and (M, N, K) for gemm, got {case.work} for {case.limit}")


def measure(benchmark: Any, op: str, case_name: str) -> None:
    """Check a case, then time it beside its rival and its limit; the figures go into ``benchmark.extra_info``.

    They are ``op, case, seed, error, bound``, ``ours_seconds, rival_seconds, speedup`` and ``limit, limit_seconds,
    fraction_of_limit``: least seconds of the rounds, medians of the rounds' ratios.

    Args:
        benchmark: pytest-benchmark's fixture.
        op: name of the op.
        case_name: one of ``listed(op)``.

    Raises:
        KernelError: the result is wrong; nothing is timed then.
    """
    device = here()
    case, checked = check(op, case_name, device)
    benchmark.extra_info |= checked | timings(case, device)

    def whole() -> None:
        case.call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.pedantic(whole, rounds=ROUNDS[0])
