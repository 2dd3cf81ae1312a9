"""The packed file: the slabs of a stack as they lie on the tape, in one safetensors file.

Every tensor stands under its own name (``transformer_blocks.0.attn.to_q.weight``, ``.scale``), so any program can read
it; tensors named ``pad.N`` fill the gaps that the format does not allow. Slabs begin at page boundaries. The metadata
name the format, the source's fingerprint and, per slab, its offset, size and CRC-32.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import CheckpointError
from ...kernels.read import read_into
from ...loaders.header import Header, read_header
from ..formats import FORMATS
from ..layout import SlabLayout
from .blocks import BlockStack

VERSION = "1"
_AGAIN = "remove the file; it is packed anew at the next run, or by qengine pack"


@dataclass(frozen=True)
class Slab:
    """One slab of the file: its first byte, its size and the CRC-32 of its bytes."""

    offset: int
    nbytes: int
    crc: int


def metadata(stack: BlockStack, slabs: Sequence[Slab]) -> dict[str, str]:
    """What the header says beside the tensors; its length does not depend on the checksums."""
    return {
        "qengine.packed": VERSION,
        "qengine.root": stack.root,
        "qengine.format": stack.weight_format,
        "qengine.plain": stack.plain,
        "qengine.source": stack.checkpoint.fingerprint,
        "qengine.slabs": json.dumps([[slab.offset, slab.nbytes, f"{slab.crc:08x}"] for slab in slabs]),
    }


def packed_format(path: Path) -> str:
    """The weight format of a packed file, from its header alone.

    Raises:
        CheckpointError: it is not a packed file.
    """
    header = read_header(path)
    _check_version(header)
    found = header.metadata.get("qengine.format")
    if found not in FORMATS:
        raise CheckpointError(f"{path}: qengine.format must be one of {', '.join(FORMATS)}, got {found!r}", hint=_AGAIN)
    return found


class PackedSource:
    """Slabs of a packed file; each is checked against its CRC-32 when it is first read.

    Args:
        path: the file.
        stack: what it must hold.

    Raises:
        CheckpointError: it is not a packed file, of another stack, format or layout, or of another state of the source.
    """

    def __init__(self, path: Path, stack: BlockStack) -> None:
        header = read_header(path)
        self._path, self._layouts = path, stack.layouts
        _check_words(header, stack)
        self._slabs = _slabs(header)
        _check_layout(header, stack, self._slabs)
        self._unchecked = set(range(len(self._slabs)))
        self._checking = threading.Lock()
        self._mapped: torch.Tensor | None = None

    def read(self, index: int, into: torch.Tensor) -> None:
        """Fill ``into`` (uint8 [nbytes of slab ``index``], CPU); called from any thread.

        Raises:
            CheckpointError: the slab is damaged, or the file changed or cannot be read.
        """
        try:
            read_into(self._path, self._slabs[index].offset, into)
        except OSError as error:
            raise CheckpointError(
                f"{self._path} must be readable, got {error.strerror or error}", hint=_AGAIN
            ) from error
        self._check(index, into)

    def view(self, index: int) -> torch.Tensor:
        """The slab where the file is mapped, uint8 [nbytes]; the mapping lives as long as a view of it."""
        if self._mapped is None:
            nbytes = self._path.stat().st_size
            self._mapped = torch.from_file(str(self._path), shared=False, size=nbytes, dtype=torch.uint8)
        slab = self._slabs[index]
        view = self._mapped[slab.offset : slab.offset + slab.nbytes]
        self._check(index, view)
        return view

    def _check(self, index: int, data: torch.Tensor) -> None:
        with self._checking:
            if index not in self._unchecked:
                return
        found = zlib.crc32(data.numpy().data)
        if found != self._slabs[index].crc:
            raise CheckpointError(
                f"{self._path}: slab {index} must have checksum {self._slabs[index].crc:08x}, got {found:08x}",
                hint=_AGAIN,
            )
        with self._checking:
            self._unchecked.discard(index)


def _check_version(header: Header) -> None:
    if header.metadata.get("qengine.packed") != VERSION:
        got = header.metadata.get("qengine.packed")
        words = "no packed file" if got is None else f"version {got}"
        raise CheckpointError(f"{header.path} must be a packed file of version {VERSION}, got {words}", hint=_AGAIN)


def _check_words(header: Header, stack: BlockStack) -> None:
    _check_version(header)
    expected = metadata(stack, [])
    for key in ("qengine.root", "qengine.format", "qengine.plain"):
        if header.metadata.get(key) != expected[key]:
            got = header.metadata.get(key)
            raise CheckpointError(f"{header.path}: {key} must be {expected[key]!r}, got {got!r}", hint=_AGAIN)
    if header.metadata.get("qengine.source") != expected["qengine.source"]:
        raise CheckpointError(
            f"{header.path} must be packed from {stack.checkpoint.place} as it is now, got another state of it",
            hint=_AGAIN,
        )


def _slabs(header: Header) -> list[Slab]:
    try:
        rows = json.loads(header.metadata.get("qengine.slabs", ""))
        return [Slab(int(offset), int(nbytes), int(crc, 16)) for offset, nbytes, crc in rows]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{header.path} must list its slabs, got: {error}", hint=_AGAIN) from error


def _check_layout(header: Header, stack: BlockStack, slabs: Sequence[Slab]) -> None:
    """Every tensor lies where the layouts say, so a slab's bytes can be taken as they are."""
    if [slab.nbytes for slab in slabs] != [layout.nbytes for layout in stack.layouts]:
        raise CheckpointError(
            f"{header.path} must hold {len(stack)} slabs of {stack.nbytes} bytes, got {len(slabs)} of "
            f"{sum(slab.nbytes for slab in slabs)}",
            hint=_AGAIN,
        )
    for index, (slab, layout) in enumerate(zip(slabs, stack.layouts, strict=True)):
        _check_slab(header, stack.prefix(index), slab, layout)


def _check_slab(header: Header, prefix: str, slab: Slab, layout: SlabLayout) -> None:
    for field in layout.fields:
        info = header.tensors.get(prefix + field.name)
        found = None if info is None else (info.dtype, tuple(info.shape), info.offset)
        expected = (field.dtype, field.shape, slab.offset + field.offset_bytes)
        if found != expected:
            raise CheckpointError(
                f"{header.path}: {prefix + field.name} must be (dtype, shape, byte) {expected}, got {found}",
                hint=_AGAIN,
            )


def entries(stack: BlockStack, slabs: Sequence[Slab], start: int) -> Mapping[str, object]:
    """The header's tensors, gaps filled with pads; offsets count from ``start``, the first byte of data."""
    made: dict[str, object] = {}
    position = start

    def pad(to: int) -> None:
        nonlocal position
        if to > position:
            made[f"pad.{len(made)}"] = {
                "dtype": "U8",
                "shape": [to - position],
                "data_offsets": [position - start, to - start],
            }
            position = to

    for index, (slab, layout) in enumerate(zip(slabs, stack.layouts, strict=True)):
        for field in layout.fields:
            pad(slab.offset + field.offset_bytes)
            made[stack.prefix(index) + field.name] = {
                "dtype": field.dtype,
                "shape": list(field.shape),
                "data_offsets": [position - start, position - start + field.nbytes],
            }
            position += field.nbytes
        pad(slab.offset + slab.nbytes)
    return made
