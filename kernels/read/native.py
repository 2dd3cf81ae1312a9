"""The native reader: ``qengine_read`` of the C++ library, called with the GIL released."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import native
from .reference import short_file

if TYPE_CHECKING:
    import torch


class _Range(ctypes.Structure):
    _fields_ = (
        ("offset", ctypes.c_uint64),
        ("nbytes", ctypes.c_uint64),
        ("target", ctypes.c_void_p),
    )


def available() -> bool:
    """True when the native library is loaded."""
    return native.library() is not None


def read_many(path: Path, ranges: Sequence[tuple[int, torch.Tensor]], threads: int, piece_bytes: int) -> None:
    """Fill every tensor from its offset; see ``kernels.read.read_many``."""
    library = native.library()
    if library is None:
        raise OSError(errno.ENOSYS, f"the native reader must be loaded, got: {native.reason()}")
    table = (_Range * len(ranges))(*(_Range(offset, t.numel(), t.data_ptr()) for offset, t in ranges))
    stopped_at = ctypes.c_uint64(0)
    code = _entry(library)(_encoded(path), table, len(ranges), threads, piece_bytes, ctypes.byref(stopped_at))
    if code == 0:
        return
    if code < 0:
        raise short_file(path, stopped_at.value)
    raise OSError(code, os.strerror(code), str(path))


@cache
def _entry(library: ctypes.CDLL) -> Any:
    entry = library.qengine_read
    entry.argtypes = [
        ctypes.c_char_p,
        ctypes.POINTER(_Range),
        ctypes.c_size_t,
        ctypes.c_uint32,
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_uint64),
    ]
    entry.restype = ctypes.c_int
    return entry


def _encoded(path: Path) -> bytes:
    return str(path).encode("utf-8") if os.name == "nt" else os.fsencode(path)
