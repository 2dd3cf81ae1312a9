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

ABI_VERSION = 1
STEM = "qengine_native"

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
    return NativeStatus(handle, path, "")


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
