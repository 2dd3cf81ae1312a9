"""One process at a queue: what it claims, that it is alive, and what others leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from ...errors import OutputError
from ..whole import write_whole
from .folder import SUFFIX, TOLD, JobFolder

LEASE_SECONDS = 60.0
BEATS_PER_LEASE = 4
ATTEMPTS = 3
DEATHS = 10
_DIED = "its worker died"


@dataclass(frozen=True)
class Claim:
    """A job that a worker holds.

    Attributes:
        name: of the job, without suffix.
        path: of its file, as long as the claim is held.
    """

    name: str
    path: Path

    @property
    def held(self) -> bool:
        """Whether it still is: another may have taken it back after the heartbeat stood still."""
        return self.path.exists()


@dataclass(frozen=True)
class _Pulse:
    """A heartbeat of another worker, and when this process first saw it, by its own clock."""

    beat: Any
    since: float


class Worker:
    """Claims jobs, one rename each. Use ``with``: what it holds at the end is given back.

    Args:
        queue: the folder.
        lease_seconds: its claims are taken back by workers of other machines when its heartbeat, which comes four
            times as often, has stood still for so long; clocks of machines are not compared.
        clock: seconds that never go back.

    Attributes:
        name: host, process and a random part: of one worker, and of no other ever.
    """

    def __init__(
        self,
        queue: JobFolder,
        lease_seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.queue = queue
        self._clock = clock
        self.name = f"{_word(socket.gethostname())}-{os.getpid()}-{secrets.token_hex(4)}"
        self._lease = lease_seconds
        self._folder = queue.claimed / self.name
        self._lock = FileLock(queue.workers / f"{self.name}.lock")
        self._locked = False
        self._pulses: dict[str, _Pulse] = {}
        self._beats = 0
        self._stop = threading.Event()
        self._silent: OSError | OutputError | None = None
        self._thread = threading.Thread(target=self._live, name="qengine-heartbeat", daemon=True)

    def __enter__(self) -> Worker:
        # On a file system without locks the heartbeat alone says who is alive.
        with contextlib.suppress(NotImplementedError, OSError, Timeout):
            self._lock.acquire(timeout=0)
            # filelock itself may stand in a file that a kill leaves behind.
            self._locked = not isinstance(self._lock, SoftFileLock)
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._return(self.name)
        with contextlib.suppress(OSError):
            self._pulse_file(self.name).unlink(missing_ok=True)
        if self._locked:
            self._lock.release()
            with contextlib.suppress(OSError):
                Path(self._lock.lock_file).unlink(missing_ok=True)

    def claim(self, passed: Container[str] = ()) -> Claim | None:
        """The first job that waits, now held by this worker; None where none does.

        Jobs that failed, or whose worker died, come after all others, so that none of them keeps a queue from moving.

        Args:
            passed: names of jobs that are left to others.

        Raises:
            OutputError: the queue cannot be written, so that nobody would know that this worker is alive.
        """
        if self._silent is not None:
            raise OutputError(f"the queue must stay writable, got: {self._silent}")
        self.recover()
        self._folder.mkdir(parents=True, exist_ok=True)
        tried = self.queue.tried()
        for name in sorted(self.queue.waiting(), key=lambda each: (each in tried, each)):
            if name in passed:
                continue
            path = self._folder / (name + SUFFIX)
            try:
                os.rename(self.queue.pending / path.name, path)
            except FileNotFoundError:
                continue
            except PermissionError:
                # Windows says so where another process is renaming the same file.
                continue
            return Claim(name, path)
        return None

    def give_back(self, claim: Claim) -> bool:
        """Let another do the job; False where it was no longer held."""
        return _move(claim.path, self.queue.pending)

    def finish(self, claim: Claim) -> bool:
        """The results are written; False where the job was no longer held."""
        moved = _move(claim.path, self.queue.done)
        if moved:
            with contextlib.suppress(OSError):
                self._reasons(claim.name).unlink(missing_ok=True)
        return moved

    def fail(self, claim: Claim, reason: str, *, final: bool) -> bool:
        """Write down why a job failed, and give it back, or give it up.

        Args:
            claim: what failed.
            reason: in words.
            final: trying again would not help.

        Returns:
            Whether it was given up: final, or the third time.

        Raises:
            OutputError: the reason cannot be written; the claim is kept.
        """
        if not claim.held:
            return False
        lines = self._write_down(claim.name, reason)
        final = final or sum(not line.endswith(_DIED) for line in lines) >= ATTEMPTS
        _move(claim.path, self.queue.failed if final else self.queue.pending)
        return final

    def recover(self) -> list[str]:
        """Put back what dead workers held; returns the names of the jobs.

        A job whose workers died ten times is given up: it may be what they die of.
        """
        back = []
        for folder in sorted(self.queue.claimed.glob("*")):
            if folder.name == self.name or folder.name.startswith("."):
                continue
            pulse = self._pulse_file(folder.name)
            if self._is_dead(pulse):
                back += self._return(folder.name, died=True)
                for left in (pulse, pulse.with_suffix(".lock")):
                    left.unlink(missing_ok=True)
            elif self._is_silent(pulse):
                # One that only slept goes on under its name, so its files in workers/ stay.
                back += self._return(folder.name, died=True)
        return back

    def others(self) -> int:
        """Jobs that other workers are at."""
        return sum(worker != self.name for worker, _ in self.queue.taken())

    def _is_dead(self, pulse: Path) -> bool:
        """A worker of this machine whose lock the system has let go of."""
        if _read(pulse).get("host") != _host():
            return False
        lock = FileLock(pulse.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError, NotImplementedError):
            return False
        lock.release()
        return True

    def _is_silent(self, pulse: Path) -> bool:
        """A worker of another machine whose heartbeat has stood still for the longer of its lease and ours."""
        said = _read(pulse)
        if said.get("host") == _host():
            return False
        known = self._pulses.get(pulse.stem)
        if known is None or known.beat != said.get("beat"):
            self._pulses[pulse.stem] = _Pulse(said.get("beat"), self._clock())
            return False
        lease = said.get("lease")
        wait = max(self._lease, lease) if isinstance(lease, int | float) else self._lease
        return self._clock() - known.since > wait

    def _return(self, other: str, *, died: bool = False) -> list[str]:
        folder, back = self.queue.claimed / other, []
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            lines = self._write_down(path.stem, _DIED) if died else []
            hopeless = sum(line.endswith(_DIED) for line in lines) >= DEATHS
            if _move(path, self.queue.failed if hopeless else self.queue.pending):
                back.append(path.stem)
        with contextlib.suppress(OSError):
            folder.rmdir()
        return back

    def _write_down(self, name: str, reason: str) -> list[str]:
        """Add to what is told of a job; returns all lines."""
        path = self._reasons(name)
        told = path.read_text("utf-8").splitlines() if path.is_file() else []
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        lines = [*told, " ".join(f"{when} {self.name}: {reason}".split())]
        write_whole(path, lambda temporary: _write(temporary, "".join(f"{line}\n" for line in lines)))
        return lines

    def _live(self) -> None:
        while not self._stop.wait(self._lease / BEATS_PER_LEASE):
            try:
                self._beat()
            except (OSError, OutputError) as error:
                self._silent = error
                return

    def _beat(self) -> None:
        self._beats += 1
        pulse = {"host": _host() if self._locked else None, "lease": self._lease, "beat": f"{self.name} {self._beats}"}
        write_whole(self._pulse_file(self.name), lambda temporary: _write(temporary, json.dumps(pulse)))

    def _pulse_file(self, worker: str) -> Path:
        return self.queue.workers / f"{worker}.json"

    def _reasons(self, name: str) -> Path:
        return self.queue.failed / (name + TOLD)


def _move(path: Path, folder: Path) -> bool:
    try:
        os.rename(path, folder / path.name)
    except FileNotFoundError:
        return False
    return True


def _write(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")


def _read(path: Path) -> dict[str, Any]:
    """What a worker says of itself; nothing where it is gone or being replaced."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _host() -> str:
    """Of this machine: name and network address, since copied machines share their names."""
    return f"{_word(socket.gethostname())}-{uuid.getnode():012x}"


def _word(text: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in text)[:40]
