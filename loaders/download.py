"""Pulling a model into the hub cache: resumable, space checked first, every byte hashed.

Large files are streamed by us into ``blobs/<sha256>.qengine-part``, which a later pull continues (the hub library drops
its partial files), and take their place only with the right SHA-256. The library then lays out the snapshot as always.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .cache import cache_folder, repository_folder
from .hub import Progress, file_hash, short_name

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_FOLDERS = frozenset({"transformer", "vae", "text_encoder", "tokenizer", "processor", "image_processor", "scheduler"})
_READER_FILES = frozenset({"config.json", "tokenizer_config.json"})
_SUFFIXES = (".safetensors", ".json", ".txt", ".jinja")
_MARGIN_BYTES = 256 << 20
_TIMEOUT_SECONDS = 30.0
_ATTEMPTS = 5
_PAUSE_SECONDS = 1.0
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR})


@dataclass(frozen=True)
class _File:
    name: str
    nbytes: int
    sha256: str | None
    git_hash: str | None


def download(hub_id: str, progress: Progress | None = None) -> Path:
    """Pull what is needed of a model and return its snapshot folder; see ``hub.pull``."""
    with _locked(hub_id), _explained(hub_id):
        commit, files = _listing(hub_id)
        folder = repository_folder(hub_id)
        _require_space(hub_id, folder, files)
        meter = _Meter(sum(file.nbytes for file in files), progress)
        for file in files:
            if file.sha256:
                _pull_blob(hub_id, commit, file, folder / "blobs", meter)
            _place(hub_id, commit, file, folder)
            meter.finish(file)
        _point_main(folder, commit)
    return folder / "snapshots" / commit


class _Meter:
    """Bytes done over all files, told to the caller."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress = total, progress
        self.finished = 0

    def within(self, file: _File, done: int) -> None:
        if self.progress:
            self.progress(self.finished + done, self.total, file.name)

    def finish(self, file: _File) -> None:
        self.finished += file.nbytes
        self.within(file, 0)


def _listing(hub_id: str) -> tuple[str, list[_File]]:
    from huggingface_hub import HfApi

    info = HfApi(endpoint=_endpoint()).model_info(hub_id, files_metadata=True, timeout=_TIMEOUT_SECONDS)
    entries = info.siblings or ()
    names = {entry.rfilename for entry in entries}
    needed = _of_pipeline if "model_index.json" in names else _of_reader
    if not info.sha or (needed is _of_reader and not names >= _READER_FILES):
        raise CheckpointError(
            f"{hub_id} must be a diffusers model or a Qwen3-VL, got a repository without model_index.json"
        )
    files = [_described(hub_id, entry) for entry in entries if needed(entry.rfilename)]
    return info.sha, sorted(files, key=lambda file: (file.sha256 is not None, file.name))


def _of_pipeline(name: str) -> bool:
    """A file of a diffusers model that is read."""
    folder, _, rest = name.rpartition("/")
    plain = ".." not in name and "\\" not in name
    return plain and (name == "model_index.json" or (folder in _FOLDERS and rest.endswith(_SUFFIXES)))


def _of_reader(name: str) -> bool:
    """The same of a model in the layout of transformers: all in one folder."""
    return "/" not in name and "\\" not in name and name.endswith(_SUFFIXES)


