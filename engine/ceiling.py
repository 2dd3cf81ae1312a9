"""The ceiling: no more device memory than was stated, or an out-of-memory error that the ladder can climb down from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FIXED_MARGIN_BYTES = 64 << 20
"""What CUDA takes beside its context and the allocator: library handles and kernels loaded on the way."""

Ceiling = Callable[[], contextlib.AbstractContextManager[object]]


class AllocationMeter(TorchDispatchMode):
    """Counts the storages that operations make on a CPU, and refuses what goes above a limit.

    Memory that no operation made (the host arena, mapped files) does not count: it is host memory, not the device's.

    Args:
        limit_bytes: most bytes that may be alive; None only counts.

    Attributes:
        live: bytes alive after the last operation.
        peak: most bytes alive after any operation.
        allocations: operations that made a storage.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes
        self.live = self.peak = self.allocations = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operation and count what it made."""
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        fresh = self._fresh(result, given)
        if fresh:
            self._count(fresh)
        return result

    def _fresh(self, result: Any, given: set[int]) -> dict[int, tuple[StorageWeakRef, int]]:
        found = {}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    found[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return found

    def _count(self, fresh: dict[int, tuple[StorageWeakRef, int]]) -> None:
        alive = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        self._storages = alive | fresh
        self.live = sum(size for _, size in self._storages.values())
        self.allocations += 1
        if self.limit_bytes is not None and self.live > self.limit_bytes:
            raise torch.OutOfMemoryError(f"{self.live} bytes are alive, {self.limit_bytes} are allowed")
        self.peak = max(self.peak, self.live)


def no_ceiling() -> contextlib.AbstractContextManager[object]:
    """Nothing is counted."""
    return contextlib.nullcontext()


def make_ceiling(device: torch.device, limit_bytes: int | None, context_bytes: int) -> Ceiling:
    """What to work inside of, so that the device never holds more than ``limit_bytes``.

    On CUDA it is the allocator's limit, which holds for the whole process while work is done and is put back after:
    (limit - context - margin) / total. On a CPU every operation is counted.

    Args:
        device: the device.
        limit_bytes: the ceiling, context included; None is no ceiling.
        context_bytes: what the context takes.
    """
    if limit_bytes is None:
        return no_ceiling
    if device.type == "cpu":
        meter = AllocationMeter(limit_bytes)
        return lambda: meter
    return lambda: _allocator_limit(device, limit_bytes - context_bytes - FIXED_MARGIN_BYTES)


@contextlib.contextmanager
def _allocator_limit(device: torch.device, nbytes: int) -> Iterator[None]:
    total = torch.cuda.get_device_properties(device).total_memory
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, nbytes / total)), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def is_out_of_memory(error: BaseException) -> bool:
    """The device (or torch's CPU allocator) could not give memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )
