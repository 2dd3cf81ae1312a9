"""The order of copies, waits and visits, replayed on a model of the ring that knows only the rules."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qengine.engine.mover import Copy, Placement, Ring, Visit, Wait, schedule, spread
from qengine.errors import PlanError, RequestError


@st.composite
def placements(draw) -> Placement:
    blocks = draw(st.integers(1, 20))
    streamed = draw(st.sets(st.integers(0, blocks - 1)))
    return Placement(blocks, tuple(sorted(streamed)), draw(st.integers(1, 3)))


class Replay:
    """A ring of slots that complains about every broken rule."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.slots: list[tuple[int, int] | None] = [None] * placement.slots
        self.unread: set[int] = set()
        self.waited: set[int] = set()
        self.copied: list[int] = []
        self.visited: list[tuple[int, int]] = []

    def run(self, ops) -> None:
        for op in ops:
            getattr(self, type(op).__name__.lower())(op)

    def copy(self, op: Copy) -> None:
        assert op.counter == len(self.copied), "copies are numbered without gaps"
        assert op.slot == op.counter % self.placement.slots
        held = self.slots[op.slot]
        assert held is None or held[0] not in self.unread, "a slot was refilled before its last reader"
        self.slots[op.slot] = op.counter, op.block
        self.unread.add(op.counter)
        self.copied.append(op.block)

    def wait(self, op: Wait) -> None:
        assert op.counter in self.unread, "waiting for a copy that was not issued is no wait"
        self.waited.add(op.counter)

    def visit(self, op: Visit) -> None:
        self.visited.append((op.sweep, op.block))
        assert (op.counter is not None) == (op.block in self.placement.streamed)
        if op.counter is not None:
            assert op.counter in self.waited, "a block was visited before it was ready"
            assert (op.counter, op.block) in self.slots
            self.unread.remove(op.counter)


@given(placements(), st.integers(1, 4))
def test_every_block_is_ready_before_its_visit_and_no_slot_is_refilled_before_its_last_reader(placement, sweeps):
    replay = Replay(placement)
    replay.run(schedule(placement, sweeps))
    assert replay.visited == [(sweep, block) for sweep in range(sweeps) for block in range(placement.blocks)]
    assert replay.copied == list(placement.streamed) * sweeps
    assert not replay.unread


@given(placements(), st.integers(1, 4))
def test_the_link_is_never_idle_while_a_slot_is_free_and_a_copy_is_due(placement, sweeps):
    """So copies wrap around into the next sweep, and none is issued for a sweep that does not come."""
    issued, read, visited = 0, 0, 0
    for op in schedule(placement, sweeps):
        due = len(placement.streamed) * min(sweeps, visited // placement.blocks + 2)
        if isinstance(op, Copy):
            issued += 1
            assert issued <= due
            continue
        assert issued == min(due, read + placement.slots)
        visited += isinstance(op, Visit)
        read += isinstance(op, Visit) and op.counter is not None


def test_copies_wrap_around_into_the_next_sweep() -> None:
    ops = schedule(Placement(3, (1, 2), slots=2), 2)
    assert (
        ops.index(Copy(2, 1, 0)) < ops.index(Visit(0, 2, 1)) < ops.index(Copy(3, 2, 1)) < ops.index(Visit(1, 0, None))
    )


def test_a_single_streamed_block_is_copied_once_per_sweep_with_three_slots() -> None:
    copies = [op for op in schedule(Placement(2, (0,), slots=3), 4) if isinstance(op, Copy)]
    assert copies == [Copy(0, 0, 0), Copy(1, 0, 1), Copy(2, 0, 2), Copy(3, 0, 0)]


@given(placements(), st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=6))
def test_a_ring_put_to_rest_anywhere_begins_again_at_block_0(placement, turns) -> None:
    replay, ring = Replay(placement), Ring(placement)
    for more, stop in turns:
        ops = ring.sweep(more)
        replay.run(islice(ops, stop))
        ops.close()
        ring.rest()
        replay.unread.clear()
        before = len(replay.copied)
        replay.run(ring.sweep(more=False))
        assert replay.copied[before:] == list(placement.streamed) and not replay.unread


@given(st.integers(0, 80).flatmap(lambda blocks: st.tuples(st.just(blocks), st.integers(0, blocks))))
def test_streamed_blocks_are_spread_evenly_and_the_first_copy_has_time(case) -> None:
    blocks, streamed = case
    places = spread(blocks, streamed)
    assert len(places) == streamed
    if streamed:
        groups = [b - a for a, b in zip((-1, *places), places, strict=False)]
        assert min(groups) >= 1 and max(groups) - min(groups) <= 1
        assert groups[0] == max(groups) and places[-1] == blocks - 1


def test_spread_all_none_and_half() -> None:
    assert (spread(4, 4), spread(4, 0), spread(4, 2), spread(5, 2)) == ((0, 1, 2, 3), (), (1, 3), (2, 4))


@pytest.mark.parametrize("streamed", [-1, 5])
def test_a_count_out_of_range_is_the_askers_mistake(streamed: int) -> None:
    with pytest.raises(RequestError, match=f"must be 0 to 4 .*got {streamed}"):
        spread(4, streamed)


@pytest.mark.parametrize(
    "wrong",
    [{"streamed": (4,)}, {"streamed": (-1,)}, {"streamed": (1, 1)}, {"streamed": (2, 1)}]
    + [{"slots": 0}, {"slots": 4}, {"host": "cloud"}],
    ids=str,
)
def test_a_placement_that_cannot_be_is_refused(wrong) -> None:
    with pytest.raises(PlanError, match="must be"):
        Placement(4, **wrong)


def test_mapped_blocks_do_not_pass_through_the_ring() -> None:
    placement = Placement(3, (0, 2), host="mapped")
    assert placement.copied == ()
    assert schedule(placement, 1) == [Visit(0, block, None) for block in range(3)]


def test_planning_placements_loads_no_torch() -> None:
    plan = "import sys, qengine.engine.mover as mover; mover.schedule(mover.Placement(4, mover.spread(4, 2)), 2)"
    code = f"{plan}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
