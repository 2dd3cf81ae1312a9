"""``qengine batch``: many jobs with one engine; a bad one does not stop the others, and a stopped batch goes on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from ..errors import BatchError, Cancelled, OutputError, QEngineError, RequestError
from . import backend
from .command import Command
from .jobs import Job, read_jobs, read_line, spoken
from .manifest import Manifest, clear_parts, identity, locked
from .meter import PackMeter
from .options import EDIT_SECTIONS, JOB_SECTIONS
from .order import Order, check_files, edit_order, generate_order, read_by
from .outputs import LATENTS, PICTURE, Target, check_preview_folder, check_targets
from .progress import Talk
from .run import Item, open_engine, run_one
from .words import seconds_text

SHARED = frozenset(
    flag.key for title in ("Model", "Device", "Memory", "Kernels", "Words") for flag in EDIT_SECTIONS[title]
) | {"output", "save_path"}
"""What the engine, the words and the folder of the results are told: the same for all jobs of a batch."""


@dataclass(frozen=True)
class Task:
    """One result to make.

    Attributes:
        job: as it was written.
        order: what is to be done, with one seed.
        target: where it goes.
    """

    job: Job
    order: Order
    target: Target


def carry_out(words: Sequence[str], values: Mapping[str, Any], talk: Talk) -> int:
    """Do the jobs of a folder, a file or, for ``-``, of stdin; returns the exit code.

    Raises:
        RequestError: not one source of jobs, or results of an earlier batch where these would go.
        InputError: the source holds no job.
        OutputError: the folder of the results cannot be written.
        BatchError: some jobs failed.
    """
    if len(words) != 1:
        raise RequestError(
            f"batch must get one folder or file of jobs, got {len(words)}",
            hint='qengine batch photos/ -p "make it gray"',
        )
    command = Command("job", lambda **_: 0, JOB_SECTIONS)
    interactive = words[0] == "-"
    jobs = _typed(command) if interactive else read_jobs(Path(words[0]), command.flags)
    folder = _folder(words[0], values)
    manifest = Manifest(folder, resume=values["resume"] or interactive)
    batch = Batch(command, values, folder, manifest, talk)
    start = time.perf_counter()
    with locked(folder):
        clear_parts(folder)
        results = batch.run(jobs, len(manifest.lines) if interactive else 0)
    talk.say(summary(results, time.perf_counter() - start))
    if values["json"]:
        print(json.dumps({"outputs": results}, indent=2, default=str))
    failed = sum(result["state"] == "failed" for result in results)
    if failed and not interactive:
        raise BatchError(
            f"all {len(results)} jobs must succeed, got {failed} that failed",
            hint=f"{manifest.path} says why; the same command with --resume tries them again",
        )
    return 0


class Batch:
    """The jobs of one command line.

    Args:
        command: parses a job's words.
        values: the command line's own values, which hold for every job that does not say otherwise.
        folder: of the results.
        manifest: what is done already.
        talk: words on stderr.
    """

    def __init__(
        self, command: Command, values: Mapping[str, Any], folder: Path, manifest: Manifest, talk: Talk
    ) -> None:
        self._command, self._values, self._folder = command, values, folder
        self._manifest, self._talk = manifest, talk
        self._stems: set[str] = set()
        self._packing = PackMeter(talk)

    def run(self, jobs: Iterable[Job], first: int) -> list[dict[str, Any]]:
        """Do the jobs; returns a line per result."""
        results: list[dict[str, Any]] = []
        engine: Any = None
        try:
            waiting = list(self._tasks(jobs, first)) if isinstance(jobs, list) else self._tasks(jobs, first)
            todo = [task for task in waiting if isinstance(task, Task)] if isinstance(waiting, list) else []
            if todo:
                engine = open_engine(todo[0].order, self._talk, self._packing)
                self._encode_all(engine, todo)
            for task in waiting:
                if isinstance(task, Task):
                    engine = engine or open_engine(task.order, self._talk, self._packing)
                    task = self._do(engine, task)
                results.append(task)
            return results
        except KeyboardInterrupt:
            if engine is not None:
                engine.cancel()
            raise
        finally:
            if engine is not None:
                engine.close()
            self._talk.display.close()

    def _tasks(self, jobs: Iterable[Job], first: int) -> Iterator[Task | dict[str, Any]]:
        """What is to be done, and lines of what is done already or cannot be."""
        for job in jobs:
            try:
                order = self._order(job)
                for seed in order.seeds:
                    yield self._task(
                        replace(job, number=job.number + first), replace(order, seeds=(seed,)), len(order.seeds)
                    )
            except QEngineError as error:
                yield self._failed(job, error)

    def _task(self, job: Job, order: Order, count: int) -> Task | dict[str, Any]:
        target = self._target(job, order, count)
        key = identity(order, order.seeds[0])
        check_targets(target.paths, read_by(order), new=job.output is None and not self._manifest.began(target.paths))
        if self._manifest.done(key, target.paths):
            self._talk.say(f"{'kept':<8} {target.paths[0]}")
            return {"job": key, "state": "done", "where": job.where, "files": [str(path) for path in target.paths]}
        return Task(job, order, target)

    def _order(self, job: Job) -> Order:
        """The order of a job: its own words over those of the command line."""
        given = spoken(self._command, job, SHARED, hint="one batch runs on one engine")
        merged = {**self._values, **given, "output": None, "save_path": None}
        order = edit_order([], merged) if merged["ref"] else generate_order([], merged)
        if order.stages or order.then:
            raise RequestError("a job must be one edit, got --stage or --then", hint="qengine edit takes them")
        check_files(order.pictures)
        for path in order.pictures:
            backend.check_picture(path)
        backend.make_request(order.kind, order.request, order.images, order.seeds[0])
        return order

    def _target(self, job: Job, order: Order, count: int) -> Target:
        stem = f"{order.images[0].stem}_edited" if order.images else f"job{job.number:04d}"
        suffix = PICTURE
        if job.output is not None:
            name = PurePath(job.output)
            if name.is_absolute() or ".." in name.parts or not name.name:
                raise RequestError(
                    f"a job's output must be a name inside the folder of the results, got {job.output!r}"
                )
            stem, suffix = str(name.with_suffix("")), name.suffix or PICTURE
        stem = stem if count == 1 else f"{stem}_{order.seeds[0]}"
        free = next(each for each in _numbered(stem) if each not in self._stems)
        self._stems.add(free)
        kind = order.wish.kind
        return Target(
            picture=self._folder / (free + suffix) if kind != "latents" else None,
            latents=self._folder / (free + LATENTS) if kind != "images" else None,
        )

    def _encode_all(self, engine: Any, tasks: list[Task]) -> None:
        """Encode every prompt first, so that the encoder is loaded once; what fails here is told by its own run."""
        for task in tasks:
            try:
                engine.encode(self._request(task))
            except Cancelled:
                raise
            except QEngineError:
                continue

    def _request(self, task: Task) -> Any:
        order = task.order
        return backend.make_request(order.kind, order.request, order.images, order.seeds[0])

    def _do(self, engine: Any, task: Task) -> dict[str, Any]:
        start = time.perf_counter()
        key = identity(task.order, task.order.seeds[0])
        files = [str(path) for path in task.target.paths]
        self._manifest.add({"job": key, "state": "begun", "where": task.job.where, "files": files})
        try:
            for path in task.target.paths:
                path.parent.mkdir(parents=True, exist_ok=True)
            made = run_one(engine, task.order, Item(self._request(task), task.target), self._talk, self._packing)
        except Cancelled:
            raise
        except QEngineError as error:
            return self._failed(task.job, error, key)
        line = {
            "job": key,
            "state": "done",
            "where": task.job.where,
            "files": files,
            "seed": made["seed"],
            "seconds": round(time.perf_counter() - start, 3),
        }
        self._manifest.add(line)
        return line

    def _failed(self, job: Job, error: QEngineError, key: str | None = None) -> dict[str, Any]:
        self._talk.display.close()
        self._talk.warn(f"{job.where}: {error.message}" + (f" ({error.hint})" if error.hint else ""))
        line = {"job": key, "state": "failed", "where": job.where, "error": error.message, "hint": error.hint}
        self._manifest.add(line)
        return line


def _folder(source: str, values: Mapping[str, Any]) -> Path:
    """The folder of the results, made where it is missing."""
    named = values["output"] or values["save_path"]
    folder = Path(named) if named else Path(f"{Path(source).stem if source != '-' else 'batch'}_out")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"the results of a batch must go into a folder, got the file {folder}", hint="-o FOLDER")
    check_preview_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    number = 2
    while True:
        yield f"{stem}-{number}"
        number += 1


def _typed(command: Command) -> Iterator[Job]:
    """Jobs as they are typed or piped in, one per line."""
    at_terminal = sys.stdin.isatty()
    number = 0
    while True:
        if at_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip() and not line.lstrip().startswith("#"):
            number += 1
            yield read_line(line, number, f"line {number}", command.flags, as_json=line.lstrip().startswith("{"))


def summary(results: Sequence[Mapping[str, Any]], seconds: float) -> str:
    """One line for people."""
    done = sum(result["state"] == "done" for result in results)
    return f"{done} of {len(results)} done  {seconds_text(seconds)}"
