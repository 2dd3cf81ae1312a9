"""Safetensors headers, read with bounds of our own before anything trusts them.

Format: 8 bytes little-endian header length n, n bytes of JSON ``{name: {dtype, shape, data_offsets}}``, then the data.
Every tensor's range is checked against the real size of the file, so that no later read can leave it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from ..errors import CheckpointError

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 200_000
MAX_DIMS = 8

DTYPE_BYTES = MappingProxyType(
    {
        "BOOL": 1,
        "U8": 1,
        "I8": 1,
        "F8_E4M3": 1,
        "F8_E5M2": 1,
        "F8_E8M0": 1,
        "I16": 2,
        "U16": 2,
        "F16": 2,
        "BF16": 2,
        "I32": 4,
        "U32": 4,
        "F32": 4,
        "I64": 8,
        "U64": 8,
        "F64": 8,
    }
)

_AGAIN = "get the file again (qengine pull MODEL, or copy it anew)"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: what it is and where its bytes are.

    Attributes:
        name: the tensor's name, after renaming.
        dtype: safetensors spelling, ``BF16``, ``F32``, …
        shape: dimensions.
        path: the file.
        offset: first byte, counted from the beginning of the file.
        nbytes: size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one safetensors file, checked.

    Attributes:
        path: the file.
        tensors: name to TensorInfo, in the order of the data.
        metadata: the ``__metadata__`` strings.
        file_bytes: size of the whole file.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    file_bytes: int


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read.

    Raises:
        CheckpointError: the file is missing, is not safetensors, is truncated or has bytes left over, or its header is
            larger than 32 MiB, has more than 200,000 tensors, duplicate names, overlaps, gaps or wrong sizes.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            text = _header_bytes(file, path, file_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} must be a readable file, got {error.strerror or error}") from error
    entries = _parse(text, path)
    metadata = _metadata(entries.pop("__metadata__", None), path)
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"{path}: tensor count must be at most {MAX_TENSORS}, got {len(entries)}")
    start = 8 + len(text)
    infos = sorted((_tensor(name, entry, path, start) for name, entry in entries.items()), key=_position)
    _check_ranges(infos, path, start, file_bytes)
    return Header(path, MappingProxyType({info.name: info for info in infos}), MappingProxyType(metadata), file_bytes)


def _position(info: TensorInfo) -> tuple[int, int, str]:
    return info.offset, info.nbytes, info.name


def _header_bytes(file: BinaryIO, path: Path, file_bytes: int) -> bytes:
    head = file.read(8)
    if len(head) < 8:
        raise CheckpointError(f"{path} must be a safetensors file, got {len(head)} bytes", hint=_AGAIN)
    (length,) = struct.unpack("<Q", head)
    if head == b"version ":
        raise CheckpointError(
            f"{path} must be a safetensors file, got a Git LFS pointer", hint="fetch the real file with: git lfs pull"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: header must be at most {MAX_HEADER_BYTES} bytes, got {length}", hint=_AGAIN)
    if length > file_bytes - 8:
        raise CheckpointError(
            f"{path} must be at least {length + 8} bytes to hold its header, got {file_bytes}", hint=_AGAIN
        )
    return file.read(length)


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: header must begin with '{{', got {text[:1]!r}", hint=_AGAIN)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header must be JSON with unique names, got {error}", hint=_AGAIN) from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: header must be a JSON object, got {type(entries).__name__}", hint=_AGAIN)
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {twice[:200]!r} twice")
    return entries


def _no_constant(name: str) -> Any:
    raise ValueError(f"the constant {name}")


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings, got something else", hint=_AGAIN)
    return value


def _tensor(name: str, entry: Any, path: Path, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{path}: tensor {name[:200]!r} must have dtype, shape and data_offsets, got {entry!r:.200}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{path}: dtype of {name[:200]!r} must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r:.80}"
        )
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise CheckpointError(f"{path}: shape of {name[:200]!r} must be at most {MAX_DIMS} sizes, got {shape!r:.200}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: data_offsets of {name[:200]!r} must be [begin, end], got {offsets!r:.200}")
    nbytes = prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{path}: tensor {name[:200]!r} of {dtype} {shape} must have {nbytes} bytes, got {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, start + offsets[0], nbytes)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_ranges(infos: list[TensorInfo], path: Path, start: int, file_bytes: int) -> None:
    position = start
    for info in infos:
        if info.offset != position:
            fault = "overlaps its neighbour" if info.offset < position else "follows a gap"
            raise CheckpointError(
                f"{path}: tensor {info.name[:200]!r} must begin at byte {position}, got {info.offset} ({fault})",
                hint=_AGAIN,
            )
        position += info.nbytes
    if position != file_bytes:
        fault = "the file is truncated" if position > file_bytes else "bytes are left over at its end"
        raise CheckpointError(f"{path} must be {position} bytes, got {file_bytes}: {fault}", hint=_AGAIN)
