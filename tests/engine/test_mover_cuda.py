"""The CUDA copier against a model of streams and events, in which copies run as late as they may.

Each stream counts its operations and knows how far into the other one it has waited (a vector clock), so "this copy
comes after that reader" is a comparison of numbers, and a missing event is a failure whatever the timing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from qengine.engine.layout import SlabLayout
from qengine.engine.mover import CudaCopier, Disk, HostArena, Placement, Tape, spread
from qengine.engine.template import aligned_bytes
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
BLOCKS = 5
LAYOUTS = [SlabLayout.of({"a": ((600,), "F32"), "b": ((9,), "BF16")})] * 4 + [SlabLayout.of({"a": ((600,), "F32")})]
POISON = 0xFF


class FakeStream:
    """Counts operations; those of the copy stream run only when somebody waits for them."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name
        self.clock = {"compute": 0, "copy": 0}
        self.late: list[tuple[int, Callable[[], object]]] = []

    def tick(self) -> int:
        self.clock[self.name] += 1
        return self.clock[self.name]

    def run_until(self, tick: int) -> None:
        with self.cuda.lock:
            while self.late and self.late[0][0] <= tick:
                self.late.pop(0)[1]()

    def wait_event(self, event: FakeEvent) -> None:
        assert event.seen is not None, "waiting for an event not yet recorded is no wait"
        self.cuda.calls.append(f"{self.name} waits")
        self.clock = {name: max(ticks, event.seen[name]) for name, ticks in self.clock.items()}
        if self.name == "compute":
            self.cuda.copy_stream.run_until(event.seen["copy"])

    def synchronize(self) -> None:
        self.cuda.forbid_in_sweep("stream")
        self.run_until(self.clock[self.name])


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.seen = cuda, None

    def record(self, stream: FakeStream) -> None:
        self.cuda.calls.append(f"recorded on {stream.name}")
        stream.tick()
        self.seen = dict(stream.clock)

    def synchronize(self) -> None:
        self.cuda.forbid_in_sweep("event")
        if self.seen is not None:
            self.cuda.copy_stream.run_until(self.seen["copy"])


class FakeCuda:
    """Stands in for ``torch.cuda``; the thread that made it may not synchronise while `sweeping`, except to drain."""

    def __init__(self) -> None:
        self.compute = FakeStream(self, "compute")
        self.copy_stream = FakeStream(self, "copy")
        self.active = threading.local()
        self.thread, self.lock = threading.current_thread(), threading.Lock()
        self.sweeping = False
        self.calls: list[str] = []

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802
        return self.copy_stream

    def Event(self, blocking: bool = False) -> FakeEvent:  # noqa: N802
        return FakeEvent(self)

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.compute

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.active.stream = stream
        yield
        self.active.stream = self.compute

    def forbid_in_sweep(self, what: str) -> None:
        assert not (self.sweeping and threading.current_thread() is self.thread), f"the host waited for a {what}"


class Slot:
    """Device memory: only asynchronous copies on the copy stream, and never before the last reader."""

    def __init__(self, cuda: FakeCuda, tensor: torch.Tensor) -> None:
        self.cuda, self.tensor = cuda, tensor
        self.device, self.nbytes = tensor.device, tensor.nbytes
        self.address = tensor.data_ptr()
        self.read_at = self.filled_at = 0
        tensor.fill_(POISON)

    def __getitem__(self, cut: slice) -> _Cut:
        return _Cut(self, self.tensor[cut])

    def visit(self) -> None:
        assert self.cuda.compute.clock["copy"] >= self.filled_at > 0, "a visit did not wait for its copy"
        self.read_at = self.cuda.compute.tick()


