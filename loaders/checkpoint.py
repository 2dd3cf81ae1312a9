"""Tensors of one component, over one file or several shards; headers are read at once, data only when asked for."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from ..kernels.read import read_many
from .header import TensorInfo, read_header
from .shards import check_index, expand, listing

if TYPE_CHECKING:
    import torch

TORCH_NAMES = MappingProxyType(
    {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
        "I16": "int16",
        "U16": "uint16",
        "F16": "float16",
        "BF16": "bfloat16",
        "I32": "int32",
        "U32": "uint32",
        "F32": "float32",
        "I64": "int64",
        "U64": "uint64",
        "F64": "float64",
    }
)
STAGING_BYTES = 64 << 20
SAMPLED_TENSORS = 64
SAMPLE_BYTES = 4096


class Checkpoint:
    """The tensors of one component by name.

    Attributes:
        tensors: name to TensorInfo, after renaming.
        dropped: stored names that the renaming dropped (markers, parts of other components).
        metadata: the files' ``__metadata__``, merged.
        paths: the safetensors files.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
        paths: Sequence[Path],
        dropped: Collection[str] = (),
    ) -> None:
        self.tensors = MappingProxyType(dict(tensors))
        self.metadata = MappingProxyType(dict(metadata))
        self.paths = tuple(paths)
        self.dropped = frozenset(dropped)
        self.bytes_read = 0

    @classmethod
    def open(cls, paths: Sequence[Path], rename: Callable[[str], str | None] | None = None) -> Checkpoint:
        """Read the headers of all files.

        Args:
            paths: safetensors files, or one ``*.safetensors.index.json``, or one shard (``-00001-of-00003``), whose
                siblings are then found.
            rename: stored name to our name; None drops the tensor.

        Raises:
            CheckpointError: a file or shard is missing or bad, or two tensors get one name.
        """
        files, listed = expand([Path(path) for path in paths])
        headers = [read_header(path) for path in files]
        if listed is not None:
            check_index(listed, headers)
        tensors: dict[str, TensorInfo] = {}
        dropped: set[str] = set()
        metadata: dict[str, str] = {}
        for header in headers:
            metadata.update(header.metadata)
            for stored, info in header.tensors.items():
                name = stored if rename is None else rename(stored)
                if name is None:
                    dropped.add(stored)
                elif name in tensors:
                    raise CheckpointError(f"{header.path}: tensor {name!r} must be stored once, got it twice")
                else:
                    tensors[name] = TensorInfo(name, info.dtype, info.shape, info.path, info.offset, info.nbytes)
        return cls(tensors, metadata, files, dropped)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def place(self) -> str:
        """The file, or the folder of the shards, for messages."""
        return str(self.paths[0] if len(self.paths) == 1 else self.paths[0].parent)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes and shapes, and the first 4 KiB of up to 64 tensors; no path, no time."""
        digest = hashlib.sha256(b"qengine checkpoint 1\n")
        ordered = [self.tensors[name] for name in sorted(self.tensors)]
        for info in ordered:
            digest.update(json.dumps([info.name, info.dtype, info.shape]).encode())
        for info in _sample(ordered):
            with info.path.open("rb") as file:
                file.seek(info.offset)
                digest.update(file.read(min(SAMPLE_BYTES, info.nbytes)))
        return digest.hexdigest()

    @cached_property
    def identity(self) -> str:
        """Key for caches of what is computed from the weights: the fingerprint, and size and time of every file.

        The fingerprint samples the data; a file rewritten in place with other values elsewhere differs here.
        """
        files = [(path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        return hashlib.sha256(json.dumps([self.fingerprint, files]).encode()).hexdigest()

    def require(self, expected: Mapping[str, tuple[int, ...]], subject: str, ignore: Collection[str] = ()) -> None:
        """Check that exactly the expected tensors are there, in the expected shapes.

        Args:
            expected: name to shape.
            subject: what the file should be, for the message ("transformer").
            ignore: names that may be there or not, unchecked; a name ending in ``.`` stands for all that begin with it.

        Raises:
            CheckpointError: missing, unexpected or wrongly shaped tensors; the first ten of each are listed.
        """
        skip = tuple(name for name in ignore if name.endswith("."))
        exact = set(ignore)

        def counts(name: str) -> bool:
            return name not in exact and not name.startswith(skip)

        missing = [name for name in expected if name not in self.tensors and counts(name)]
        unexpected = [name for name in self.tensors if name not in expected and counts(name)]
        wrong = [
            f"{name} {list(self.tensors[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in self.tensors and counts(name) and self.tensors[name].shape != tuple(shape)
        ]
        faults = [
            listing(*pair) for pair in (("missing", missing), ("unexpected", unexpected), ("shape", wrong)) if pair[1]
        ]
        if faults:
            raise CheckpointError(
                f"{self.place} must hold the tensors of the {subject}, got {'; '.join(faults)}",
                hint="check that the file belongs to this model and is complete (qengine verify MODEL)",
            )

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, fresh on the CPU, as stored or cast to ``dtype``.

        Raises:
            CheckpointError: the tensor does not exist or the file changed or cannot be read.
        """
        import torch

        info = self.info(name)
        tensor = torch.empty(info.shape, dtype=stored_dtype(info) if dtype is None else dtype)
        self.read_into([(name, tensor)])
        return tensor

    def read_into(self, items: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Fill many tensors at once with the parallel reader, casting where the dtype differs.

        Args:
            items: pairs of name and target of the stored shape, any dtype and device. Contiguous CPU targets of the
                stored dtype are read into directly; the others go through staging of 64 MiB.

        Raises:
            CheckpointError: a name does not exist, a shape differs, or a file changed or cannot be read.
        """
        direct: list[tuple[TensorInfo, torch.Tensor]] = []
        staged: list[tuple[TensorInfo, torch.Tensor]] = []
        for name, target in items:
            info = self.info(name)
            if tuple(target.shape) != info.shape:
                raise CheckpointError(
                    f"{self.place}: tensor {name!r} must have shape {list(target.shape)}, got {list(info.shape)}"
                )
            whole = target.is_contiguous() and target.device.type == "cpu" and target.dtype == stored_dtype(info)
            (direct if whole else staged).append((info, target))
        for group in _groups(direct):
            _fill(group)
            self.bytes_read += sum(info.nbytes for info, _ in group)
        for group in _groups([piece for info, target in staged for piece in _pieces(info, target)]):
            _fill_staged(group)
            self.bytes_read += sum(info.nbytes for info, _ in group)

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Rows of a stored matrix, gathered from the file: [rows, columns] and [...] -> [..., columns].

        Raises:
            CheckpointError: the tensor does not exist or is no matrix.
            IndexError: an index lies outside the matrix.
        """
        import torch

        info = self.info(name)
        if len(info.shape) != 2:
            raise CheckpointError(f"{self.place}: tensor {name!r} must be a matrix, got shape {list(info.shape)}")
        wanted, back = torch.unique(indices.detach().to("cpu", torch.int64), return_inverse=True)
        if wanted.numel() and not (0 <= int(wanted[0]) and int(wanted[-1]) < info.shape[0]):
            raise IndexError(f"row must be 0 to {info.shape[0] - 1}, got {int(wanted[0])} to {int(wanted[-1])}")
        row_bytes = info.nbytes // max(1, info.shape[0])
        unique = torch.empty((wanted.numel(), info.shape[1]), dtype=stored_dtype(info))
        data = as_bytes(unique).view(wanted.numel(), row_bytes)
        ranges = [(info.offset + row * row_bytes, data[place]) for place, row in enumerate(wanted.tolist())]
        _read(info.path, ranges)
        self.bytes_read += data.nbytes
        return unique[back]

    def info(self, name: str) -> TensorInfo:
        """The tensor's place and kind.

        Raises:
            CheckpointError: there is no tensor of this name.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.place} must hold the tensor {name!r}, got none of this name") from None


def stored_dtype(info: TensorInfo) -> torch.dtype:
    """The torch dtype of a stored tensor."""
    import torch

    return getattr(torch, TORCH_NAMES[info.dtype])


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as uint8 [n], sharing its memory."""
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8)


