"""Writing a packed file: one tensor and one slab in memory at a time, appearing whole or not at all."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...errors import CheckpointError, KernelError, OutputError
from ...kernels import native
from ...kernels.dispatch import Machine, choose
from ...kernels.quant import quantise_rows
from ...loaders.checkpoint import Checkpoint
from ..files import write_whole
from ..layout import SLAB_ALIGNMENT_BYTES
from ..quant import row_group
from ..template import aligned_bytes
from .blocks import BlockStack
from .packed import Slab, entries, metadata

Progress = Callable[[int, int], None]
Quantise = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def packed_bytes(stack: BlockStack) -> int:
    """Size of the packed file."""
    return _start(stack) + stack.nbytes


def pack(stack: BlockStack, path: Path, progress: Progress = lambda done, total: None) -> None:
    """Write the stack's slabs in its format.

    Holds one tensor as stored, its rows in float32 a few megabytes at a time, and one slab.

    Args:
        stack: what to pack.
        path: the file; replaced only when the new one is complete.
        progress: called after every slab with bytes done and bytes in all; may raise to stop.

    Raises:
        CheckpointError: a weight is NaN or infinite, or the source cannot be read.
        OutputError: the folder cannot be written, or the disk has no room.
    """
    check_room(path, packed_bytes(stack))

    def write(temporary: Path) -> None:
        with temporary.open("rb+") as file:
            _write(stack, file, progress)

    write_whole(path, write)


def quantiser(weight_format: str) -> Quantise:
    """What quantises matrices on this machine's CPU: the native rows, or the reference, which gives the same bytes.

    Raises:
        KernelError: called with a matrix that is not finite.
    """
    implementation: Any = choose("quant", Machine("cpu", native=native.reason()))

    def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        group = row_group(weight.shape[-1], weight_format)
        return quantise_rows(weight, weight_format, group, implementation=implementation)

    return quantise


def _write(stack: BlockStack, file: BinaryIO, progress: Progress) -> None:
    quantise = quantiser(stack.weight_format)
    start = _start(stack)
    slabs = _places(stack, start)
    file.seek(start)
    buffer = aligned_bytes(max(slab.nbytes for slab in slabs), torch.device("cpu"))
    done = 0
    for index, slab in enumerate(slabs):
        data = buffer[: slab.nbytes].zero_()
        _fill(stack, index, data, quantise)
        file.write(data.numpy().data)
        slabs[index] = replace(slab, crc=zlib.crc32(data.numpy().data))
        done += slab.nbytes
        progress(done, stack.nbytes)
    file.seek(0)
    file.write(_header(stack, slabs, start))


def _fill(stack: BlockStack, index: int, slab: torch.Tensor, quantise: Quantise) -> None:
    prefix, views = stack.prefix(index), stack.layouts[index].views(slab)
    plain = []
    for name, view in views.items():
        scale = views.get(name.removesuffix("weight") + "scale") if name.endswith(".weight") else None
        if scale is not None:
            stored, found = quantised(stack.checkpoint, prefix + name, quantise)
            view.copy_(stored)
            scale.copy_(found)
        elif not name.endswith(".scale"):
            plain.append((prefix + name, view))
    stack.checkpoint.read_into(plain)
    for name, view in plain:
        if not bool(torch.isfinite(view).all()):
            raise CheckpointError(f"{stack.checkpoint.place}: {name} must be finite, got NaN or infinity")


def quantised(checkpoint: Checkpoint, name: str, quantise: Quantise) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix of a checkpoint as rows and scales.

    Raises:
        CheckpointError: it cannot be read, or cannot be quantised because it is not finite.
    """
    try:
        return quantise(checkpoint.read(name))
    except KernelError as error:
        raise CheckpointError(
            f"{checkpoint.place}: {name} must be packable: {error.message}",
            hint="the checkpoint is damaged: qengine verify MODEL",
        ) from error


def _places(stack: BlockStack, start: int) -> list[Slab]:
    slabs, position = [], start
    for layout in stack.layouts:
        slabs.append(Slab(position, layout.nbytes, 0))
        position += layout.nbytes
    return slabs


def _start(stack: BlockStack) -> int:
    """First byte of data: a page boundary behind the header, which grows a little with the offsets it holds."""
    start = SLAB_ALIGNMENT_BYTES
    while len(_text(stack, _places(stack, start), start)) + 8 > start:
        start += SLAB_ALIGNMENT_BYTES
    return start


def _text(stack: BlockStack, slabs: list[Slab], start: int) -> bytes:
    header = {"__metadata__": metadata(stack, slabs), **entries(stack, slabs, start)}
    return json.dumps(header, separators=(",", ":")).encode()


def _header(stack: BlockStack, slabs: list[Slab], start: int) -> bytes:
    text = _text(stack, slabs, start)
    room = start - 8
    return struct.pack("<Q", room) + text.ljust(room)


def check_room(path: Path, nbytes: int) -> None:
    """Refuse a disk that has less room than a file will take.

    Raises:
        OutputError: it is too full.
    """
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OutputError(
            f"{folder} must have {nbytes / 1e9:.1f} GB free for the packed file, got {free / 1e9:.1f} GB",
            hint="make room there, or set QENGINE_CACHE to a folder on another disk",
        )