def _described(hub_id: str, entry: RepoSibling) -> _File:
    sha256 = entry.lfs.sha256 if entry.lfs else None
    if entry.size is None or not (sha256 or entry.blob_id):
        raise CheckpointError(f"{hub_id} must tell the size and hash of {entry.rfilename}, got neither from the hub")
    if sha256 is not None and (len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef")):
        raise CheckpointError(
            f"{hub_id}: SHA-256 of {entry.rfilename} must be 64 hexadecimal digits, got {sha256!r:.80}"
        )
    return _File(entry.rfilename, entry.size, sha256, None if sha256 else entry.blob_id)


def _require_space(hub_id: str, folder: Path, files: Sequence[_File]) -> None:
    needed = sum(file.nbytes - _present_bytes(folder / "blobs", file) for file in files)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed and needed + _MARGIN_BYTES > free:
        raise CheckpointError(
            f"free space in {existing} must be at least {needed + _MARGIN_BYTES} bytes to pull {hub_id}, got {free}",
            hint="set HF_HOME to a folder on a larger disk",
        )


def _present_bytes(blobs: Path, file: _File) -> int:
    for path in (blobs / (file.sha256 or file.git_hash or ""), _part(blobs, file)):
        if path.is_file():
            return min(file.nbytes, path.stat().st_size)
    return 0


def _part(blobs: Path, file: _File) -> Path:
    return blobs / f"{file.sha256}.qengine-part"


def _pull_blob(hub_id: str, commit: str, file: _File, blobs: Path, meter: _Meter) -> None:
    """Stream a large file to its blob, going on after what is there; a broken connection is taken up again."""
    blob, part = blobs / str(file.sha256), _part(blobs, file)
    if blob.is_file() and blob.stat().st_size == file.nbytes:
        return
    blobs.mkdir(parents=True, exist_ok=True)
    idle = 0
    while (before := part.stat().st_size if part.is_file() else 0) < file.nbytes:
        try:
            _stream(hub_id, commit, file, part, before, meter)
        except _transport_errors() as error:
            grown = part.is_file() and part.stat().st_size > before
            idle = 0 if grown else idle + 1
            if idle >= _ATTEMPTS or _is_disk_error(error):
                raise
            time.sleep(_PAUSE_SECONDS * idle)
    found = file_hash(part, "sha256")
    if found != file.sha256 or part.stat().st_size != file.nbytes:
        part.unlink()
        raise CheckpointError(
            f"{hub_id}: SHA-256 of {file.name} must be {file.sha256}, got {found}; the bad download was deleted",
            hint=f"qengine pull {short_name(hub_id)}",
        )
    os.replace(part, blob)


def _stream(hub_id: str, commit: str, file: _File, part: Path, start: int, meter: _Meter) -> None:
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(hub_id, file.name, revision=commit, endpoint=_endpoint())
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    client: Any = get_session()
    with client.stream("GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_SECONDS) as response:
        hf_raise_for_status(response)
        resumed = start > 0 and response.status_code == 206
        with part.open("ab" if resumed else "wb") as target:
            done = start if resumed else 0
            for chunk in response.iter_bytes():  # as they come: a larger chunk is lost when the connection breaks
                target.write(chunk)
                done += len(chunk)
                if done > file.nbytes:
                    break
                meter.within(file, done)


def _place(hub_id: str, commit: str, file: _File, folder: Path) -> None:
    """Let the hub library put the file into the snapshot; small files are downloaded by it and hashed here."""
    from huggingface_hub import hf_hub_download

    placed = Path(hf_hub_download(hub_id, file.name, revision=commit, cache_dir=folder.parent, endpoint=_endpoint()))
    if placed.stat().st_size == file.nbytes and (file.git_hash is None or file_hash(placed, "git") == file.git_hash):
        return
    placed.resolve().unlink()
    placed.unlink(missing_ok=True)
    raise CheckpointError(
        f"{hub_id}: {file.name} must have the hash that the hub states, got another; the bad download was deleted",
        hint=f"qengine pull {short_name(hub_id)}",
    )


def _point_main(folder: Path, commit: str) -> None:
    """``refs/main`` moves only to a complete snapshot, in one step."""
    reference = folder / "refs" / "main"
    reference.parent.mkdir(parents=True, exist_ok=True)
    temporary = reference.with_name("main.qengine-part")
    temporary.write_text(commit, "utf-8")
    os.replace(temporary, reference)


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _locked(hub_id: str) -> Iterator[None]:
    """One pull of a model at a time."""
    from filelock import FileLock, Timeout

    place = cache_folder() / ".locks" / f"qengine-{repository_folder(hub_id).name}.lock"
    lock = FileLock(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CheckpointError(f"{hub_id} must be pulled by one process at a time, got another that is at it") from error
    except OSError as error:
        raise CheckpointError(f"{cache_folder()} must be writable, got {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _explained(hub_id: str) -> Iterator[None]:
    """Errors of the hub and of the way to it, in our words."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    again = f"qengine pull {short_name(hub_id)}"
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"{hub_id} must be open to you, got a gated model", hint="accept its terms on the hub and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{hub_id} must be a model of the hub, got none of this name (or a private one)",
            hint="qengine ls lists the models that are present; a private model needs HF_TOKEN",
        ) from error
    except _transport_errors() as error:
        if _is_disk_error(error):
            raise CheckpointError(f"{cache_folder()} must be writable, got {error}") from error
        raise CheckpointError(
            f"{hub_id} must be reachable on the hub, got {type(error).__name__}: {error}",
            hint=f"once the hub can be reached: {again}",
        ) from error


def _is_disk_error(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK_ERRORS


def _transport_errors() -> tuple[type[Exception], ...]:
    """OSError, and the root of the HTTP client's errors, whichever client this version of the hub library uses."""
    from huggingface_hub.errors import HfHubHTTPError

    roots = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError" and issubclass(base, Exception)]
    return (OSError, *roots)


__all__ = ["download"]
