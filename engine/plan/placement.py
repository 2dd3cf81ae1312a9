"""Which blocks stay on the device and which are streamed, in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..mover.schedule import Placement, spread

SLOTS = 2


@dataclass(frozen=True)
class Blocks:
    """The blocks of one component: the size of every slab, and where the slabs lie.

    Attributes:
        slab_bytes: size of every block's slab.
        placement: what the mover is given.
    """

    slab_bytes: tuple[int, ...]
    placement: Placement

    @classmethod
    def of(cls, slab_bytes: Sequence[int], streamed: int, host: str = "arena", slots: int = SLOTS) -> Blocks:
        """``streamed`` blocks, evenly interleaved with resident ones; no more slots than streamed blocks."""
        count = len(slab_bytes)
        placement = Placement(count, spread(count, streamed), max(1, min(slots, streamed)), host)
        return cls(tuple(slab_bytes), placement)

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the streamed slabs: what one pass copies."""
        return sum(self.slab_bytes[i] for i in self.placement.copied)

    @property
    def mapped_bytes(self) -> int:
        """Bytes of slabs that are used where the packed file is mapped."""
        return sum(self.slab_bytes[i] for i in self.placement.streamed) - self.streamed_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes that stay on the device."""
        return sum(self.slab_bytes) - self.streamed_bytes - self.mapped_bytes

    @property
    def slots(self) -> int:
        """Slots of the ring; none where nothing is copied."""
        return self.placement.slots if self.placement.copied else 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots; each holds the largest streamed slab."""
        return self.slots * max((self.slab_bytes[i] for i in self.placement.copied), default=0)

    @property
    def device_bytes(self) -> int:
        """Bytes on the device."""
        return self.resident_bytes + self.slot_bytes


def useful_counts(blocks: int, slots: int = SLOTS) -> tuple[int, ...]:
    """Numbers of streamed blocks that a plan considers: none, or more than there are slots (else nothing is saved)."""
    return (0, *range(slots + 1, blocks + 1)) if blocks > slots else tuple(dict.fromkeys((0, blocks)))
