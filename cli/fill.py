"""Fills a queue: reads every job's pictures with one model, then encodes every job's prompt with another."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from click import ClickException
from click.core import ParameterSource

from ..engine.queue import SUFFIX, JobFolder, Ledger
from ..errors import BatchError, Cancelled, CheckpointError, DeviceError, OutputError, QEngineError, RequestError
from . import backend
from .command import Command
from .expand import looks_like_picture
from .extract import SECTIONS, Wanted, wanted_of
from .jobs import Job, read_jobs
from .memory import memory_choice
from .meter import PackMeter
from .options import REQUEST
from .order import check_files, device_choice, model_choice, seeds_of
from .progress import Talk
from .words import seconds_text

if TYPE_CHECKING:
    from ..engine.qx import JobFile

READING = "reading"
"""Folder inside the queue where read pictures wait for their prompts to be encoded."""
PATHS = ("ref", "init_image")
SHARED = frozenset(
    {
        flag.key
        for title in ("Model", "Device", "Memory", "Kernels", "Output", "Words", "Many")
        for flag in SECTIONS[title]
    }
    | {"vl_model", "vl_device", "vl_dtype", "vl_weights"}
) - {"output"}
"""What the models and the words are told: the same for all jobs."""
SPOKEN = frozenset(flag.key for title in ("Output", "Words", "Many") for flag in SECTIONS[title])
"""What changes no file."""
STOPPING = (Cancelled, OutputError, CheckpointError, DeviceError)
"""What the next job would meet too."""

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One file to make.

    Attributes:
        job: as it was written.
        name: of the file, without suffix.
        key: identity: everything that decides its content.
        values: of its flags, over those of the command line.
        wanted: what is read and encoded.
    """

    job: Job
    name: str
    key: str
    values: Values
    wanted: Wanted


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
    command = Command("job", lambda **_: 0, {**SECTIONS, "Pictures": _counted()})
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
        if job.error is not None:
            raise job.error
        values = {**self._values, **_given(command, job), "jobs": None, "resume": False, "output": None}
        for name in PATHS:
            values[name] = _against(folder, values.get(name))
        wanted = wanted_of((), values)
        seeds_of(values.get("seed"), values.get("count"))
        pictures = [*wanted.pictures, *([Path(values["init_image"])] if values.get("init_image") else [])]
        check_files(pictures)
        for path in pictures:
            backend.check_picture(path)
        key = _identity(values, pictures)
        name = self._names.get(key) or self._free(_stem(job, pictures))
        self._names[key] = name
        return Task(job, name, key, values, wanted)

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
            self._each("read", tasks, read)
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

            self._each("encode", tasks, encode)

    def _each(self, phase: str, tasks: Sequence[Task], work: Callable[[Task], None]) -> None:
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
        self._talk.display.end(f"{len(tasks)} jobs  {seconds_text(time.perf_counter() - start)}")

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


def _counted() -> tuple[Any, ...]:
    return tuple(flag for flag in REQUEST if flag.key == "count")


def _given(command: Command, job: Job) -> dict[str, Any]:
    """What a job says itself.

    Raises:
        RequestError: a word is wrong, or is for the command line to say.
    """
    try:
        context = command.make_context("job", list(job.words))
    except ClickException as error:
        raise RequestError(error.format_message()) from error
    given = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    shared = sorted(SHARED & given.keys())
    if shared:
        raise RequestError(
            f"a job must leave {', '.join(shared)} to the command line, got its own",
            hint="one extract reads with one model and encodes with one",
        )
    return given


def _against(folder: Path, value: Any) -> Any:
    """A path, or several, as seen from a folder."""
    if isinstance(value, str):
        return str(folder / value)
    return tuple(str(folder / each) for each in value) if value else value


def _stem(job: Job, pictures: Sequence[Path]) -> str:
    """Name of a job's file: as it asks, else after its first picture, else its number.

    Raises:
        RequestError: it is no plain name.
    """
    if job.output is None:
        return pictures[0].stem if pictures else f"job{job.number:04d}"
    name = PurePath(job.output)
    if name.name != job.output or job.output.startswith("."):
        raise RequestError(f"a job's output must be a plain name, got {job.output!r}")
    return name.stem if name.suffix.lower() == SUFFIX or looks_like_picture(job.output) else job.output


def _identity(values: Values, pictures: Sequence[Path]) -> str:
    """SHA-256 over what is asked and the contents of the pictures, wherever they lie."""
    asked = {name: value for name, value in values.items() if name not in SPOKEN and name not in PATHS}
    content = [asked, len(values["ref"]), [hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures]]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


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
