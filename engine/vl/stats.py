"""Reference statistics of a text encoder, by column: what image rows are normalised to and measured against."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...errors import InputError, KernelError, QEngineError, RequestError
from ...kernels.normalise import column_stats
from ...loaders.header import read_header
from ..files import write_tensors
from ..places import default_cache

FORMAT = "qengine-statistics-1"
MAX_FILE_BYTES = 16 << 20
MAX_WIDTH = 1 << 20
MAKE = "make them with: qengine stats MODEL -o FILE"


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each column over all tokens of some prompts; std divides by N - 1.

    Attributes:
        mean: float32 [D], on the CPU.
        std: float32 [D], on the CPU.
        global_mean: over all entries; NaN where it is not known.
        global_std: over all entries; NaN where it is not known.
        layer: of the text encoder, or None.
        model: fingerprint of the text encoder's checkpoint, or its name; empty where it is not known.
        prompts: the prompts, where they are known.
        num_tokens: rows that went in, 0 where it is not known.
    """

    mean: torch.Tensor
    std: torch.Tensor
    global_mean: float = math.nan
    global_std: float = math.nan
    layer: int | None = None
    model: str = ""
    prompts: tuple[str, ...] = ()
    num_tokens: int = 0

    @property
    def width(self) -> int:
        """Columns."""
        return len(self.mean)


def compute_statistics(
    embeddings: Sequence[torch.Tensor],
    *,
    layer: int | None = None,
    model: str = "",
    prompts: Sequence[str] = (),
    implementation: str = "reference",
) -> Statistics:
    """Statistics of the rows of several embeddings, laid one below the other.

    Args:
        embeddings: each [T, D] of one width.
        layer: of the text encoder that made them.
        model: fingerprint of its checkpoint.
        prompts: what was encoded.
        implementation: of the column statistics.

    Raises:
        RequestError: none, of different widths, fewer than two rows, or not finite.
    """
    widths = sorted({tuple(rows.shape[1:]) for rows in embeddings})
    if len(widths) != 1 or len(widths[0]) != 1:
        raise RequestError(f"embeddings must be matrices of one width, got {[list(rows.shape) for rows in embeddings]}")
    rows = torch.cat([each.detach().to("cpu", torch.float32) for each in embeddings])
    try:
        mean, std = column_stats(rows, implementation=implementation)
    except KernelError as error:
        raise RequestError(f"embeddings must give statistics: {error.message}") from error
    whole = rows.double()
    totals = float(whole.mean()), float(whole.std())
    return Statistics(mean.cpu(), std.cpu(), *totals, layer, model, tuple(prompts), len(rows))


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    words = {
        "format": FORMAT,
        "global_mean": repr(statistics.global_mean),
        "global_std": repr(statistics.global_std),
        "layer": json.dumps(statistics.layer),
        "model": statistics.model,
        "prompts": json.dumps(list(statistics.prompts)),
        "num_tokens": str(statistics.num_tokens),
        "ddof": "1",
    }
    write_tensors(path, {"per_dim_mean": statistics.mean, "per_dim_std": statistics.std}, words)


def read_statistics(path: str | Path) -> Statistics:
    """Statistics from safetensors, npz (nothing is unpickled) or JSON, checked.

    Raises:
        InputError: missing, of another kind, too large, or with values that are not finite.
    """
    path = Path(path).expanduser()
    readers = {".safetensors": _from_safetensors, ".npz": _from_npz, ".json": _from_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} must be a .safetensors, .npz or .json file, got {path.suffix or 'no suffix'}")
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InputError(f"{path} must be at most {MAX_FILE_BYTES} bytes, got {size}")
        return _checked(reader(path), str(path))
    except OSError as error:
        raise InputError(f"{path} must be readable statistics, got {error.strerror or error}", hint=MAKE) from error
    except (ValueError, KeyError, TypeError, RecursionError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise InputError(f"{path} must be statistics, got: {error}", hint=MAKE) from error


def default_path() -> Path:
    """Where `qengine stats` keeps the statistics that are used when none are given: in the cache folder."""
    return default_cache() / "statistics" / "reference.safetensors"


def require_statistics(given: Statistics | str | Path | None, width: int, need: str) -> Statistics:
    """Statistics of a width: as given, or read from their file.

    Args:
        given: the statistics, their file, or None for those of :func:`default_path`.
        width: columns of what will be compared with them.
        need: what asks for them, for the message.

    Raises:
        RequestError: there are none, or they have another width.
        InputError: the file cannot be used.
    """
    if given is None:
        given = default_path()
        if not given.is_file():
            raise RequestError(f"{need} must have reference statistics, got none", hint=MAKE)
    found = given if isinstance(given, Statistics) else read_statistics(given)
    if found.width != width:
        raise RequestError(f"reference statistics must have {width} columns as the embeddings, got {found.width}")
    return found


def _checked(found: Mapping[str, Any], place: str) -> Statistics:
    mean, std = (torch.as_tensor(found[name]).to(torch.float32) for name in ("per_dim_mean", "per_dim_std"))
    if mean.dim() != 1 or mean.shape != std.shape or not 0 < len(mean) <= MAX_WIDTH:
        raise InputError(
            f"{place}: per_dim_mean and per_dim_std must be vectors of one length, "
            f"got {list(mean.shape)} and {list(std.shape)}"
        )
    if not bool(torch.isfinite(mean).all() and torch.isfinite(std).all()) or bool((std < 0).any()):
        raise InputError(f"{place}: statistics must be finite with no negative std, got others")
    return Statistics(
        mean,
        std,
        float(found.get("global_mean", math.nan)),
        float(found.get("global_std", math.nan)),
        None if found.get("layer") is None else int(found["layer"]),
        str(found.get("model") or ""),
        tuple(str(prompt) for prompt in found.get("prompts") or ()),
        int(found.get("num_tokens") or 0),
    )


def _from_safetensors(path: Path) -> dict[str, Any]:
    try:
        words = dict(read_header(path).metadata)
    except QEngineError as error:
        raise InputError(error.message, hint=error.hint) from error
    found: dict[str, Any] = dict(load_file(path))
    for name in ("global_mean", "global_std", "model", "num_tokens"):
        if name in words:
            found.setdefault(name, words[name])
    return {**found, "layer": json.loads(words.get("layer", "null")), "prompts": json.loads(words.get("prompts", "[]"))}


def _from_json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text("utf-8"))
    if not isinstance(found, dict):
        raise TypeError(f"a JSON {type(found).__name__}")
    return found


def _from_npz(path: Path) -> dict[str, Any]:
    """Arrays of plain numbers; each header is read before anything of the size that it claims is allocated."""
    found: dict[str, Any] = {}
    with zipfile.ZipFile(path) as archive:
        for name in ("per_dim_mean", "per_dim_std", "global_mean", "global_std"):
            member = f"{name}.npy"
            if member in archive.namelist():
                found[name] = _array(archive, member)
    return found


def _array(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    size = archive.getinfo(member).file_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{member} of {size} bytes")
    with archive.open(member) as file:
        data = BytesIO(file.read(MAX_FILE_BYTES))
    np.lib.format.read_magic(data)
    shape, _, dtype = np.lib.format.read_array_header_1_0(data)
    if dtype.kind not in "fiu" or math.prod(shape) > MAX_WIDTH:
        raise ValueError(f"{member} of {dtype} {shape}")
    data.seek(0)
    return np.lib.format.read_array(data, allow_pickle=False)