def _sample(ordered: Sequence[TensorInfo]) -> list[TensorInfo]:
    filled = [info for info in ordered if info.nbytes]
    step = max(1, len(filled) / SAMPLED_TENSORS)
    return [filled[int(i * step)] for i in range(min(SAMPLED_TENSORS, len(filled)))]


def _groups(items: Sequence[tuple[TensorInfo, torch.Tensor]]) -> Iterable[list[tuple[TensorInfo, torch.Tensor]]]:
    group: list[tuple[TensorInfo, torch.Tensor]] = []
    held = 0
    for item in items:
        if group and held + item[0].nbytes > STAGING_BYTES:
            yield group
            group, held = [], 0
        group.append(item)
        held += item[0].nbytes
    if group:
        yield group


def _pieces(info: TensorInfo, target: torch.Tensor) -> Iterable[tuple[TensorInfo, torch.Tensor]]:
    """A tensor in flat pieces that fit the staging; as a whole if it fits, or if the target cannot be cut so."""
    if info.nbytes <= STAGING_BYTES or not target.is_contiguous():
        yield info, target
        return
    size, flat = info.nbytes // target.numel(), target.detach().view(-1)
    for start in range(0, len(flat), STAGING_BYTES // size):
        part = flat[start : start + STAGING_BYTES // size]
        place = info.offset + start * size
        yield TensorInfo(info.name, info.dtype, tuple(part.shape), info.path, place, len(part) * size), part


def _fill_staged(group: Sequence[tuple[TensorInfo, torch.Tensor]]) -> None:
    import torch

    staging = [(info, torch.empty(info.shape, dtype=stored_dtype(info))) for info, _ in group]
    _fill(staging)
    with torch.no_grad():
        for (_, target), (_, tensor) in zip(group, staging, strict=True):
            target.copy_(tensor)


def _fill(items: Sequence[tuple[TensorInfo, torch.Tensor]]) -> None:
    by_file: dict[Path, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for info, tensor in items:
        by_file[info.path].append((info.offset, as_bytes(tensor)))
    for path, ranges in by_file.items():
        _read(path, sorted(ranges, key=lambda item: item[0]))


def _read(path: Path, ranges: Sequence[tuple[int, torch.Tensor]]) -> None:
    try:
        read_many(path, ranges)
    except OSError as error:
        raise CheckpointError(
            f"{path} must be readable as its header says, got {error.strerror or error}",
            hint="the file changed or is damaged: qengine verify MODEL",
        ) from error
