"""Where streamed slabs wait on the host: in one arena, or in the file they come from."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

import torch

from ...errors import PlanError
from ..layout import SLAB_ALIGNMENT_BYTES, SlabLayout

CPU = torch.device("cpu")


class SlabSource(Protocol):
    """Where slabs are read from."""

    def read(self, index: int, into: torch.Tensor) -> None:
        """Fill `into` (uint8 [nbytes of slab `index`], CPU) with the slab; called from any thread."""
        ...


@runtime_checkable
class MappedSource(Protocol):
    """A source whose slabs can be used where they lie."""

    def view(self, index: int) -> torch.Tensor | None:
        """The slab's bytes, uint8 [nbytes], CPU, nothing copied; None if it has to be read."""
        ...


def mapped_slab(source: SlabSource, index: int) -> torch.Tensor:
    """Slab `index` where the source has it mapped, uint8 [nbytes].

    Raises:
        PlanError: the source maps nothing, or not at a page boundary (alignment is part of the numerics contract).
    """
    slab = source.view(index) if isinstance(source, MappedSource) else None
    if slab is None:
        raise PlanError(f"host must be 'arena' or 'disk' for slabs that are not mapped, got 'mapped' (slab {index})")
    if slab.data_ptr() % SLAB_ALIGNMENT_BYTES:
        raise PlanError(f"a mapped slab must lie at a page boundary, got address {slab.data_ptr():#x} (slab {index})")
    return slab


class Host(Protocol):
    """Where a copier finds the slabs of streamed blocks.

    Attributes:
        nbytes: host memory held.
        refusal: why memory could not be page-locked, or None.
    """

    nbytes: int
    refusal: str | None

    @property
    def bounces(self) -> bool:
        """Some slabs are not in page-locked memory, so a CUDA device gets them through bounce buffers."""
        ...

    def add(self, blocks: Sequence[int]) -> None:
        """Hold these blocks too; on an error nothing has changed."""
        ...

    def locked(self, block: int) -> torch.Tensor | None:
        """The slab in page-locked memory, from which a device copies by itself; None if it must be read first."""
        ...

    def read(self, block: int, into: torch.Tensor) -> None:
        """Fill `into` (uint8 [nbytes of the slab], CPU) with the slab; called from the copy thread."""
        ...

    def close(self) -> None:
        """Give the memory back; no copy may be under way. May be called again."""
        ...


def anonymous(nbytes: int) -> torch.Tensor:
    """Host memory of exactly this size at a page boundary, uint8 [nbytes], given back when the last view is gone."""
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


class HostArena:
    """Slabs in anonymous host memory of exact size, read once and, for a CUDA device, page-locked once.

    Torch's pinned allocator rounds every tensor up to a power of two, and a file mapping must not be registered; so
    this registers an allocation of its own. What is added later is a second one; no slab straddles two registrations.

    Args:
        source: where slabs are read from.
        layouts: one per block.
        device: the device that copies from here.
        cudart: ``torch.cuda.cudart()``, or None where nothing needs to be page-locked.
    """

    def __init__(self, source: SlabSource, layouts: Sequence[SlabLayout], device: torch.device, cudart: Any) -> None:
        self.nbytes = 0
        self.refusal: str | None = None
        self._source, self._layouts, self._device, self._cudart = source, layouts, device, cudart
        self._slabs: dict[int, torch.Tensor] = {}
        self._locked: set[int] = set()
        self._registered: list[torch.Tensor] = []

    def add(self, blocks: Sequence[int]) -> None:
        """Read the blocks that are not held yet into one more allocation and page-lock it."""
        new = [block for block in blocks if block not in self._slabs]
        sizes = [self._layouts[block].nbytes for block in new]
        if not new:
            return
        arena = anonymous(sum(sizes))
        slabs = dict(zip(new, arena.split(sizes), strict=True))
        for block, slab in slabs.items():
            self._source.read(block, slab)
        if self._register(arena):
            self._locked.update(new)
        self._slabs.update(slabs)
        self.nbytes += arena.nbytes

    def _register(self, arena: torch.Tensor) -> bool:
        if self._cudart is None:
            return False
        code = int(self._cudart.cudaHostRegister(arena.data_ptr(), arena.nbytes, 0))
        if code == 0:
            self._registered.append(arena)
            return True
        self.refusal = f"cudaHostRegister of {arena.nbytes} bytes returned error {code}"
        self._forget_error()
        return False

    def _forget_error(self) -> None:
        """Launch one kernel: a refusal stays behind as the last error, and the next launch would report it."""
        with suppress(RuntimeError):
            torch.ones(1, device=self._device).add_(1)

    @property
    def bounces(self) -> bool:
        """Some allocation is not page-locked."""
        return len(self._locked) < len(self._slabs)

    def locked(self, block: int) -> torch.Tensor | None:
        """The slab, if its allocation is page-locked."""
        return self._slabs[block] if block in self._locked else None

    def read(self, block: int, into: torch.Tensor) -> None:
        """Copy the slab."""
        into.copy_(self._slabs[block])

    def close(self) -> None:
        """Unregister and free."""
        while self._registered:
            self._cudart.cudaHostUnregister(self._registered.pop().data_ptr())
        self._slabs.clear()
        self._locked.clear()
        self.nbytes = 0


class Disk:
    """Slabs that stay in their file and are read each time; nothing is held.

    Args:
        source: where slabs are read from.
    """

    def __init__(self, source: SlabSource) -> None:
        self.nbytes = 0
        self.refusal: str | None = None
        self.bounces = True
        self._source = source

    def add(self, blocks: Sequence[int]) -> None:
        """Nothing to hold."""

    def locked(self, block: int) -> torch.Tensor | None:
        """None: every slab has to be read."""
        return None

    def read(self, block: int, into: torch.Tensor) -> None:
        """Read from the file."""
        self._source.read(block, into)

    def close(self) -> None:
        """Nothing to give back."""
