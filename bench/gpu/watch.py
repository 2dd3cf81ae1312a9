"""The watchdog: every stage runs in processes of its own, and what hangs or dies becomes a line of the results."""

from __future__ import annotations

import json
import math
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

EXIT_SECONDS = 20.0
REASON_CHARACTERS = 400

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Stage:
    """Cases that one kind of child runs.

    Attributes:
        name: of the stage.
        command: starts the child; names of cases are added to it.
        cases: in order.
        limit_seconds: most that one case may take, the start of the child included.
        share_seconds: most that all cases may take together, so that something is left for other stages.
    """

    name: str
    command: tuple[str, ...]
    cases: tuple[str, ...]
    limit_seconds: float
    share_seconds: float = math.inf


def watch(stage: Stage, deadline: float, emit: Emit) -> None:
    """Run all cases of a stage; returns soon after the deadline at the latest.

    A case that fails or hangs costs its process; a fresh one goes on with the cases after it.

    Args:
        stage: what to run.
        deadline: moment of ``time.monotonic`` at which the run must end.
        emit: gets every line: what the children measured with status ``ok``, and one line with status ``failed``,
            ``killed`` or ``skipped`` and a reason for each case that did not end.
    """
    waiting = list(stage.cases)
    deadline = min(deadline, time.monotonic() + stage.share_seconds)
    while waiting:
        if time.monotonic() >= deadline:
            for case in waiting:
                emit({"stage": stage.name, "case": case, "status": "skipped", "reason": "no time left"})
            return
        done, status, reason = _attend(stage, waiting, deadline, emit)
        del waiting[:done]
        if waiting:
            emit({"stage": stage.name, "case": waiting.pop(0), "status": status, "reason": reason})


def _attend(stage: Stage, waiting: Sequence[str], deadline: float, emit: Emit) -> tuple[int, str, str]:
    """One child: how many cases it ended, and what became of the next one."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([*stage.command, *waiting], stdout=subprocess.PIPE, stderr=errors, text=True)
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        hung = True
        done = 0
        try:
            done, hung = _collect(stage, lines, deadline, emit)
        finally:
            _end(process, reader, at_once=hung)
        if hung:
            short = time.monotonic() >= deadline
            return done, "killed", "no time left" if short else f"no end after {stage.limit_seconds:g} s"
        errors.seek(0)
        return done, "failed", _reason(errors.read(), process.returncode)


def _collect(stage: Stage, lines: queue.SimpleQueue[str | None], deadline: float, emit: Emit) -> tuple[int, bool]:
    """(Cases ended, whether the child was still running when time was up)."""
    done, until = 0, time.monotonic() + stage.limit_seconds
    while True:
        try:
            line = lines.get(timeout=max(0.0, min(until, deadline) - time.monotonic()))
        except queue.Empty:
            return done, True
        if line is None:
            return done, False
        found = _parse(line)
        if "end" in found:
            done, until = done + 1, time.monotonic() + stage.limit_seconds
        elif "case" in found:
            emit({"stage": stage.name, "status": "ok", **found})


def _read(stream: IO[str] | None, lines: queue.SimpleQueue[str | None]) -> None:
    if stream is not None:
        with stream:
            for line in stream:
                lines.put(line)
    lines.put(None)


def _parse(line: str) -> dict[str, Any]:
    """The line as an object; libraries may write other things on standard output."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _end(process: subprocess.Popen[str], reader: threading.Thread, *, at_once: bool) -> None:
    """Wait for a child that has closed its output; kill one that has not, or that does not end."""
    if not at_once:
        with suppress(subprocess.TimeoutExpired):
            process.wait(EXIT_SECONDS)
    if process.poll() is None:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(EXIT_SECONDS)
    reader.join(EXIT_SECONDS)


def _reason(errors: str, code: int | None) -> str:
    """The last thing that the child said, and how it ended."""
    said = [line.strip() for line in errors.splitlines() if line.strip()]
    return f"exit {code}: {said[-1] if said else 'it said nothing'}"[:REASON_CHARACTERS]
