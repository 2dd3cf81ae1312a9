"""Models of the hub: found in the standard cache, pulled, listed, removed, verified."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .cache import (
    cache_folder,
    cached_repositories,
    cached_snapshot,
    is_reader,
    looks_like_hub_id,
    missing_parts,
    repository_folder,
)
from .document import read_json
from .variant import HUB_IDS, READERS, pipeline_classes, resolve_known

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all and the file at hand."""

_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class CachedModel:
    """A model in the hub cache.

    Attributes:
        hub_id: owner/name.
        path: its snapshot folder, or the repository's folder where no snapshot is complete.
        nbytes: bytes on disk.
        complete: every part is there.
        missing: relative names of what is not.
    """

    hub_id: str
    path: Path
    nbytes: int
    complete: bool
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Verification:
    """Result of checking a cached model's files against their hashes.

    Attributes:
        hub_id: owner/name.
        checked: relative names of files whose hash is right.
        altered: relative names of files whose hash is wrong.
        missing: relative names of files that are not there.
        unchecked: relative names of files whose hash is not known (a cache without links).
    """

    hub_id: str
    checked: tuple[str, ...]
    altered: tuple[str, ...]
    missing: tuple[str, ...]
    unchecked: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Nothing altered, nothing missing."""
        return not self.altered and not self.missing


def is_offline(offline: bool = False) -> bool:
    """True when asked for, or when HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE says so."""
    words = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return offline or any(word.strip().upper() in ("1", "ON", "YES", "TRUE") for word in words)


def locate(hub_id: str, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The snapshot folder of a model, from the cache or else pulled from the hub.

    Raises:
        CheckpointError: it is not in the cache and may or can not be pulled.
    """
    snapshot = cached_snapshot(hub_id)
    missing = missing_parts(snapshot) if snapshot else ["everything"]
    if snapshot and not missing:
        return snapshot
    if is_offline(offline):
        state = f"an incomplete one (without {', '.join(missing[:3])})" if snapshot else "none"
        raise CheckpointError(
            f"{hub_id} must be in the hub cache to be used offline, got {state} in {cache_folder()}",
            hint=f"qengine pull {short_name(hub_id)}",
        )
    return pull(hub_id, progress=progress)


def pull(model: str, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """Download what is needed of a model into the hub cache, resuming what an earlier pull left.

    Args:
        model: a hub id or a short name.
        offline: refuse at once.
        progress: called while bytes arrive.

    Returns:
        the snapshot folder; ``refs/main`` points at it only now that it is complete.

    Raises:
        CheckpointError: unknown or gated model, hub not reachable, too little disk space, or a wrong hash.
    """
    hub_id = hub_name(model)
    if is_offline(offline):
        raise CheckpointError(
            f"{hub_id} must be pulled with the network, got an offline run",
            hint="unset HF_HUB_OFFLINE or drop --offline",
        )
    from .download import download

    return download(hub_id, progress)


def list_models() -> list[CachedModel]:
    """The models of a kind that we run, in the hub cache; incomplete ones too."""
    found = (_cached_model(hub_id, folder) for hub_id, folder in cached_repositories())
    return [model for model in found if model is not None]


def remove(model: str) -> int:
    """Delete a model from the hub cache.

    Returns:
        the bytes freed.

    Raises:
        CheckpointError: it is not there, or cannot be deleted.
    """
    hub_id = hub_name(model)
    folder = repository_folder(hub_id)
    if not folder.is_dir():
        raise CheckpointError(f"{hub_id} must be in the hub cache to be removed, got none in {cache_folder()}")
    freed = _disk_bytes(folder)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} must be deletable, got {error.strerror or error}") from error
    return freed


def verify(model: str, *, progress: Progress | None = None) -> Verification:
    """Recompute the hash of every file of a cached model.

    In the cache a file is a link to a blob named by its hash: SHA-256 for large files, git's SHA-1 for small ones.

    Raises:
        CheckpointError: the model is not in the cache.
    """
    hub_id = hub_name(model)
    snapshot = cached_snapshot(hub_id)
    if snapshot is None:
        raise CheckpointError(
            f"{hub_id} must be in the hub cache to be verified, got none in {cache_folder()}",
            hint=f"qengine pull {short_name(hub_id)}",
        )
    files = sorted(path for path in snapshot.rglob("*") if path.is_symlink() or path.is_file())
    sorted_out: dict[str, list[str]] = {"checked": [], "altered": [], "missing": [], "unchecked": []}
    total = sum(path.stat().st_size for path in files if path.exists())
    done = 0
    for path in files:
        name = path.relative_to(snapshot).as_posix()
        sorted_out[_state(path)].append(name)
        done += path.stat().st_size if path.exists() else 0
        if progress:
            progress(done, total, name)
    absent = [name for name in missing_parts(snapshot) if name not in sorted_out["missing"]]
    missing = (*sorted_out["missing"], *absent)
    return Verification(
        hub_id,
        tuple(sorted_out["checked"]),
        tuple(sorted_out["altered"]),
        missing,
        tuple(sorted_out["unchecked"]),
    )


def hub_name(model: str) -> str:
    """The hub id behind a short name or a hub id.

    Raises:
        CheckpointError: it is neither.
    """
    if model == "tiny":
        raise CheckpointError("model must be one of the hub, got tiny, which is part of the package")
    hub_id = READERS.get(model.lower()) or resolve_known(model) or model
    if not looks_like_hub_id(hub_id):
        known = ", ".join((*HUB_IDS, *READERS))
        raise CheckpointError(f"model must be a hub id (owner/name) or one of {known}, got {model!r}")
    return hub_id


def short_name(hub_id: str) -> str:
    """The short name of a hub id, or the hub id itself."""
    return next((short for short, known in {**HUB_IDS, **READERS}.items() if known == hub_id), hub_id)


def file_hash(path: Path, kind: str) -> str:
    """Hash of a file: ``sha256``, or ``git`` for git's SHA-1 of a blob."""
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    with path.open("rb") as file:
        if kind == "git":
            digest.update(f"blob {os.fstat(file.fileno()).st_size}\0".encode())
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _state(path: Path) -> str:
    if not path.exists():
        return "missing"
    if not path.is_symlink():
        return "unchecked"
    name = path.resolve().name
    kinds = {64: "sha256", 40: "git"}
    if len(name) not in kinds:
        return "unchecked"
    return "checked" if file_hash(path, kinds[len(name)]) == name else "altered"


def _cached_model(hub_id: str, folder: Path) -> CachedModel | None:
    """The model in a repository's folder; None where it is of a kind that we do not run."""
    snapshot = cached_snapshot(hub_id)
    if snapshot is None:
        if hub_id not in (*HUB_IDS.values(), *READERS.values()):
            return None
        return CachedModel(hub_id, folder, _disk_bytes(folder), False, ("everything",))
    if not is_reader(snapshot) and not _is_pipeline(snapshot):
        return None
    missing = tuple(missing_parts(snapshot))
    return CachedModel(hub_id, snapshot, _disk_bytes(folder), not missing, missing)


def _is_pipeline(snapshot: Path) -> bool:
    index = snapshot / "model_index.json"
    return index.is_file() and read_json(index).get("_class_name") in pipeline_classes()


def _disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


__all__ = [
    "CachedModel",
    "Progress",
    "Verification",
    "cache_folder",
    "cached_snapshot",
    "file_hash",
    "hub_name",
    "is_offline",
    "list_models",
    "locate",
    "looks_like_hub_id",
    "pull",
    "remove",
    "short_name",
    "verify",
]
