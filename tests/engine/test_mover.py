"""The tape on a CPU: a real thread copies slowly, slots are poisoned, and the bits are those of resident blocks."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from qengine.engine.layout import SlabLayout
from qengine.engine.mover import Placement, Tape, ThreadCopier, spread
from qengine.engine.template import aligned_bytes
from qengine.errors import PlanError, QEngineError

CPU = torch.device("cpu")
BLOCKS = 5
FULL = {"weight": ((40, 40), "F32"), "bias": ((40,), "BF16"), "scale": ((40,), "F32")}
LAYOUTS = [SlabLayout.of(FULL)] * (BLOCKS - 1) + [SlabLayout.of({"weight": FULL["weight"]})]
POISON = 0xFF


class MemorySource:
    """Random slabs; a read poisons its target first, and may fail or call back."""

    def __init__(self) -> None:
        self.slabs = [aligned_bytes(layout.nbytes, CPU).zero_() for layout in LAYOUTS]
        for layout, slab in zip(LAYOUTS, self.slabs, strict=True):
            for view in layout.views(slab).values():
                view.copy_(torch.randn(view.shape))
        self.reads: list[int] = []
        self.failing: set[int] = set()
        self.on_read: Callable[[int], None] = lambda index: None

    def read(self, index: int, into: torch.Tensor) -> None:
        assert into.nbytes == LAYOUTS[index].nbytes and into.data_ptr() % 4096 == 0
        into.fill_(POISON)
        self.reads.append(index)
        self.on_read(index)
        if index in self.failing:
            raise OSError(f"slab {index} is gone")
        into.copy_(self.slabs[index])

    def view(self, index: int) -> torch.Tensor | None:
        return self.slabs[index]


class PoisoningCopier(ThreadCopier):
    """Slow, and fills each slot with NaN at first and as soon as its last reader is released."""

    def __init__(self, host, slots, sizes, record) -> None:
        super().__init__(host, slots, sizes, record, delay_seconds=0.001)
        self.slots = slots
        for slot in slots:
            slot.fill_(POISON)

    def release(self, counter: int) -> None:
        super().release(counter)
        self.slots[counter % len(self.slots)].fill_(POISON)


def visit(x: torch.Tensor, views) -> torch.Tensor:
    x = torch.nn.functional.softsign((x[:, :, None] * views["weight"]).sum(1))
    return x * views["scale"] + views["bias"].float() if "scale" in views else x


def run(tape: Tape, x: torch.Tensor, sweeps: int = 1, more: bool = False) -> torch.Tensor:
    for sweep in range(sweeps):
        for block, views in tape.sweep(more or sweep + 1 < sweeps):
            assert views.keys() == {field.name for field in LAYOUTS[block].fields}
            x = visit(x, views)
    assert not x.isnan().any()
    return x


def streaming(streamed, slots: int = 2, host: str = "arena", source=None, copier=PoisoningCopier) -> Tape:
    streamed = spread(BLOCKS, streamed) if isinstance(streamed, int) else streamed
    return Tape(LAYOUTS, source or MemorySource(), Placement(BLOCKS, streamed, slots, host), CPU, copier=copier)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 40)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert copy_threads() == []


def copy_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("qengine-copy")]


@pytest.mark.parametrize("host", ["arena", "disk", "mapped"])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("streamed", range(BLOCKS + 1))
def test_placement_never_changes_bits(streamed: int, slots: int, host: str, x: torch.Tensor) -> None:
    source = MemorySource()
    with Tape.resident(LAYOUTS, source, CPU) as resident, streaming(streamed, slots, host, source) as tape:
        expected, again = run(resident, x, sweeps=3), run(resident, -x)
        assert torch.equal(run(tape, x, sweeps=3), expected)
        assert torch.equal(run(tape, -x), again)
        assert resident.copies == [] and tape.visits == resident.visits == 4 * BLOCKS
        copied = [] if host == "mapped" else list(spread(BLOCKS, streamed)) * 4
        assert tape.copies == [(c, block, c % slots) for c, block in enumerate(copied)]


def test_every_subset_of_blocks_can_be_streamed(x: torch.Tensor) -> None:
    source = MemorySource()
    with Tape.resident(LAYOUTS, source, CPU) as resident:
        expected = run(resident, x, sweeps=2)
    for size in range(BLOCKS + 1):
        for chosen in itertools.combinations(range(BLOCKS), size):
            with streaming(chosen, source=source) as tape:
                assert torch.equal(run(tape, x, sweeps=2), expected)
                assert [block for _, block, _ in tape.copies] == list(chosen) * 2


@pytest.mark.parametrize(("host", "host_slabs"), [("arena", (1, 2, 4)), ("disk", ()), ("mapped", ())])
def test_bytes_are_those_of_resident_slabs_slots_and_arena(host: str, host_slabs) -> None:
    sizes = [layout.nbytes for layout in LAYOUTS]
    with streaming((1, 2, 4), 3, host) as tape:
        slots = 0 if host == "mapped" else 3 * sizes[0]
        assert tape.nbytes == sum(sizes) and len(tape) == BLOCKS
        assert tape.device_bytes == sizes[0] + sizes[3] + slots
        assert tape.host_bytes == sum(sizes[block] for block in host_slabs)
    assert tape.device_bytes == tape.host_bytes == 0


@pytest.mark.parametrize(("host", "reads_per_sweep"), [("arena", 0), ("disk", 3), ("mapped", 0)])
def test_only_the_disk_ring_reads_again(host: str, reads_per_sweep: int, x: torch.Tensor) -> None:
    source = MemorySource()
    with streaming(3, host=host, source=source) as tape:
        opened = len(source.reads)
        run(tape, x, sweeps=2)
        assert len(source.reads) - opened == 2 * reads_per_sweep


def test_slots_are_as_large_as_the_largest_streamed_slab_only() -> None:
    with streaming((BLOCKS - 1,)) as tape:
        assert tape.device_bytes == sum(layout.nbytes for layout in LAYOUTS[:-1]) + 2 * LAYOUTS[-1].nbytes


def test_a_visit_builds_nothing_and_shares_views_per_slot_and_layout(x: torch.Tensor, monkeypatch) -> None:
    with streaming(BLOCKS) as tape:
        monkeypatch.setattr(SlabLayout, "views", lambda *_: pytest.fail("views were built during a sweep"))
        seen = [(block, views) for sweep in range(2) for block, views in tape.sweep(more=sweep == 0)]
    assert len({id(views) for block, views in seen if block < BLOCKS - 1}) == 2
    assert seen[0][1] is seen[2][1] and seen[0][1] is not seen[1][1]


def test_tensors_lie_at_256_byte_boundaries_wherever_a_slab_lies() -> None:
    for host in ("arena", "mapped"):
        with streaming(3, host=host) as tape:
            for _, views in tape.sweep(more=False):
                assert all(view.data_ptr() % 256 == 0 for view in views.values())


@pytest.mark.parametrize("slots", [2, 3])
def test_the_next_copy_runs_while_a_block_is_visited(slots: int) -> None:
    """A visit that ends only after the next read began would hang if copies waited for visits to end."""
    source = MemorySource()
    began = [threading.Event() for _ in range(BLOCKS)]
    source.on_read = lambda index: began[index].set()
    with streaming(BLOCKS, slots, "disk", source) as tape:
        for sweep in range(2):
            for block, _ in tape.sweep(more=sweep == 0):
                following = (block + 1) % BLOCKS
                if following or sweep == 0:
                    assert began[following].wait(20), "the copy did not run ahead"
                began[block].clear()


def test_a_slot_is_not_filled_during_the_visit_that_reads_it() -> None:
    source = MemorySource()
    with streaming(BLOCKS, 2, "disk", source) as tape:
        for block, _ in tape.sweep(more=True):
            assert len(source.reads) <= block + 2
        tape.rest()


def test_no_copy_is_made_for_a_sweep_that_does_not_come(x: torch.Tensor) -> None:
    with streaming(3) as tape:
        for sweeps in (1, 2, 1):
            before = len(tape.copies)
            run(tape, x, sweeps)
            tape.rest()
            assert len(tape.copies) - before == 3 * sweeps


def leave_by_break(tape: Tape, x: torch.Tensor, at: int) -> None:
    for block, views in tape.sweep(more=True):
        visit(x, views)
        if block == at:
            break


def leave_by_error(tape: Tape, x: torch.Tensor, at: int) -> None:
    with pytest.raises(ZeroDivisionError):
        for block, views in tape.sweep(more=True):
            visit(x, views)
            1 / (block - at)


def leave_by_close(tape: Tape, x: torch.Tensor, at: int) -> None:
    sweep = tape.sweep(more=True)
    for _ in range(at + 1):
        visit(x, next(sweep)[1])
    sweep.close()  # pyright: ignore[reportAttributeAccessIssue]


def leave_after_the_end(tape: Tape, x: torch.Tensor, at: int) -> None:
    run(tape, x, more=True)
    tape.rest()


@pytest.mark.parametrize("host", ["arena", "disk"])
@pytest.mark.parametrize("at", range(BLOCKS))
@pytest.mark.parametrize("leave", [leave_by_break, leave_by_error, leave_by_close, leave_after_the_end])
def test_leaving_anywhere_drains_the_ring_and_the_next_sweep_begins_at_block_0(leave, at, host, x) -> None:
    source = MemorySource()
    with Tape.resident(LAYOUTS, source, CPU) as resident, streaming(4, 3, host, source) as tape:
        expected = run(resident, x, sweeps=2)
        leave(tape, x, at)
        done = len(tape.copies)
        assert torch.equal(run(tape, x, sweeps=2), expected)
        assert [block for _, block, _ in tape.copies[done:]] == list(spread(BLOCKS, 4)) * 2


@pytest.mark.parametrize("broken", spread(BLOCKS, 3))
def test_a_failing_read_on_the_copy_thread_surfaces_in_the_sweep_and_does_not_stick(broken, x) -> None:
    source = MemorySource()
    with streaming(3, host="disk", source=source) as tape:
        expected = run(tape, x, sweeps=2)
        source.failing.add(broken)
        visited = []
        with pytest.raises(OSError, match=f"slab {broken} is gone"):
            visited.extend(block for block, _ in tape.sweep(more=True))
        source.failing.clear()
        assert torch.equal(run(tape, x, sweeps=2), expected)


def test_a_failing_read_while_opening_leaves_nothing_behind() -> None:
    source = MemorySource()
    source.failing.add(3)
    for streamed in (0, BLOCKS):
        with pytest.raises(OSError, match="slab 3 is gone"):
            streaming(streamed, source=source)


def test_a_failure_at_the_end_of_opening_gives_the_arena_back() -> None:
    hosts = []

    def no_copier(host, slots, sizes, record):
        assert host.nbytes > 0
        hosts.append(host)
        raise MemoryError

    with pytest.raises(MemoryError):
        streaming(3, copier=no_copier)
    assert [host.nbytes for host in hosts] == [0]


def test_a_sweep_overtaken_by_rest_raises_instead_of_ending_short(x: torch.Tensor) -> None:
    with streaming(3) as tape:
        expected = run(tape, x)
        stale = tape.sweep(more=False)
        next(stale)
        assert torch.equal(run(tape, x), expected)
        with pytest.raises(QEngineError, match="put to rest"):
            next(stale)
        assert torch.equal(run(tape, x), expected)


def test_a_closed_tape_says_so_and_closes_again() -> None:
    tape = streaming(3)
    sweep = tape.sweep(more=True)
    next(sweep)
    tape.close()
    tape.close()
    tape.rest()
    for later in (sweep, tape.sweep(more=False)):
        with pytest.raises(QEngineError, match="must"):
            next(later)


@pytest.mark.parametrize("host", ["arena", "disk", "mapped"])
def test_demoting_blocks_changes_no_bits_and_reads_only_the_demoted_slabs(host: str, x: torch.Tensor) -> None:
    source = MemorySource()
    with streaming((BLOCKS - 1,), host=host, source=source) as tape:
        expected = run(tape, x, sweeps=2)
        for resident in (2, 0):
            before, held = tape.placement.streamed, tape.host_bytes
            source.reads.clear()
            placement = tape.demote(2)
            assert placement is tape.placement and set(before) < set(placement.streamed)
            assert len(placement.streamed) == BLOCKS - resident
            new = set(placement.streamed) - set(before)
            assert source.reads == (sorted(new) if host == "arena" else [])
            assert tape.host_bytes - held == (sum(LAYOUTS[i].nbytes for i in new) if host == "arena" else 0)
            tape.copies.clear()
            assert torch.equal(run(tape, x, sweeps=2), expected)
            assert len(tape.copies) == 2 * len(placement.copied)
        with pytest.raises(PlanError, match="must be 1 to 0 .*got 1"):
            tape.demote(1)


def test_demoting_frees_the_slabs_demoted() -> None:
    with streaming(2) as tape:
        held = {block: weakref.ref(views["weight"]) for block, views in tape.sweep(more=False)}
        before, kept = tape.device_bytes, set(tape.placement.streamed)
        demoted = set(tape.demote(2).streamed) - kept
        assert [held[block]() for block in demoted] == [None, None]
        assert tape.device_bytes == before - sum(LAYOUTS[block].nbytes for block in demoted)


def test_a_failing_read_while_demoting_changes_nothing(x: torch.Tensor) -> None:
    source = MemorySource()
    with streaming(2, source=source) as tape:
        expected, before = run(tape, x), tape.placement
        source.failing.update(range(BLOCKS))
        with pytest.raises(OSError, match="is gone"):
            tape.demote(1)
        assert tape.placement == before and torch.equal(run(tape, x), expected)


def test_slots_can_be_given_up_but_a_streamed_block_stays_streamed(x: torch.Tensor) -> None:
    with streaming(3, slots=3) as tape:
        expected, larger = run(tape, x), tape.device_bytes
        tape.replace(Placement(BLOCKS, spread(BLOCKS, 3), slots=2))
        assert torch.equal(run(tape, x), expected) and tape.device_bytes == larger - LAYOUTS[0].nbytes
        for wrong in (Placement(BLOCKS, ()), Placement(BLOCKS + 1, tape.placement.streamed)):
            with pytest.raises(PlanError, match="must"):
                tape.replace(wrong)
        assert torch.equal(run(tape, x), expected)


def test_placements_for_other_blocks_devices_or_sources_are_refused() -> None:
    with pytest.raises(PlanError, match="must be for 5 blocks, got 4"):
        Tape(LAYOUTS, MemorySource(), Placement(4), CPU)
    with pytest.raises(PlanError, match="on meta, got 'mapped'"):
        Tape(LAYOUTS, MemorySource(), Placement(BLOCKS, (1,), host="mapped"), torch.device("meta"))
    unmapped, crooked = MemorySource(), MemorySource()
    unmapped.view = lambda index: None
    crooked.view = lambda index: aligned_bytes(8192, CPU)[64:]
    for source, words in ((unmapped, "got 'mapped'"), (crooked, "page boundary")):
        with pytest.raises(PlanError, match=words):
            streaming(1, host="mapped", source=source)


@pytest.mark.parametrize("host", ["arena", "disk"])
def test_a_tape_opened_in_inference_mode_runs_outside_it(host: str, x: torch.Tensor) -> None:
    source = MemorySource()
    with torch.inference_mode():
        tape = streaming(3, host=host, source=source, copier=ThreadCopier)
    with tape, Tape.resident(LAYOUTS, source, CPU) as resident:
        assert torch.equal(run(tape, x, sweeps=2), run(resident, x, sweeps=2))


def test_a_resident_tape_starts_no_thread(x: torch.Tensor) -> None:
    with streaming(0) as tape:
        run(tape, x)
        assert copy_threads() == []


def test_opening_and_closing_200_times_leaves_no_thread_and_no_file(x: torch.Tensor) -> None:
    source = MemorySource()

    def cycle(index: int) -> None:
        with streaming(3, host=("arena", "disk")[index % 2], source=source, copier=ThreadCopier) as tape:
            leave_by_break(tape, x, at=index % BLOCKS)
            run(tape, x, more=True)

    cycle(0)
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for index in range(200):
        cycle(index)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
