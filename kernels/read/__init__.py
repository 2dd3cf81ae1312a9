"""Parallel file reads: byte ranges of a file straight into tensors, by native threads or their Python twin."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import KernelError
from . import native, reference

if TYPE_CHECKING:
    import torch

MAX_THREADS = 64
PIECE_BYTES = 8 << 20

__all__ = ["MAX_THREADS", "PIECE_BYTES", "default_threads", "implementation", "read_into", "read_many"]


def default_threads() -> int:
    """Reader threads: one per core, at least 2 (a wait on the disk is not work), at most 8."""
    return max(2, min(8, os.cpu_count() or 1))


def implementation() -> str:
    """Name of the implementation that ``read_into`` uses here: ``native`` or ``python``."""
    return "native" if native.available() else "python"


def read_into(path: str | os.PathLike[str], offset: int, tensor: torch.Tensor, threads: int | None = None) -> None:
    """Fill ``tensor`` with ``tensor.numel()`` bytes of the file from ``offset``.

    Args:
        path: the file.
        offset: first byte, counted from the beginning of the file.
        tensor: uint8 [n], contiguous, on the CPU.
        threads: reader threads, 1 to 64; ``default_threads()`` when None.

    Raises:
        KernelError: wrong dtype, layout, device or thread count.
        OSError: the file cannot be opened or read, or ends before the range does (``EOFError`` is not used).
    """
    read_many(path, [(offset, tensor)], threads)


def read_many(
    path: str | os.PathLike[str], ranges: Sequence[tuple[int, torch.Tensor]], threads: int | None = None
) -> None:
    """Fill many tensors, each from its own offset of one file, with one pool of threads.

    Args:
        path: the file.
        ranges: pairs of offset and uint8 CPU tensor, as in ``read_into``.
        threads: reader threads, 1 to 64; ``default_threads()`` when None.

    Raises:
        KernelError: wrong dtype, layout, device, offset or thread count.
        OSError: the file cannot be opened or read, or ends before a range does.
    """
    threads = default_threads() if threads is None else threads
    if not 1 <= threads <= MAX_THREADS:
        raise KernelError(f"threads must be 1 to {MAX_THREADS}, got {threads}")
    for offset, tensor in ranges:
        _check(offset, tensor)
    wanted = [(offset, tensor) for offset, tensor in ranges if tensor.numel()]
    run = native.read_many if native.available() else reference.read_many
    run(Path(path), wanted, threads, PIECE_BYTES)


def _check(offset: int, tensor: torch.Tensor) -> None:
    if str(tensor.dtype) != "torch.uint8":
        raise KernelError(f"tensor must be uint8, got {tensor.dtype}")
    if tensor.device.type != "cpu":
        raise KernelError(f"tensor must be on the cpu, got {tensor.device}")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise KernelError(f"tensor must be one contiguous dimension, got shape {list(tensor.shape)}")
    if not 0 <= offset < 1 << 63:
        raise KernelError(f"offset must be at least 0, got {offset}")
