"""The native C++ library: found, checked and loaded with ctypes on first use.

The library is an accelerator, never a requirement. Where it is absent every op has a Python twin, and
``reason()`` says why it is absent, in words for ``qengine doctor``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import KernelError

if TYPE_CHECKING:
    import torch

ABI_VERSION = 2
STEM = "qengine_native"
MAX_THREADS = 64
ISAS = ("best", "plain", "avx2", "avx512")
"""Instruction sets by their number in the ABI; all give the same bits."""

DTYPES = ("float32", "bfloat16", "float16")
"""Floats by their number in the ABI."""

_SUFFIXES = {"win32": ".dll", "darwin": ".dylib"}


@dataclass(frozen=True)
class NativeStatus:
    """Where the native library is, or why it is not used.

    Attributes:
        library: the loaded library, or None.
        path: the file that was loaded or tried, or None where none was found.
        reason: one sentence saying why ``library`` is None; empty when it is loaded.
    """

    library: ctypes.CDLL | None
    path: Path | None
    reason: str


def library() -> ctypes.CDLL | None:
    """The native library, or None where it cannot be used (``reason()`` says why)."""
    return status().library


def reason() -> str:
    """Why the native library is not used; empty when it is loaded."""
    return status().reason


@cache
def status() -> NativeStatus:
    """Find, load and check the native library, once per process."""
    if _switched_off():
        return NativeStatus(None, None, "QENGINE_NO_NATIVE is set")
    path = _find()
    if path is None:
        return NativeStatus(None, None, f"{_file_name()} was not built with this installation (no compiler?)")
    return load(path)


def load(path: Path) -> NativeStatus:
    """Load the library at ``path`` and check its ABI version; never raises for a bad library."""
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return NativeStatus(None, path, f"{path.name} cannot be loaded: {error}")
    try:
        version = handle.qengine_abi_version
    except AttributeError:
        return NativeStatus(None, path, f"{path.name} has no qengine_abi_version")
    version.argtypes = []
    version.restype = ctypes.c_uint32
    if version() != ABI_VERSION:
        return NativeStatus(None, path, f"{path.name} must have ABI version {ABI_VERSION}, got {version()}")
    for name, arguments in _SIGNATURES.items():
        if not hasattr(handle, name):
            return NativeStatus(None, path, f"{path.name} has no {name}")
        entry = getattr(handle, name)
        entry.argtypes, entry.restype = arguments, ctypes.c_int
    return NativeStatus(handle, path, "")


def isa(name: str = "best") -> str:
    """The instruction set that runs when this one is asked for; empty where this CPU or this build has it not.

    Raises:
        KernelError: no such instruction set.
    """
    if name not in ISAS:
        raise KernelError(f"isa must be one of {', '.join(ISAS)}, got {name!r}")
    handle = library()
    found = 0 if handle is None else handle.qengine_isa(ISAS.index(name))
    return ISAS[found] if found else ""


def isa_number(name: str) -> int:
    """The number of an instruction set in the ABI.

    Raises:
        KernelError: no such instruction set, or this CPU has it not, or there is no library.
    """
    if library() is None:
        raise KernelError(f"the native library must be loaded, got: {reason()}")
    if not isa(name):
        raise KernelError(f"isa must be one that this CPU has, got {name!r}")
    return ISAS.index(name)


class Matrix(ctypes.Structure):
    """``qengine_matrix`` of a tensor, which must outlive it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_uint64),
        ("columns", ctypes.c_uint64),
        ("row_stride", ctypes.c_uint64),
        ("dtype", ctypes.c_uint32),
    )

    @classmethod
    def of(cls, x: torch.Tensor) -> Matrix:
        """Of a tensor that :func:`readable` has returned."""
        return cls(x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), DTYPES.index(_dtype_name(x)))


class Affine(ctypes.Structure):
    """``qengine_affine``: addresses of float64 [columns], and the limit."""

    _fields_ = (
        ("shift", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("gain", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("linear", ctypes.c_void_p),
        ("limit", ctypes.c_double),
    )


def readable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it where the library cannot read it in place: its rows must lie in one piece, in any distance.

    Raises:
        KernelError: not a matrix of floats on the CPU, or an empty one.
    """
    if _dtype_name(x) not in DTYPES:
        raise KernelError(f"x must be {', '.join(DTYPES)}, got {_dtype_name(x)}")
    if x.dim() != 2 or not x.numel():
        raise KernelError(f"x must be a matrix [rows, columns] that is not empty, got shape {list(x.shape)}")
    if x.device.type != "cpu":
        raise KernelError(f"x must be on the CPU, got {x.device}")
    in_rows = x.stride(1) == 1 and (x.stride(0) == 0 or x.stride(0) >= x.shape[1])
    if in_rows and x.data_ptr() % x.element_size() == 0:
        return x
    return x.new_empty(x.shape).copy_(x)


def thread_count(threads: int | None) -> int:
    """The number of threads; that of torch when None.

    Raises:
        KernelError: not 1 to 64.
    """
    if threads is None:
        import torch

        return min(MAX_THREADS, torch.get_num_threads())
    if not 1 <= threads <= MAX_THREADS:
        raise KernelError(f"threads must be 1 to {MAX_THREADS}, got {threads}")
    return threads


def call(name: str, *arguments: object) -> None:
    """Call a function of the library with the GIL released.

    Raises:
        KernelError: there is no library, or it refuses the arguments.
    """
    handle = library()
    if handle is None:
        raise KernelError(f"the native library must be loaded, got: {reason()}")
    code = getattr(handle, name)(*arguments)
    if code:
        raise KernelError(f"arguments of {name} must be what it takes, got {os.strerror(code)}")


def _dtype_name(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


_MATRIX, _U32, _U64, _POINTER = ctypes.POINTER(Matrix), ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
_SIGNATURES = {
    "qengine_isa": [_U32],
    "qengine_quantise": [_MATRIX, _U32, _U32, _U32, _POINTER, _POINTER, _U32, _U32],
    "qengine_column_stats": [_MATRIX, _POINTER, _POINTER, _U32, _U32],
    "qengine_affine_columns": [_MATRIX, ctypes.POINTER(Affine), _POINTER, _U32, _U32],
    "qengine_scale_columns": [_MATRIX, _POINTER, _POINTER, _U32, _U32],
    "qengine_change_mask": [
        *(_POINTER, _POINTER, ctypes.POINTER(_U64), _POINTER, _U64),
        *(ctypes.c_float, _U32, _U64, _POINTER, _U32, _U32),
    ],
}


def _switched_off() -> bool:
    return os.environ.get("QENGINE_NO_NATIVE", "").strip().lower() in ("1", "true", "yes", "on")


def _file_name() -> str:
    return STEM + _SUFFIXES.get(sys.platform, ".so")


def _find() -> Path | None:
    """Beside this file in a wheel; in an editable install, where the build system put the compiled files."""
    beside = Path(__file__).resolve().parent / _file_name()
    if beside.is_file():
        return beside
    spec = importlib.util.find_spec(__name__.rpartition(".")[0])
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        candidate = Path(folder) / _file_name()
        if candidate.is_file():
            return candidate
    return None
