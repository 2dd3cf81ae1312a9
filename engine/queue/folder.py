"""The folder itself: which job lies where."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ...errors import InputError, OutputError

SUFFIX = ".qx"
TOLD = ".txt"
STATES = ("pending", "claimed", "done", "failed")


class JobFolder:
    """Paths of a queue.

    Args:
        root: the folder.

    Attributes:
        root: as given.
        pending: jobs that wait.
        claimed: a folder per worker with the job it is at.
        done: jobs whose results are written.
        failed: jobs that were given up, and texts that say why, of jobs that are tried again too.
        workers: who is alive.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pending, self.claimed, self.done, self.failed = (root / state for state in STATES)
        self.workers = root / "workers"

    @classmethod
    def make(cls, root: Path) -> JobFolder:
        """A queue at a place where there may be none yet.

        Raises:
            OutputError: it cannot be made there.
        """
        queue = cls(root)
        try:
            for folder in (queue.pending, queue.claimed, queue.done, queue.failed, queue.workers):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"a queue must be a folder that can be written, got {root}: {error.strerror or error}"
            ) from error
        return queue

    @classmethod
    def open(cls, root: Path) -> JobFolder:
        """A queue that is there.

        Raises:
            InputError: nothing there, or no queue.
            OutputError: it cannot be written.
        """
        if not (root / "pending").is_dir():
            got = "another folder" if root.is_dir() else "a file" if root.exists() else "nothing there"
            raise InputError(
                f"{root} must be a queue, got {got}", hint="qengine extract IN/ --jobs jobs.jsonl -o QUEUE makes one"
            )
        return cls.make(root)

    def waiting(self) -> list[str]:
        """Names of the jobs that wait, without suffix, in their order."""
        return sorted(_jobs(self.pending))

    def tried(self) -> set[str]:
        """Names of jobs of which something is told: they failed, or their worker died."""
        return {name.removesuffix(TOLD) for name in _entries(self.failed) if name.endswith(TOLD)}

    def taken(self) -> Iterator[tuple[str, str]]:
        """(worker, job) of all claims."""
        for worker in sorted(_entries(self.claimed)):
            for name in sorted(_jobs(self.claimed / worker)):
                yield worker, name

    def holds(self, name: str) -> bool:
        """Whether a job of this name is in any state."""
        file = name + SUFFIX
        settled = any((folder / file).exists() for folder in (self.pending, self.done, self.failed))
        return settled or any(taken == name for _, taken in self.taken())

    def counts(self) -> dict[str, int]:
        """Jobs by state."""
        return {
            "pending": len(_jobs(self.pending)),
            "claimed": len(list(self.taken())),
            "done": len(_jobs(self.done)),
            "failed": len(_jobs(self.failed)),
        }


def _jobs(folder: Path) -> list[str]:
    return [name.removesuffix(SUFFIX) for name in _entries(folder) if name.endswith(SUFFIX)]


def _entries(folder: Path) -> list[str]:
    """Names in a folder, but for hidden ones; none where it has just been removed."""
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
