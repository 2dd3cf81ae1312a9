"""Moving slabs into slots: a thread where the device is the CPU, a copy stream where it is a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any, Protocol

import torch

from .host import CPU, Host
from .schedule import Copy

BOUNCE_BUFFERS = 2
"""One is filled while the other is copied; this hides the read as well as any number does."""

Record = list[tuple[int, int, int]]
"""Counter, block and slot of each copy that happened."""


class Copier(Protocol):
    """Executes the copies of a ring; `wait` and `release` order them against what the current stream runs.

    Attributes:
        host_bytes: page-locked buffers that the copier holds beside the slabs.
    """

    host_bytes: int

    def copy(self, op: Copy) -> None:
        """Start a copy and return at once; its slot's last reader has been released."""
        ...

    def wait(self, counter: int) -> None:
        """Order all later work after copy `counter`; raises what the copy raised."""
        ...

    def release(self, counter: int) -> None:
        """All work that reads the slot of copy `counter` has been enqueued."""
        ...

    def drain(self) -> None:
        """Drop copies that have not begun, wait for those that have, and free every slot for new copies."""
        ...

    def close(self) -> None:
        """Drain and end the copy thread. May be called again."""
        ...


class _Worker:
    """One thread that runs jobs in order; it starts with the first job."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qengine-copy")
        self._jobs: dict[int, Future[None]] = {}

    def start(self, counter: int, run: Callable[[], None]) -> None:
        self._jobs[counter] = self._thread.submit(run)

    def finish(self, counter: int) -> None:
        """Return when the job has run, if there was one; raise what it raised."""
        job = self._jobs.get(counter)
        if job is not None:
            job.result()
            del self._jobs[counter]

    def drain(self) -> None:
        for job in self._jobs.values():
            job.cancel()
        wait_for(self._jobs.values())
        self._jobs.clear()

    def close(self) -> None:
        self.drain()
        self._thread.shutdown()


class ThreadCopier:
    """Copies on a thread into slots in host memory.

    A visit on the CPU has ended when it has been enqueued, so releasing a slot needs no work.

    Args:
        host: where slabs are read from.
        slots: uint8 tensors, each as large as the largest streamed slab.
        sizes: bytes of each block's slab.
        record: gets counter, block and slot of each finished copy.
        delay_seconds: time that each copy takes on top; for tests and for imitating a slow link.
    """

    def __init__(
        self,
        host: Host,
        slots: Sequence[torch.Tensor],
        sizes: Sequence[int],
        record: Record,
        *,
        delay_seconds: float = 0.0,
    ) -> None:
        self.host_bytes = 0
        self._host, self._slots, self._sizes, self._record = host, slots, sizes, record
        self._delay_seconds = delay_seconds
        self._worker = _Worker()

    def copy(self, op: Copy) -> None:
        """Hand the copy to the thread."""
        self._worker.start(op.counter, lambda: self._fill(op))

    @torch.inference_mode()
    def _fill(self, op: Copy) -> None:
        time.sleep(self._delay_seconds)
        self._host.read(op.block, self._slots[op.slot][: self._sizes[op.block]])
        self._record.append((op.counter, op.block, op.slot))

    def wait(self, counter: int) -> None:
        """Wait for the thread."""
        self._worker.finish(counter)

    def release(self, counter: int) -> None:
        """Nothing to do: the visit has ended."""

    def drain(self) -> None:
        """Wait for the copy under way and drop the others."""
        self._worker.drain()

    def close(self) -> None:
        """Drain and join the thread."""
        self._worker.close()


def pinned_bytes(nbytes: int) -> torch.Tensor:
    """Page-locked host memory, uint8 [nbytes], from torch's pinned allocator."""
    return torch.empty(nbytes, dtype=torch.uint8, device=CPU, pin_memory=True)


class CudaCopier:
    """Copies on one stream, ordered against the current stream by events alone.

    Per slot there are two events: `copied`, which the readers' stream waits for, and `freed`, recorded after the last
    reader, which the next copy waits for. Page-locked slabs are copied as they lie. Others are first read into one of
    two bounce buffers by a thread, which also waits there until the buffer's copy before has ended; the thread that
    runs the sweep never waits for the device, only for a read that is late.

    Args:
        host: where slabs lie.
        slots: uint8 tensors on the device, each as large as the largest streamed slab.
        sizes: bytes of each block's slab.
        record: gets counter, block and slot of each copy when it is enqueued.
        cuda: ``torch.cuda``.
        pin: allocates a bounce buffer.
    """

    def __init__(
        self,
        host: Host,
        slots: Sequence[torch.Tensor],
        sizes: Sequence[int],
        record: Record,
        *,
        cuda: Any = torch.cuda,
        pin: Callable[[int], torch.Tensor] = pinned_bytes,
    ) -> None:
        self._host, self._slots, self._sizes, self._record = host, slots, sizes, record
        self._cuda, self._device = cuda, slots[0].device
        self._stream = cuda.Stream(device=self._device)
        self._copied = [cuda.Event() for _ in slots]
        self._freed = [cuda.Event() for _ in slots]
        self._slot_of: dict[int, int] = {}
        buffers = [pin(slots[0].nbytes) for _ in range(BOUNCE_BUFFERS)] if host.bounces else []
        self._bounce = [(buffer, cuda.Event(blocking=True)) for buffer in buffers]
        self.host_bytes = sum(buffer.untyped_storage().nbytes() for buffer in buffers)
        self._worker = _Worker()
        self._free_all()

    def _free_all(self) -> None:
        """Let the next copy into each slot wait for all that is enqueued now, the slot's allocation included."""
        for event in self._freed:
            event.record(self._cuda.current_stream(self._device))

    def copy(self, op: Copy) -> None:
        """Enqueue the copy, or hand it to the thread that reads the slab first."""
        self._slot_of[op.counter] = op.slot
        slab = self._host.locked(op.block)
        if slab is not None:
            self._enqueue(op, slab)
        else:
            self._worker.start(op.counter, lambda: self._bounce_and_enqueue(op))

    @torch.inference_mode()
    def _bounce_and_enqueue(self, op: Copy) -> None:
        buffer, idle = self._bounce[op.counter % BOUNCE_BUFFERS]
        slab = buffer[: self._sizes[op.block]]
        idle.synchronize()
        self._host.read(op.block, slab)
        self._enqueue(op, slab)
        idle.record(self._stream)

    @torch.inference_mode()
    def _enqueue(self, op: Copy, slab: torch.Tensor) -> None:
        with self._cuda.stream(self._stream):
            self._stream.wait_event(self._freed[op.slot])
            self._slots[op.slot][: slab.numel()].copy_(slab, non_blocking=True)
            self._copied[op.slot].record(self._stream)
        self._record.append((op.counter, op.block, op.slot))

    def wait(self, counter: int) -> None:
        """Let the current stream wait for the copy; waiting on an event not yet recorded would be no wait at all."""
        self._worker.finish(counter)
        self._cuda.current_stream(self._device).wait_event(self._copied[self._slot_of[counter]])

    def release(self, counter: int) -> None:
        """Record on the current stream that the slot has had its last reader."""
        self._freed[self._slot_of.pop(counter)].record(self._cuda.current_stream(self._device))

    def drain(self) -> None:
        """Wait for the thread and the copy stream; readers still enqueued hold their slots."""
        self._worker.drain()
        self._stream.synchronize()
        self._slot_of.clear()
        self._free_all()

    def close(self) -> None:
        """Drain and join the thread."""
        self.drain()
        self._worker.close()
