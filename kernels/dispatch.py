"""Which implementation of an op runs on a machine: decided once, when a run is planned, and never from timing.

Torch-free, so that a plan can be made from headers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..errors import KernelError

IMPLEMENTATIONS = ("reference", "triton", "native")
OLDEST_TRITON = 80
"""Compute capability from which on every Triton kernel here is compiled and checked."""

OLDEST_FP8, OLDEST_INT8, OLDEST_FLASH = 89, 75, 80
"""Compute capabilities from which on there are tensor cores for e4m3 and for int8, and kernels of flash attention."""

OPS: Mapping[str, tuple[str, ...]] = {
    "quant": ("triton", "native", "reference"),
    "linear_int8": ("triton", "int_mm", "reference"),
    "linear_fp8": ("scaled_mm", "triton", "triton-w8a16", "dequantise"),
    "modulate": ("triton", "reference"),
    "rope": ("triton", "reference"),
    "guidance": ("triton", "reference"),
    "normalise": ("triton", "native", "reference"),
    "rcm": ("triton", "native", "reference"),
    "attention": ("sdpa-flash", "sdpa-efficient", "sdpa", "math", "flash", "xformers", "sage"),
}
"""Implementations of each op, the preferred first; the last three of attention run only where they are asked for."""

SAFE: Mapping[str, str] = MappingProxyType({"linear_fp8": "dequantise", "attention": "math"})
"""The implementation of an op that is its definition, where that is not called ``reference``."""

_WORKS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Machine:
    """What decides between implementations.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        architecture: compute capability as a number, 86 for 8.6; None on a CPU.
        triton: why Triton cannot be used; empty where it can.
        native: why the native library cannot be used; empty where it can.
        dtype: compute dtype, ``float32`` or ``bfloat16``.
        unusable: why other implementations cannot be used, by their names; one that is not named can.
    """

    kind: str
    architecture: int | None = None
    triton: str = ""
    native: str = ""
    dtype: str = "bfloat16"
    unusable: Mapping[str, str] = field(default_factory=lambda: _WORKS)


def definition(op: str) -> str:
    """The implementation that is the definition of an op; it runs everywhere."""
    return SAFE.get(op, "reference")


def reasons(op: str, machine: Machine) -> dict[str, str]:
    """Why each implementation of an op cannot run on a machine; empty text where it can.

    Raises:
        KernelError: no such op.
    """
    if op not in OPS:
        raise KernelError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    return {name: _reason(op, name, machine) for name in OPS[op]}


def choose(op: str, machine: Machine, pinned: str | None = None) -> str:
    """The implementation of an op: the one that is pinned, else the first that can run.

    Raises:
        KernelError: no such op or implementation, or the pinned one cannot run; the message gives every reason.
    """
    found = reasons(op, machine)
    if pinned is None:
        return next(name for name, reason in found.items() if not reason)
    if found.get(pinned) == "":
        return pinned
    said = "; ".join(f"{name}: {reason or 'can run'}" for name, reason in found.items())
    raise KernelError(f"implementation of {op} must be one that can run here ({said}), got {pinned!r}")


def _reason(op: str, name: str, machine: Machine) -> str:
    rule = _RULES.get(f"{op}/{name}") or _RULES.get(name)
    return "" if rule is None else rule(machine)


def _on_card(machine: Machine, least: int, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> str:
    if machine.kind != "cuda":
        return f"needs a CUDA device, not {machine.kind}"
    found = machine.architecture or 0
    if found < least:
        return f"needs compute capability {least / 10:.1f}, not {found / 10:.1f}"
    return "" if machine.dtype in dtypes else f"needs {' or '.join(dtypes)}, not {machine.dtype}"


def _triton(least: int) -> Callable[[Machine], str]:
    return lambda machine: _on_card(machine, least) or machine.triton


def _probed(name: str, least: int, *dtypes: str) -> Callable[[Machine], str]:
    return lambda machine: _on_card(machine, least, dtypes or ("float32", "bfloat16")) or machine.unusable.get(name, "")


def _native(machine: Machine) -> str:
    return machine.native if machine.kind == "cpu" else f"runs on a CPU, not on {machine.kind}"


def _sdpa(machine: Machine) -> str:
    return "" if machine.kind == "cpu" else f"on {machine.kind} a kernel of it is named, not left to torch"


_RULES: Mapping[str, Callable[[Machine], str]] = {
    "triton": _triton(OLDEST_TRITON),
    "linear_fp8/triton": _triton(OLDEST_FP8),
    "triton-w8a16": _triton(OLDEST_TRITON),
    "native": _native,
    "scaled_mm": _probed("scaled_mm", OLDEST_FP8, "bfloat16"),
    "int_mm": _probed("int_mm", OLDEST_INT8),
    "sdpa": _sdpa,
    "sdpa-flash": _probed("sdpa-flash", OLDEST_FLASH, "bfloat16"),
    "sdpa-efficient": _probed("sdpa-efficient", 0),
    "flash": _probed("flash", OLDEST_FLASH, "bfloat16"),
    "xformers": _probed("xformers", 0),
    "sage": _probed("sage", OLDEST_FLASH, "bfloat16"),
}
"""By ``op/implementation``, else by implementation; what is not here runs everywhere."""
