"""One line of a file of jobs for ``extract``: what it asks, over what the command line says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ..engine.queue import SUFFIX
from ..errors import RequestError
from . import backend
from .command import Command
from .expand import looks_like_picture
from .extract import SECTIONS, Wanted, wanted_of
from .jobs import Job, spoken
from .options import REQUEST
from .order import SINGLE_FILES, check_files, seeds_of

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


def job_command() -> Command:
    """What parses a job's words: the options of extract, and how many pictures are to be rendered."""
    return Command("job", lambda **_: 0, {**SECTIONS, "Pictures": [flag for flag in REQUEST if flag.key == "count"]})


def parse(command: Command, job: Job, folder: Path, shared: Values) -> Task:
    """A job as a task, named as it wishes.

    Args:
        command: see :func:`job_command`.
        job: as it was written.
        folder: that its paths are against.
        shared: values of the command line, which hold where the job says nothing.

    Raises:
        RequestError: a word is wrong, or is for the command line to say.
        InputError: a picture cannot be used.
    """
    given = spoken(command, job, SHARED, hint="one extract reads with one model and encodes with one")
    values = {**shared, **given, "jobs": None, "resume": False, "output": None}
    for name in PATHS:
        values[name] = _against(folder, values.get(name))
    if not values["ref"] and any(values[name] for name in ("model", *SINGLE_FILES)):
        # nothing to read: only its prompt is encoded
        values["vl_model"] = None
    wanted = wanted_of((), values)
    seeds_of(values.get("seed"), values.get("count"))
    pictures = [*wanted.pictures, *([Path(values["init_image"])] if values.get("init_image") else [])]
    check_files(pictures)
    for path in pictures:
        backend.check_picture(path)
    return Task(job, _stem(job, pictures), _identity(values, pictures), values, wanted)


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
