"""The slabs of a stack of blocks, wherever they lie, as one sequence of visits."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from ...errors import PlanError, QEngineError
from ..layout import SlabLayout
from ..template import aligned_bytes
from .copier import Copier, CudaCopier, Record, ThreadCopier
from .host import CPU, Disk, Host, HostArena, SlabSource, mapped_slab
from .schedule import Copy, Placement, Ring, Visit, Wait, spread

KEPT_COPIES = 1 << 16

Views = Mapping[str, torch.Tensor]


class MakeCopier(Protocol):
    """How a tape gets its copier."""

    def __call__(self, host: Host, slots: Sequence[torch.Tensor], sizes: Sequence[int], record: Record) -> Copier:
        """Make a copier that fills `slots` (at least one) from `host`."""
        ...


def make_copier(host: Host, slots: Sequence[torch.Tensor], sizes: Sequence[int], record: Record) -> Copier:
    """The copier of the device on which the slots lie."""
    if slots[0].device.type == "cuda":
        return CudaCopier(host, slots, sizes, record)
    return ThreadCopier(host, slots, sizes, record)


class Tape:
    """Slabs in execution order, some resident and some streamed; `sweep` visits each once.

    Where a slab lies is the tape's affair alone: a visit gets the same bytes at the same alignment, so placement never
    changes bits. Close it, or use it in a ``with`` statement.

    Args:
        layouts: one per block.
        source: where slabs are read from; it outlives the tape.
        placement: which blocks are streamed, through how many slots, from where.
        device: where the blocks run.
        copier: makes the copier; the device's own by default.

    Attributes:
        nbytes: bytes of all slabs.
        placement: where the slabs lie now.
        copies: (counter, block, slot) of each copy that really happened, written by the copier (of a long run, the
            latest 65,536); counters begin again at 0 after `replace`.
        visits: how many visits have been enqueued.

    Raises:
        PlanError: the placement is not one for these blocks or this device.
    """

    def __init__(
        self,
        layouts: Sequence[SlabLayout],
        source: SlabSource,
        placement: Placement,
        device: torch.device,
        *,
        copier: MakeCopier = make_copier,
    ) -> None:
        if placement.host == "mapped" and placement.streamed and device.type != "cpu":
            raise PlanError(f"host must be 'arena' or 'disk' on {device.type}, got 'mapped'")
        self.nbytes = sum(layout.nbytes for layout in layouts)
        self.copies: Record = []
        self.visits = 0
        self._layouts, self._source, self._device = tuple(layouts), source, device
        self._sizes = [layout.nbytes for layout in layouts]
        self._make_copier = copier
        self.placement = placement
        self._host = self._make_host()
        self._fixed: dict[int, Views] = {}
        self._slots: list[torch.Tensor] = []
        self._slot_views: dict[tuple[int, int], Views] = {}
        self._copier: Copier = self._idle()
        self._ring: Ring | None = None
        self._turn: object = None
        try:
            self._place(placement)
        except BaseException:
            self.close()
            raise

    @classmethod
    def resident(cls, layouts: Sequence[SlabLayout], source: SlabSource, device: torch.device) -> Tape:
        """A tape with every slab on the device."""
        return cls(layouts, source, Placement(len(layouts)), device)

    def __len__(self) -> int:
        return len(self._layouts)

    def __enter__(self) -> Tape:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def device_bytes(self) -> int:
        """Bytes of the resident slabs and the slots."""
        owned = sum(self._sizes[block] for block in self._fixed if block not in self.placement.streamed)
        return owned + sum(slot.nbytes for slot in self._slots)

    @property
    def host_bytes(self) -> int:
        """Bytes of the streamed slabs held in host memory, and of the bounce buffers; mapped files count nothing."""
        return self._host.nbytes + self._copier.host_bytes

    @property
    def refusal(self) -> str | None:
        """Why streamed slabs could not be page-locked and go through bounce buffers; None if they were, or need not."""
        return self._host.refusal

    def sweep(self, more: bool) -> Generator[tuple[int, Views], None, None]:
        """Visit every block once, in order.

        When control comes back, the visit counts as enqueued and its slot may be filled again. Leaving early, by
        whatever way, puts the tape to rest.

        Args:
            more: another sweep follows, so its first copies may run ahead.

        Yields:
            Index of the block and its tensors, ready to be bound; they are valid during the visit only.

        Raises:
            QEngineError: the tape is closed, or was put to rest during this sweep.
        """
        if self._turn is not None:
            self.rest()
        turn = self._turn = object()
        try:
            for visit in self._execute(more):
                yield visit
                if self._turn is not turn:
                    raise QEngineError("a sweep must end before its tape is put to rest, got one that goes on")
        except BaseException:
            if self._turn is turn:
                self.rest()
            raise
        self._turn = None

    def _execute(self, more: bool) -> Iterator[tuple[int, Views]]:
        ring, copier, placement = self._ring, self._copier, self.placement
        if ring is None:
            raise QEngineError("a tape must be open to be swept, got a closed one")
        del self.copies[:-KEPT_COPIES]
        for op in ring.sweep(more):
            match op:
                case Copy():
                    copier.copy(op)
                case Wait(counter):
                    copier.wait(counter)
                case Visit(_, block, counter):
                    slot = None if counter is None else placement.slot(counter)
                    yield block, self._fixed[block] if slot is None else self._slot_views[slot, block]
                    if counter is not None:
                        copier.release(counter)
                    self.visits += 1

    def rest(self) -> None:
        """Stop copying and seek to block 0; what was copied ahead is dropped. Waits for the copy under way."""
        self._turn = None
        self._copier.drain()
        if self._ring is not None:
            self._ring.rest()

    def demote(self, count: int) -> Placement:
        """Stream `count` more blocks, spread over the resident ones, and return the new placement.

        Raises:
            PlanError: there are fewer resident blocks.
        """
        resident = [block for block in range(len(self)) if block not in self.placement.streamed]
        if not 1 <= count <= len(resident):
            raise PlanError(f"blocks to demote must be 1 to {len(resident)} (those resident), got {count}")
        demoted = [resident[i] for i in spread(len(resident), count)]
        streamed = tuple(sorted([*self.placement.streamed, *demoted]))
        self.replace(dataclasses.replace(self.placement, streamed=streamed))
        return self.placement

    def replace(self, placement: Placement) -> None:
        """Stream more blocks, or through another number of slots; the bits of a sweep do not change.

        Host data stay; the slabs demoted are read from the source, since weights are never written back. They are read
        before anything on the device is given up, so a failing read changes nothing. Views handed out before must be
        dropped by their holders for the memory to come free.

        Raises:
            PlanError: the placement has another host or other blocks, or makes a streamed block resident.
        """
        if placement.host != self.placement.host or not set(placement.streamed) >= set(self.placement.streamed):
            raise PlanError(f"a new placement must stream all that {self.placement} does, got {placement}")
        self.rest()
        self._place(placement)

    @property
    def suspended(self) -> bool:
        """Nothing lies on the device; a sweep needs :meth:`resume` first."""
        return self._ring is None

    def suspend(self) -> None:
        """Give up what lies on the device; slabs in host memory stay."""
        self._turn = self._ring = None
        self._retire()
        self._fixed.clear()
        self._slots.clear()
        self._slot_views.clear()

    def resume(self) -> None:
        """Lay the slabs out on the device again; only resident ones are read."""
        self._place(self.placement)

    def close(self) -> None:
        """Stop copying and free everything. May be called again."""
        self.suspend()
        self._host.close()

    def _place(self, placement: Placement) -> None:
        if placement.blocks != len(self):
            raise PlanError(f"a placement must be for {len(self)} blocks, got {placement.blocks}")
        self._host.add(placement.copied)
        self._ring = None
        self._retire()
        self.placement = placement
        for block in placement.streamed:
            self._fixed.pop(block, None)
        self._make_slots(placement)
        for block in range(len(self)):
            if block not in self._fixed and block not in placement.copied:
                self._fixed[block] = self._layouts[block].views(self._lay(block))
        if self._slots:
            self._copier = self._make_copier(self._host, self._slots, self._sizes, self.copies)
        self._ring = Ring(placement)

    def _idle(self) -> Copier:
        return ThreadCopier(self._host, (), (), self.copies)

    def _retire(self) -> None:
        self._copier.close()
        self._copier = self._idle()

    def _make_slots(self, placement: Placement) -> None:
        """Slots as large as the largest streamed slab, and in each the views of every layout that passes through."""
        nbytes = max((self._sizes[block] for block in placement.copied), default=0)
        wanted = [nbytes] * placement.slots if placement.copied else []
        self._slot_views.clear()
        if [slot.nbytes for slot in self._slots] != wanted:
            self._slots.clear()
            self._slots.extend(aligned_bytes(nbytes, self._device) for _ in wanted)
        for index, slot in enumerate(self._slots):
            layouts = {self._layouts[block] for block in placement.copied}
            views = {layout: layout.views(slot[: layout.nbytes]) for layout in layouts}
            self._slot_views.update({(index, block): views[self._layouts[block]] for block in placement.copied})

    def _lay(self, block: int) -> torch.Tensor:
        """The slab of a block that is not copied, where it stays."""
        if block in self.placement.streamed:
            return mapped_slab(self._source, block)
        slab = aligned_bytes(self._sizes[block], self._device)
        if self._device.type == "cpu":
            self._source.read(block, slab)
        else:
            staged = aligned_bytes(self._sizes[block], CPU)
            self._source.read(block, staged)
            slab.copy_(staged)
        return slab

    def _make_host(self) -> Host:
        if self.placement.host == "disk":
            return Disk(self._source)
        cudart = torch.cuda.cudart() if self._device.type == "cuda" else None
        return HostArena(self._source, self._layouts, self._device, cudart)
