"""``manifest.jsonl`` beside the results, written by many processes: what was begun, what is done."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...errors import InputError, OutputError, RequestError

NAME = "manifest.jsonl"
LOCK_SECONDS = 60.0


class Ledger:
    """Lines are only ever added, under a lock, each on the disk before the next.

    A result is begun before it is made and done after it is written. Nothing is begun where a file stands that is of
    something else, and files appear whole: so a file whose result was begun is that result, whoever wrote it.

    Args:
        folder: of the results; made where it is missing.

    Raises:
        OutputError: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / f".{NAME}.lock", timeout=LOCK_SECONDS)
        except OSError as error:
            raise OutputError(f"{folder} must be a folder, got: {error.strerror or error}", hint="-o FOLDER") from error
        self._lines: list[dict[str, Any]] = []
        self._offset = 0

    def begin(self, key: str, files: Sequence[Path], **more: Any) -> bool:
        """Say that a result is going to be made.

        Args:
            key: identity of the result.
            files: that it will be in.
            more: for the line.

        Returns:
            Whether there is anything to do; False where the result is here already, and now said to be.

        Raises:
            RequestError: something else stands in its place.
            OutputError: the manifest cannot be written.
            InputError: the manifest cannot be read.
        """
        names = [self._named(path) for path in files]
        with self._held():
            lines = [line for line in self._read() if line.get("job") == key]
            there = [path for path in files if os.path.lexists(path)]
            begun = any(line.get("files") == names for line in lines)
            if there and not begun:
                raise RequestError(
                    f"{there[0]} must be a new file, got one of something else",
                    hint="name another folder with -o, or move it away",
                )
            if len(there) == len(files) and begun:
                if not any(line.get("state") == "done" for line in lines):
                    self._add({"job": key, "state": "done", "files": names, **more})
                return False
            self._add({"job": key, "state": "begun", "files": names, **more})
            return True

    def end(self, key: str, files: Sequence[Path], **more: Any) -> None:
        """Say that a result is written.

        Raises:
            OutputError: as :meth:`begin`.
        """
        with self._held():
            self._add({"job": key, "state": "done", "files": [self._named(path) for path in files], **more})

    def lines(self) -> list[dict[str, Any]]:
        """All that was said.

        Raises:
            InputError: the manifest cannot be read.
        """
        with self._held():
            return list(self._read())

    def add(self, line: Mapping[str, Any]) -> None:
        """Say something, on the disk when this returns.

        Raises:
            OutputError: the manifest cannot be written.
        """
        with self._held():
            self._add(line)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Alone at the file.

        Raises:
            OutputError: another process does not let go of it.
        """
        try:
            self._lock.acquire()
        except (Timeout, OSError) as error:
            raise OutputError(
                f"{self.path} must be free within {LOCK_SECONDS:g} s, got: {error}",
                hint=f"if no process is at work there, remove {self._lock.lock_file}",
            ) from error
        try:
            yield
        finally:
            self._lock.release()

    def _named(self, path: Path) -> str:
        """As seen from the folder, so that the folder can be moved."""
        return path.relative_to(self.folder).as_posix()

    def _read(self) -> list[dict[str, Any]]:
        """All whole lines. The lock is held, so what a kill left of a last one is nobody's and is cut off."""
        try:
            with self.path.open("rb+") as file:
                file.seek(self._offset)
                content = file.read()
                whole = content[: content.rfind(b"\n") + 1]
                if len(whole) < len(content):
                    file.truncate(self._offset + len(whole))
            lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
        except FileNotFoundError:
            return self._lines
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path} must be the manifest of a queue's results, got: {error}") from error
        self._lines += [line for line in lines if isinstance(line, dict)]
        self._offset += len(whole)
        return self._lines

    def _add(self, line: Mapping[str, Any]) -> None:
        self._read()
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(line, default=str).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path} must be writable, got: {error.strerror or error}") from error
