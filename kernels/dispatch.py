"""Which implementation of an op runs on a machine: decided once, when a run is planned, and never from timing.

Torch-free, so that a plan can be made from headers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import KernelError

IMPLEMENTATIONS = ("reference", "triton", "native")
OLDEST_TRITON = 80
"""Compute capability from which on every Triton kernel here is compiled and checked."""

OPS: Mapping[str, tuple[str, ...]] = {
    "quant": ("triton", "native", "reference"),
    "linear_int8": ("triton", "reference"),
    "linear_fp8": ("triton", "reference"),
    "modulate": ("triton", "reference"),
    "rope": ("triton", "reference"),
    "guidance": ("triton", "reference"),
    "normalise": ("triton", "native", "reference"),
    "rcm": ("triton", "native", "reference"),
}
"""Implementations of each op, the preferred first."""


@dataclass(frozen=True)
class Machine:
    """What decides between implementations.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        architecture: compute capability as a number, 86 for 8.6; None on a CPU.
        triton: why Triton cannot be used; empty where it can.
        native: why the native library cannot be used; empty where it can.
    """

    kind: str
    architecture: int | None = None
    triton: str = ""
    native: str = ""


def reasons(op: str, machine: Machine) -> dict[str, str]:
    """Why each implementation of an op cannot run on a machine; empty text where it can.

    Raises:
        KernelError: no such op.
    """
    if op not in OPS:
        raise KernelError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    return {name: _reason(name, machine) for name in OPS[op]}


def _reason(name: str, machine: Machine) -> str:
    if name == "triton":
        if machine.kind != "cuda":
            return f"needs a CUDA device, not {machine.kind}"
        if (machine.architecture or 0) < OLDEST_TRITON:
            return f"needs compute capability 8.0, not {(machine.architecture or 0) / 10:.1f}"
        return machine.triton
    if name == "native":
        return machine.native if machine.kind == "cpu" else f"runs on a CPU, not on {machine.kind}"
    return ""


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
