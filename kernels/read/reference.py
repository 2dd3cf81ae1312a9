"""The Python twin of the native reader: the same pieces, read by a pool of Python threads.

The GIL is released during each read. Every thread opens its own handle and seeks, so that it is the same code
where there is no ``pread``.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import torch


def read_many(path: Path, ranges: Sequence[tuple[int, torch.Tensor]], threads: int, piece_bytes: int) -> None:
    """Fill every tensor from its offset; see ``kernels.read.read_many``."""
    pieces = list(_pieces(ranges, piece_bytes))
    threads = max(1, min(threads, len(pieces)))
    with path.open("rb", buffering=0) as file:
        if threads == 1:
            for offset, view in pieces:
                _read_piece(file, path, offset, view)
            return
    _read_parallel(path, pieces, threads)


def _read_parallel(path: Path, pieces: Sequence[tuple[int, memoryview]], threads: int) -> None:
    local = threading.local()
    handles: list[BinaryIO] = []

    def task(piece: tuple[int, memoryview]) -> None:
        if not hasattr(local, "file"):
            local.file = path.open("rb", buffering=0)
            handles.append(local.file)
        _read_piece(local.file, path, *piece)

    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="qengine-read") as pool:
            for done in [pool.submit(task, piece) for piece in pieces]:
                done.result()
    finally:
        for file in handles:
            file.close()


def _pieces(ranges: Sequence[tuple[int, torch.Tensor]], piece_bytes: int) -> Iterator[tuple[int, memoryview]]:
    for offset, tensor in ranges:
        view = tensor.numpy().data
        for start in range(0, len(view), piece_bytes):
            yield offset + start, view[start : start + piece_bytes]


def _read_piece(file: BinaryIO, path: Path, offset: int, view: memoryview) -> None:
    file.seek(offset)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise short_file(path, offset + done)
        done += count


def short_file(path: Path, offset: int) -> OSError:
    """The error for a file that ends at ``offset``, inside a range that was asked for."""
    return OSError(errno.EIO, f"{os.strerror(errno.EIO)}: the file ends at byte {offset}, inside the range", str(path))
