"""What the device and the host have now: the facts that a plan is made of."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..kernels import native
from .plan import Choices, DeviceFacts, JobFacts, ModelFacts
from .plan.kernels import products

if TYPE_CHECKING:
    import torch


def host_memory() -> tuple[int, int] | None:
    """(total, free) bytes of RAM, free being what a program could still get; None where the system does not say."""
    if sys.platform == "win32":
        return _windows_memory()
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    values = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines)}
    if "MemAvailable" not in values:
        return None
    return int(values["MemTotal"]) * 1024, int(values["MemAvailable"]) * 1024


def resident_bytes() -> int | None:
    """Memory that this process holds, or None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


class _MemoryStatus(ctypes.Structure):
    _fields_ = [
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "free", "page_total", "page_free", "v_total", "v_free", "ext")),
    ]


def _windows_memory() -> tuple[int, int] | None:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    kernel = ctypes.WinDLL("kernel32") if sys.platform == "win32" else None
    if kernel is None or not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.total), int(status.free)


def host_facts(process_bytes: int | None = None) -> DeviceFacts:
    """The host as a device; needs no torch.

    Args:
        process_bytes: what this process holds already, where it is the one that will run.
    """
    total, free = host_memory() or (1 << 62, 1 << 62)
    missing = native.reason()
    return DeviceFacts(
        kind="cpu",
        total_bytes=total,
        free_bytes=free,
        host_total_bytes=total,
        host_free_bytes=free + (process_bytes or 0),
        probes={} if process_bytes is None else {"process_bytes": process_bytes},
        unusable={"native": missing} if missing else {},
    )


def device_facts(device: torch.device) -> DeviceFacts:
    """The device as it is now; a CUDA device is asked for its context, which starts one."""
    host = host_facts(resident_bytes())
    return host if device.type == "cpu" else _cuda_facts(device, host)


def facts_for(device: torch.device, model: ModelFacts, job: JobFacts, choices: Choices) -> DeviceFacts:
    """The device as it is now, with what was tried on it for the kernels that a run could use.

    Raises:
        PlanError: there is no memory to try a kernel.
    """
    from .probes import unusable

    facts = device_facts(device)
    return replace(facts, unusable=unusable(device, choices.attention, products(model, job, facts, choices)))


def _cuda_facts(device: torch.device, host: DeviceFacts) -> DeviceFacts:
    import torch

    index = device.index or 0
    major, minor = torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    reserved = torch.cuda.memory_reserved(index)
    context = _context_bytes(index, reserved)
    return replace(
        host,
        kind="cuda",
        name=torch.cuda.get_device_name(index),
        architecture=10 * major + minor,
        total_bytes=total,
        free_bytes=free + reserved + context,
        context_bytes=context,
    )


CONTEXT_BYTES = 600 << 20
"""What a CUDA context takes where the driver does not report memory per process."""


def _context_bytes(index: int, reserved: int) -> int:
    """Memory of this process on the card beyond the allocator's, by NVML; a bound where it does not say."""
    try:
        pynvml = import_module("pynvml")
    except ImportError:
        return CONTEXT_BYTES
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return CONTEXT_BYTES
    used = next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)
    return CONTEXT_BYTES if used is None else max(0, used - reserved)
