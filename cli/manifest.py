"""What a batch has done, one JSON line per result, so that it can go on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, OutputError, RequestError
from .order import Order, read_by

NAME = "manifest.jsonl"


def identity(order: Order, seed: int) -> str:
    """SHA-256 over everything that decides a result: request, seed, contents of pictures and masks, model, device."""
    files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in read_by(order) if path.is_file()]
    content = [order.kind, order.request, seed, files, order.model]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class Manifest:
    """The file; lines are only ever added, each flushed to the disk before the next job begins.

    Args:
        folder: of the results.
        resume: go on with a manifest that is there.

    Raises:
        RequestError: there is one, and it is not to be gone on with.
        InputError: it cannot be read.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self.path = folder / NAME
        self.lines: list[dict[str, Any]] = []
        if self.path.exists():
            if not resume:
                raise RequestError(
                    f"the results must go into a folder of their own, got {folder} with {NAME} of an earlier batch",
                    hint="--resume goes on with it; -o names another folder",
                )
            self.lines = self._read()

    def done(self, key: str, files: tuple[Path, ...]) -> bool:
        """Whether a result was written and is still there."""
        known = any(line.get("job") == key and line.get("state") == "done" for line in self.lines)
        return known and all(path.is_file() for path in files)

    def began(self, files: tuple[Path, ...]) -> bool:
        """Whether a job of this batch began to write these files, so that they are its own to replace."""
        names = [str(path) for path in files]
        return any(line.get("files") == names for line in self.lines)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line, on the disk when this returns.

        Raises:
            OutputError: it cannot be written.
        """
        self.lines.append(dict(line))
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=str) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path} must be writable, got: {error.strerror or error}") from error

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines; what a kill left of a last one is cut off the file."""
        try:
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(self.path, len(whole))
            lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path} must be the manifest of a batch, got: {error}", hint="name another folder with -o"
            ) from error
        if not all(isinstance(line, dict) for line in lines):
            raise InputError(f"{self.path} must hold a JSON object per line, got something else")
        return lines


def locked(folder: Path) -> Any:
    """Keeps a second batch out of the folder; the lock goes with the process.

    Raises:
        RequestError: there is one.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RequestError(
            f"one batch at a time must write into {folder}, got a second", hint="wait for it, or -o another folder"
        ) from error
    return lock


def clear_parts(folder: Path) -> None:
    """Delete half-written files that a killed batch left here; the lock is held, so nobody is writing them."""
    for path in folder.rglob(".*.part"):
        path.unlink(missing_ok=True)
