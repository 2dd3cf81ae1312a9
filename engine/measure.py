"""What the device and the host have now: the facts that a plan is made of."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plan import DeviceFacts

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


def device_facts(device: torch.device) -> DeviceFacts:
    """The device as it is now; a CUDA device is asked for its context, which starts one."""
    total, free = host_memory() or (1 << 62, 1 << 62)
    process = resident_bytes()
    probes: dict[str, Any] = {} if process is None else {"process_bytes": process}
    if device.type == "cpu":
        return DeviceFacts(
            kind="cpu",
            total_bytes=total,
            free_bytes=free,
            host_total_bytes=total,
            host_free_bytes=free + (process or 0),
            probes=probes,
        )
    return _cuda_facts(device, total, free + (process or 0), probes)


def _cuda_facts(device: torch.device, host_total: int, host_free: int, probes: dict[str, Any]) -> DeviceFacts:
    import torch

    index = device.index or 0
    major, minor = torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    reserved = torch.cuda.memory_reserved(index)
    context = _context_bytes(index, reserved)
    return DeviceFacts(
        kind="cuda",
        name=torch.cuda.get_device_name(index),
        architecture=10 * major + minor,
        total_bytes=total,
        free_bytes=free + reserved + context,
        context_bytes=context,
        host_total_bytes=host_total,
        host_free_bytes=host_free,
        probes=probes,
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
