"""Fills a queue: reads every job's pictures with one model, then encodes every job's prompt with another."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.queue import SUFFIX, JobFolder, Ledger
from ..errors import BatchError, Cancelled, CheckpointError, DeviceError, OutputError, QEngineError, RequestError
from . import backend
from .command import Command
from .jobs import Job, read_jobs
from .memory import memory_choice
from .meter import PackMeter
from .order import device_choice, model_choice
from .progress import Talk
from .tasks import Task, job_command, parse
from .words import seconds_text

if TYPE_CHECKING:
    from ..engine.qx import JobFile

READING = "reading"
"""Folder inside the queue where read pictures wait for their prompts to be encoded."""
STOPPING = (Cancelled, OutputError, CheckpointError, DeviceError)
"""What the next job would meet too."""

Values = Mapping[str, Any]


def fill(words: Sequence[str], values: Values, talk: Talk) -> int:
    """Extract the jobs of a file into a queue; returns the exit code.

    Raises:
        RequestError: more than one folder of pictures, or the queue holds jobs and is not to be gone on with.
        InputError: the file holds no job.
        OutputError: the queue cannot be written.
        BatchError: some jobs failed.
    """
    source = Path(values["jobs"])
    if len(words) > 1 or (words and not Path(words[0]).is_dir()):
        raise RequestError(
            f"--jobs must stand beside at most one folder of pictures, got {' '.join(words)}",
            hint="qengine extract IN/ --jobs jobs.jsonl -o queue/",
        )
    if values["report"] is not None:
        raise RequestError("--report must stand beside one job, got --jobs")
    if source.is_dir():
        raise RequestError(f"--jobs must be a file with a job in each line, got the folder {source}")
    if "://" in (values["output"] or ""):
        raise RequestError(f"a queue must be a folder that renames, got {values['output']}", hint="-o FOLDER")
    command = job_command()
    jobs = read_jobs(source, command.flags)
    queue = JobFolder.make(Path(values["output"] or f"{source.stem}_queue"))
    start = time.perf_counter()
    with _locked(queue.root):
        filler = Filler(queue, values, talk)
        tasks = list(filler.tasks(command, jobs, Path(words[0]) if words else source.parent))
        try:
            filler.run(tasks)
        finally:
            talk.display.close()
    talk.say(f"{filler.summary()}  {seconds_text(time.perf_counter() - start)}")
    if values["json"]:
        print(json.dumps({"jobs": filler.results}, indent=2))
    failed = sum(result["state"] == "failed" for result in filler.results)
    if failed:
        raise BatchError(
            f"all {len(filler.results)} jobs must succeed, got {failed} that failed",
            hint="mend their lines; the same command with --resume does what is missing",
        )
    return 0


class Filler:
    """The jobs of one command line.

    Args:
        queue: where the files go.
        values: of the command line, which hold for every job that does not say otherwise.
        talk: words on stderr.

    Attributes:
        results: a line per job.

    Raises:
        RequestError: the queue holds jobs, and is not to be gone on with.
    """

    def __init__(self, queue: JobFolder, values: Values, talk: Talk) -> None:
        self.results: list[dict[str, Any]] = []
        self._queue, self._values, self._talk = queue, values, talk
        self._ledger = Ledger(queue.root)
        lines = self._ledger.lines()
        if lines and not values["resume"]:
            raise RequestError(
                f"the jobs must go into a queue of their own, got {queue.root} with jobs of an earlier extract",
                hint="--resume goes on with it; -o names another folder",
            )
        self._names = {line["job"]: line["name"] for line in lines if line.get("job") and line.get("name")}

    def tasks(self, command: Command, jobs: Sequence[Job], folder: Path) -> Iterator[Task]:
        """What is to be made; what is there already is told, and what cannot be is a failure of its own.

        Args:
            command: parses a job's words.
            jobs: as written.
            folder: that paths in the jobs are against.
        """
        seen: set[str] = set()
        for job in jobs:
            try:
                task = self._task(command, job, folder)
            except QEngineError as error:
                self._failed(job, None, error)
                continue
            if task.name in seen:
                self._talk.warn(f"{job.where} asks for the same as a line before it, {task.name}")
                self._result(task, "kept")
                continue
            seen.add(task.name)
            if self._queue.holds(task.name):
                self._talk.say(f"{'kept':<8} {task.name}")
                self._result(task, "kept")
            else:
                yield task

    def run(self, tasks: Sequence[Task]) -> None:
        """Read, then encode; each model is loaded once, and the first is freed before the second is loaded."""
        reading = [task for task in tasks if task.wanted.reads]
        done = self._read(reading) if reading else set()
        encoding = [task for task in tasks if task.wanted.model and (not task.wanted.reads or task.name in done)]
        if encoding:
            self._encode(encoding)
        with contextlib.suppress(OSError):
            (self._queue.root / READING).rmdir()

    def summary(self) -> str:
        """What was done, in words."""
        states = [result["state"] for result in self.results]
        counts = [f"{states.count(state)} {state}" for state in ("made", "kept", "failed") if state in states]
        return f"{', '.join(counts)}  {self._queue.root}: {self._queue.counts()['pending']} jobs wait"

    def _task(self, command: Command, job: Job, folder: Path) -> Task:
        asked = parse(command, job, folder, self._values)
        name = self._names.get(asked.key) or self._free(asked.name)
        self._names[asked.key] = name
        return replace(asked, name=name)

    def _free(self, stem: str) -> str:
        taken = set(self._names.values())
        number, name = 1, stem
        while name in taken or self._queue.holds(name):
            number += 1
            name = f"{stem}-{number}"
        return name

    def _read(self, tasks: Sequence[Task]) -> set[str]:
        from . import extraction
        from .blend import open_extractor

        done: set[str] = set()

        def read(task: Task) -> None:
            _, _, layers = extraction.settings(task.values)
            job = extraction.read_with(extractor, task.wanted, task.values, layers)
            self._keep(task, job)
            done.add(task.name)

        extractor = open_extractor(self._values)
        try:
            self._each("read", tasks, read, f"{extractor.source.folder.name} ({extractor.source.variant})")
        finally:
            extractor.unload()
        return done

    def _keep(self, task: Task, job: JobFile) -> None:
        """Write what was read: the whole job, or the half that waits for its prompt."""
        from ..engine.qx import write_job

        if task.wanted.model:
            write_job(self._half(task), job)
        else:
            self._write(task, job)

    def _encode(self, tasks: Sequence[Task]) -> None:
        from ..engine.qx import read_job
        from ..engine.qx.make import encoded
        from . import extraction

        packing = PackMeter(self._talk)
        choice = {
            **model_choice(self._values),
            **device_choice(self._values),
            **memory_choice(self._values),
        }
        with backend.cancelling(backend.open_engine(packing, **choice)) as engine:
            packing.phase = "encode"

            def encode(task: Task) -> None:
                job = encoded(engine, extraction.request_of(task.wanted, task.values))
                if task.wanted.reads:
                    read = read_job(self._half(task))
                    job = replace(job, raw=read.raw, extractor=read.extractor)
                self._write(task, job)
                self._half(task).unlink(missing_ok=True)

            self._each("encode", tasks, encode, f"{engine.source.label} ({engine.source.variant})")

    def _each(self, phase: str, tasks: Sequence[Task], work: Callable[[Task], None], model: str) -> None:
        self._talk.display.start(phase, len(tasks))
        start = time.perf_counter()
        for number, task in enumerate(tasks, 1):
            try:
                work(task)
            except STOPPING:
                raise
            except QEngineError as error:
                self._failed(task.job, task.key, error)
                self._talk.display.start(phase, len(tasks))
                continue
            self._talk.display.step(number, task.name)
        self._talk.display.end(f"{len(tasks)} jobs by {model}  {seconds_text(time.perf_counter() - start)}")

    def _write(self, task: Task, job: JobFile) -> None:
        from ..engine.qx import write_job
        from . import extraction

        knobs, blend, _ = extraction.settings(task.values)
        render = extraction.render_of(task.values, job)
        if task.values.get("count") is not None:
            render["count"] = task.values["count"]
        path = self._queue.pending / (task.name + SUFFIX)
        whole = replace(job, prompt=task.wanted.prompt, knobs=knobs, blend=blend, render=render)
        self._ledger.add({"job": task.key, "state": "begun", "name": task.name, "where": task.job.where})
        write_job(path, whole)
        self._ledger.add({"job": task.key, "state": "done", "name": task.name, "where": task.job.where})
        if not self._values["json"]:
            print(path, flush=True)
        self._result(task, "made")

    def _half(self, task: Task) -> Path:
        return self._queue.root / READING / (task.name + SUFFIX)

    def _result(self, task: Task, state: str) -> None:
        self.results.append({"job": task.key, "state": state, "name": task.name, "where": task.job.where})

    def _failed(self, job: Job, key: str | None, error: QEngineError) -> None:
        self._talk.display.close()
        self._talk.warn(f"{job.where}: {error.message}" + (f" ({error.hint})" if error.hint else ""))
        line = {"job": key, "state": "failed", "where": job.where, "error": error.message, "hint": error.hint}
        self._ledger.add(line)
        self.results.append(line)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second extract out of the queue; renderers may work on it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".extract.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RequestError(
            f"one extract at a time must write into {folder}, got a second", hint="wait for it, or -o another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
