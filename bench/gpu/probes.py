"""What the machine can do: device, link and matrix rates, measured before anything is judged by them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch

from ...engine.measure import device_facts, host_memory
from ...engine.mover.host import anonymous
from ..clock import median_seconds
from ..limits import PRODUCTS
from .worker import Line, Run, pick_device, serve

CASES = ("device", "link", "bf16", "fp8", "int8")
LINK_BYTES = 1 << 30
TOY_BYTES = 1 << 20
SHAPES = tuple((rows, k, n) for rows in (8192, 250) for k, n in ((3072, 3072), (3072, 12288), (12288, 3072)))
TOY_SHAPES = ((32, 64, 64),)


def probes(toy: bool) -> Run:
    """What runs a probe by name."""
    device = pick_device(toy)
    shapes = TOY_SHAPES if toy else SHAPES

    def run(case: str) -> Iterator[Line]:
        if case == "device":
            yield describe(device)
        elif case == "link":
            yield link(device, TOY_BYTES if toy else LINK_BYTES)
        else:
            for rows, columns, outputs in shapes:
                yield product(case, device, rows, columns, outputs)

    return run


def describe(device: torch.device) -> Line:
    """The device, its driver, and what a context takes."""
    facts, (host_total, host_free) = device_facts(device), host_memory() or (0, 0)
    return {
        "device": facts.name or "cpu",
        "architecture": facts.architecture,
        "total_bytes": facts.total_bytes,
        "context_bytes": facts.context_bytes,
        "host_total_bytes": host_total,
        "host_free_bytes": host_free,
        "cuda": torch.version.cuda,
        **_driver(device),
    }


def _driver(device: torch.device) -> dict[str, Any]:
    """Driver version, and whether it tells what each process holds."""
    if device.type != "cuda":
        return {"driver": None, "nvml": False}
    try:
        pynvml = import_module("pynvml")
    except ImportError:
        return {"driver": None, "nvml": False}
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        held = [process.usedGpuMemory for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
        return {"driver": str(pynvml.nvmlSystemGetDriverVersion()), "nvml": any(size is not None for size in held)}
    except pynvml.NVMLError as error:
        return {"driver": None, "nvml": False, "nvml_error": str(error)}


def link(device: torch.device, nbytes: int) -> Line:
    """Bytes per second from host to device, by kind of host memory, and whether memory can be registered."""
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    pageable = anonymous(nbytes).fill_(1)
    found: dict[str, Any] = {"nbytes": nbytes, "pageable": _bandwidth(target, pageable)}
    if device.type != "cuda":
        return {**found, "registered": None, "pinned": None, "register_error": "no CUDA device"}
    pinned = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)
    found["pinned"] = _bandwidth(target, pinned)
    cudart: Any = torch.cuda.cudart()
    code = int(cudart.cudaHostRegister(pageable.data_ptr(), nbytes, 0))
    if code:
        return {**found, "registered": None, "register_error": f"cudaHostRegister returned error {code}"}
    found["registered"] = _bandwidth(target, pageable)
    cudart.cudaHostUnregister(pageable.data_ptr())
    return {**found, "register_error": None}


def _bandwidth(target: torch.Tensor, source: torch.Tensor) -> float:
    return target.nbytes / median_seconds(lambda: target.copy_(source, non_blocking=True), target.device)


def link_bytes_per_second(line: Line) -> float:
    """The best that streamed slabs can get: registered memory, or pinned bounce buffers where it is refused."""
    return line["registered"] or line["pinned"] or line["pageable"]


def product(kind: str, device: torch.device, rows: int, columns: int, outputs: int) -> Line:
    """Whether [rows, columns] times [columns, outputs] works in a number format, and its rate."""
    x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    weight = torch.randn(outputs, columns, device=device, dtype=torch.bfloat16)
    shape = {"shape": [rows, columns, outputs]}
    try:
        seconds = median_seconds(PRODUCTS[kind](x, weight), device, 10)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return {**shape, "works": False, "error": str(error).split("\n")[0]}
    return {**shape, "works": True, "seconds": seconds, "tflops": 2e-12 * rows * columns * outputs / seconds}


if __name__ == "__main__":
    serve(probes)