class _Cut:
    def __init__(self, slot: Slot, tensor: torch.Tensor) -> None:
        self.slot, self.tensor = slot, tensor

    def copy_(self, slab: torch.Tensor, *, non_blocking: bool) -> None:
        slot, stream = self.slot, self.slot.cuda.active.stream
        assert non_blocking and stream is slot.cuda.copy_stream and slab.nbytes == self.tensor.nbytes
        assert stream.clock["compute"] >= slot.read_at, "a slot was refilled before its last reader"
        self.slot.cuda.calls.append("copied")
        slot.filled_at = stream.tick()
        stream.late.append((slot.filled_at, lambda: self.tensor.copy_(slab)))


class FakeCudart:
    def __init__(self, refuse: int = 0) -> None:
        self.refuse, self.registered, self.past = refuse, {}, []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        if not self.refuse:
            self.registered[address] = nbytes
            self.past.append(nbytes)
        return self.refuse

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0


class MemorySource:
    def __init__(self) -> None:
        self.slabs = [torch.randint(0, 120, (layout.nbytes,), dtype=torch.uint8) for layout in LAYOUTS]

    def read(self, index: int, into: torch.Tensor) -> None:
        into.fill_(POISON)
        into.copy_(self.slabs[index])


class NoHostReads(TorchDispatchMode):
    """Raises where a tensor's value is asked for, which on a GPU stops the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host read a value"
        return func(*args, **(kwargs or {}))


HOSTS = {
    "locked": lambda source: HostArena(source, LAYOUTS, CPU, FakeCudart()),
    "refused": lambda source: HostArena(source, LAYOUTS, CPU, FakeCudart(refuse=2)),
    "disk": Disk,
}


class Machine:
    """A tape whose device is the model."""

    def __init__(self, streamed: int, slots: int = 2, host: str = "locked", copier: type[CudaCopier] = CudaCopier):
        self.cuda, self.source = FakeCuda(), MemorySource()
        self.host, self.copier = HOSTS[host](self.source), copier
        self.placement = Placement(BLOCKS, spread(BLOCKS, streamed), slots, "disk")
        self.slots: list[Slot] = []
        self.tape = Tape(LAYOUTS, self.source, self.placement, CPU, copier=self.make)

    def make(self, host, slots, sizes, record) -> CudaCopier:
        self.host.add(self.tape.placement.copied if hasattr(self, "tape") else self.placement.copied)
        self.slots = [Slot(self.cuda, slot) for slot in slots]
        pin = lambda nbytes: aligned_bytes(nbytes, CPU)  # noqa: E731
        copier = self.copier(self.host, self.slots, sizes, record, cuda=self.cuda, pin=pin)  # pyright: ignore
        drain = copier.drain

        def drain_and_stop_sweeping() -> None:
            self.cuda.sweeping = False
            drain()

        copier.drain = drain_and_stop_sweeping
        return copier

    def sweep(self, more: bool = False, stop: int = BLOCKS) -> None:
        """Compare every visited block with its slab, letting the host wait for nothing."""
        seen = []
        self.cuda.sweeping = True
        try:
            with NoHostReads():
                for block, views in self.tape.sweep(more):
                    seen.append(self.visit(block, views))
                    if block == stop:
                        break
        finally:
            self.cuda.sweeping = False
        for block, views in seen:
            want = LAYOUTS[block].views(self.source.slabs[block])
            assert views.keys() == want.keys() and all(torch.equal(views[name], want[name]) for name in want)

    def visit(self, block: int, views) -> tuple[int, dict[str, torch.Tensor]]:
        address = views["a"].data_ptr()
        for slot in self.slots:
            if slot.address == address:
                slot.visit()
        return block, {name: view.clone() for name, view in views.items()}

    def close(self) -> None:
        self.tape.close()
        assert not self.cuda.copy_stream.late, "the arena was given back under a copy"
        self.host.close()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("streamed", range(1, BLOCKS + 1))
def test_events_alone_order_every_copy_and_visit(streamed: int, slots: int, host: str) -> None:
    machine = Machine(streamed, slots, host)
    for more in (True, True, False, False):
        machine.sweep(more)
    blocks = machine.placement.streamed * 4
    assert machine.tape.copies == [(c, block, c % slots) for c, block in enumerate(blocks)]
    machine.close()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("stop", range(BLOCKS))
def test_readers_still_running_when_a_sweep_is_left_keep_their_slots(stop: int, host: str) -> None:
    machine = Machine(4, 2, host)
    machine.sweep(more=True)
    machine.sweep(more=True, stop=stop)
    machine.sweep(more=True)
    machine.tape.rest()
    assert not machine.cuda.copy_stream.late
    machine.sweep()
    machine.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qengine-copy")]


def test_a_copy_is_a_wait_a_copy_and_a_record() -> None:
    machine = Machine(BLOCKS)
    machine.cuda.calls.clear()
    machine.sweep()
    copy = ["copy waits", "copied", "recorded on copy"]
    visit = ["compute waits", "recorded on compute"]
    assert machine.cuda.calls == copy * 2 + (visit + copy) * 3 + visit * 2
    machine.close()


def test_page_locked_slabs_need_no_thread_and_no_bounce_buffer() -> None:
    machine = Machine(BLOCKS)
    before = threading.active_count()
    machine.sweep(more=True)
    assert machine.tape.host_bytes == 0 and threading.active_count() == before
    machine.close()


def test_demoting_takes_effect_on_the_next_sweep() -> None:
    machine = Machine(2)
    machine.sweep(more=True)
    machine.tape.demote(2)
    machine.sweep(more=True)
    machine.sweep()
    assert [block for _, block, _ in machine.tape.copies[-8:]] == [*machine.tape.placement.streamed] * 2
    machine.close()


class Impatient(CudaCopier):
    """Waits for the copy stream on the host."""

    def wait(self, counter: int) -> None:
        self._stream.synchronize()
        super().wait(counter)


class Curious(CudaCopier):
    """Asks the device for a value."""

    def release(self, counter: int) -> None:
        super().release(counter)
        torch.ones(1).item()


class Hasty(CudaCopier):
    """Lets no copy wait for the readers before it."""

    def release(self, counter: int) -> None:
        self._slot_of.pop(counter)


class Blind(CudaCopier):
    """Visits without waiting for the copy."""

    def wait(self, counter: int) -> None:
        self._worker.finish(counter)


@pytest.mark.parametrize(
    ("copier", "complaint"),
    [
        (Impatient, "the host waited for a stream"),
        (Curious, "the host read a value"),
        (Hasty, "refilled before its last reader"),
        (Blind, "did not wait for its copy"),
    ],
)
def test_the_model_sees_what_it_must_see(copier: type[CudaCopier], complaint: str) -> None:
    machine = Machine(4, copier=copier)
    with pytest.raises(AssertionError, match=complaint):
        machine.sweep()
    machine.close()


def test_the_arena_is_registered_once_at_its_exact_size_and_unregistered_once() -> None:
    cudart = FakeCudart()
    arena = HostArena(MemorySource(), LAYOUTS, CPU, cudart)
    arena.add((1, 4))
    arena.add((1, 4))
    sizes = [layout.nbytes for layout in LAYOUTS]
    assert cudart.past == [sizes[1] + sizes[4]] and all(address % 4096 == 0 for address in cudart.registered)
    arena.add((0, 1, 4))
    assert cudart.past == [sizes[1] + sizes[4], sizes[0]] and arena.nbytes == sum(cudart.past)
    assert not arena.bounces and arena.refusal is None
    arena.close()
    arena.close()
    assert not cudart.registered and arena.nbytes == 0


def test_a_refused_registration_is_said_and_goes_through_bounce_buffers() -> None:
    cudart = FakeCudart(refuse=2)
    arena = HostArena(MemorySource(), LAYOUTS, CPU, cudart)
    arena.add((0, 3))
    assert arena.bounces and arena.locked(0) is None
    assert arena.refusal == f"cudaHostRegister of {2 * LAYOUTS[0].nbytes} bytes returned error 2"
    arena.close()
    assert not cudart.past
