"""The ceiling: no more device memory than was stated, or an out-of-memory error that the ladder can climb down from."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FIXED_MARGIN_BYTES = 64 << 20
"""What CUDA takes beside its context and the allocator: library handles and kernels loaded on the way."""

Ceiling = Callable[[], contextlib.AbstractContextManager[object]]


class AllocationMeter(TorchDispatchMode):
    """Counts the bytes of storages that operations make, as long as they live, and refuses what goes above a limit.

    Memory that no operation made (the host arena, mapped files) does not count: it is host memory, not the device's.

    Args:
        limit_bytes: most bytes that may be alive; None only counts.
        meta: count tensors on the meta device as if they had memory, which measures a model without having it.

    Attributes:
        live: bytes alive now.
        peak: most bytes alive after any operation.
        allocations: operations that made a storage.
    """

    def __init__(self, limit_bytes: int | None = None, *, meta: bool = True) -> None:
        super().__init__()
        self._meta = meta
        self.limit_bytes = limit_bytes
        self.live = self.peak = self.allocations = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operation and count what it made; what comes in unknown was made by none."""
        self._watch((args, kwargs), counted=False)
        result = func(*args, **(kwargs or {}))
        if self._watch(result, counted=True):
            self._allocated()
        return result

    def _watch(self, tree: Any, *, counted: bool) -> bool:
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        storages = [each.untyped_storage() for each in tensors if self._meta or not each.is_meta]
        fresh = {storage._cdata: storage for storage in storages if storage._cdata not in self._known}
        for key, storage in fresh.items():
            nbytes = storage.nbytes() if counted else 0
            self._known.add(key)
            self.live += nbytes
            weakref.finalize(storage, self._gone, key, nbytes).atexit = False
        return bool(fresh)

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes

    def _allocated(self) -> None:
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
        meter = AllocationMeter(limit_bytes, meta=False)
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
