"""In which order slabs are copied, awaited and visited; pure, without torch, clocks or devices.

A run is a number of *sweeps* over all blocks. Streamed blocks pass through a ring of slots: copy number ``c`` fills
slot ``c mod slots``, and is issued as soon as the visit that read that slot before (copy ``c - slots``) has been
enqueued. So copies run ahead, across the end of a sweep into the next one, and a slot is never filled before its last
reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from ...errors import PlanError, RequestError

HOSTS = ("arena", "mapped", "disk")
MAX_SLOTS = 3


def spread(blocks: int, streamed: int) -> tuple[int, ...]:
    """Indices of the streamed blocks, evenly interleaved with the resident ones: ceil(k * blocks / streamed) - 1.

    From one streamed block to the next, also from the last of a sweep to the first of the following one, it is
    floor(blocks / streamed) or one more; the first group is a longest one, for its copy has no earlier work to hide in.

    Args:
        blocks: blocks of the stack.
        streamed: how many of them are streamed.

    Raises:
        RequestError: more blocks are to be streamed than there are, or fewer than none.
    """
    if not 0 <= streamed <= blocks:
        raise RequestError(f"streamed blocks must be 0 to {blocks} (the blocks of the model), got {streamed}")
    return tuple(-(-k * blocks // streamed) - 1 for k in range(1, streamed + 1))


@dataclass(frozen=True)
class Placement:
    """Where the slabs of a stack lie.

    Attributes:
        blocks: blocks of the stack.
        streamed: indices of the blocks that are not resident on the device, ascending.
        slots: slots of the ring, 1 to 3; with one slot nothing overlaps.
        host: where streamed slabs wait: "arena" (one host allocation of exact size), "mapped" (CPU only: used where the
            packed file is mapped, never copied) or "disk" (read from the file each time).
    """

    blocks: int
    streamed: tuple[int, ...] = ()
    slots: int = 2
    host: str = "arena"

    def __post_init__(self) -> None:
        inside = all(0 <= block < self.blocks for block in self.streamed)
        if not inside or list(self.streamed) != sorted(set(self.streamed)):
            raise PlanError(f"streamed must be ascending indices below {self.blocks}, got {self.streamed}")
        if not 1 <= self.slots <= MAX_SLOTS:
            raise PlanError(f"slots must be 1 to {MAX_SLOTS}, got {self.slots}")
        if self.host not in HOSTS:
            raise PlanError(f"host must be one of {', '.join(HOSTS)}, got {self.host!r}")

    @property
    def copied(self) -> tuple[int, ...]:
        """The blocks that pass through the ring: all streamed ones, unless they are used where they are mapped."""
        return () if self.host == "mapped" else self.streamed

    def slot(self, counter: int) -> int:
        """Slot of a copy: its running number mod slots, never the block's, which collides at the wrap-around."""
        return counter % self.slots


@dataclass(frozen=True)
class Copy:
    """Start filling `slot` with the slab of `block`; `counter` numbers the copies of a tape."""

    counter: int
    block: int
    slot: int


@dataclass(frozen=True)
class Wait:
    """What is enqueued from now on runs after copy `counter`."""

    counter: int


@dataclass(frozen=True)
class Visit:
    """Run `block` for all branches; it reads the slot of copy `counter`, or a resident slab when that is None."""

    sweep: int
    block: int
    counter: int | None


Op = Copy | Wait | Visit


class Ring:
    """The state of the ring between operations; `schedule` lists what it yields and `Tape` executes it.

    Args:
        placement: which blocks pass through the ring, and its slots.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._start = 0
        self._issued = 0
        self._read = 0
        self._sweeps = 0

    def sweep(self, more: bool) -> Iterator[Op]:
        """The operations of one sweep, in order; a visit counts as enqueued when the next operation is asked for.

        Args:
            more: another sweep follows, so its first copies are issued as soon as slots are free.
        """
        copied = self._placement.copied
        counters = dict(zip(copied, count(self._start), strict=False))
        end = self._start + len(copied) * (2 if more else 1)
        yield from self._copies(end)
        for block in range(self._placement.blocks):
            counter = counters.get(block)
            if counter is None:
                yield Visit(self._sweeps, block, None)
                continue
            yield Wait(counter)
            yield Visit(self._sweeps, block, counter)
            self._read = counter + 1
            yield from self._copies(end)
        self._start += len(copied)
        self._sweeps += 1

    def _copies(self, end: int) -> Iterator[Copy]:
        placement, copied = self._placement, self._placement.copied
        while self._issued < min(end, self._read + placement.slots):
            counter = self._issued
            self._issued += 1
            yield Copy(counter, copied[(counter - self._start) % len(copied)], placement.slot(counter))

    def rest(self) -> None:
        """Seek to block 0: copies issued and not read are forgotten, and their slots are free."""
        self._start = self._read = self._issued


def schedule(placement: Placement, sweeps: int) -> list[Op]:
    """All operations of a run of `sweeps` sweeps; the last one copies nothing for a sweep that does not come."""
    ring = Ring(placement)
    return [op for sweep in range(sweeps) for op in ring.sweep(more=sweep + 1 < sweeps)]
