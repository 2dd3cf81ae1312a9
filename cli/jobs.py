"""Files of jobs: a folder of pictures, JSON lines, or prompts with options; each job becomes a command line.

Every job is words for ``edit`` or ``generate``, so a job can say whatever a command line can, by the same names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click import ClickException
from click.core import ParameterSource

from ..errors import InputError, QEngineError, RequestError
from .command import Command
from .expand import looks_like_picture
from .options import Flag

MAX_FILE_BYTES = 64 << 20
MAX_JOBS = 100_000

PROMPT_OPTIONS: Mapping[str, str] = {
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "steps",
    "g": "true-cfg-scale",
    "l": "true-cfg-scale",
    "fs": "flow-shift",
    "n": "negative-prompt",
    "ci": "ref",
    "m": "mask",
    "rcm-th": "rcm-threshold",
    "rcm-rel-th": "rcm-relative-threshold",
    "rcm-ks": "rcm-kernel-size",
    "rcm-ds": "rcm-dilate-size",
}
"""Short names behind a prompt in a text file, as musubi-tuner's lines spell them; long names are taken too."""

JSON_NAMES = {"image": "ref", "images": "ref", "reference": "ref", "control-image-path": "ref"}

_OPTION = re.compile(r"\s--(?=[A-Za-z])")


@dataclass(frozen=True)
class Job:
    """One job as it is written.

    Attributes:
        number: 1 for the first.
        where: file and line, for messages.
        words: of the command line that it stands for; empty where ``error`` is set.
        output: name of the result that the job asks for, or None.
        error: why it cannot be read, or None.
    """

    number: int
    where: str
    words: tuple[str, ...] = ()
    output: str | None = None
    error: QEngineError | None = None


def read_jobs(path: Path, flags: Mapping[str, Flag]) -> list[Job]:
    """The jobs of a folder or a file; a line that cannot be read is a job with an error.

    Args:
        path: a folder of pictures, ``.jsonl``, or text of one prompt per line.
        flags: of the command, by spelling.

    Raises:
        InputError: nothing there, not text, too large, or no job in it.
    """
    if path.is_dir():
        jobs = list(_folder_jobs(path))
        what = "a folder with pictures in it"
    else:
        jobs = list(lines_of(_text(path), path.name, flags, as_json=path.suffix.lower() == ".jsonl"))
        what = "a file with a job in each line"
    if not jobs:
        raise InputError(f"{path} must be {what}, got none", hint="qengine batch --help")
    if len(jobs) > MAX_JOBS:
        raise InputError(f"{path} must hold at most {MAX_JOBS} jobs, got {len(jobs)}", hint="split it")
    return jobs


def lines_of(text: str, name: str, flags: Mapping[str, Flag], *, as_json: bool) -> Iterator[Job]:
    """The jobs of a text: empty lines and lines that begin with # are none."""
    number = 0
    for at, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        number += 1
        yield read_line(line, number, f"{name}:{at}", flags, as_json=as_json)


def read_line(line: str, number: int, where: str, flags: Mapping[str, Flag], *, as_json: bool) -> Job:
    """One line as a job."""
    try:
        words, output = _json_words(line, flags) if as_json else (prompt_words(line, flags), None)
    except QEngineError as error:
        return Job(number, where, error=error)
    return Job(number, where, tuple(words), output)


def _folder_jobs(folder: Path) -> Iterator[Job]:
    try:
        pictures = sorted(path for path in folder.iterdir() if path.is_file() and looks_like_picture(path.name))
    except OSError as error:
        raise InputError(f"{folder} must be readable, got: {error.strerror or error}") from error
    for number, path in enumerate(pictures, 1):
        yield Job(number, str(path), ("--ref", str(path)))


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path} must be at most {MAX_FILE_BYTES} bytes, got {path.stat().st_size}")
        return path.read_text("utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path} must be a folder or a file of jobs, got no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} must be readable as UTF-8 text, got: {error}") from error


def prompt_words(line: str, flags: Mapping[str, Flag]) -> list[str]:
    """``a red car --w 512 --h 768 --d 42 --ci a.png`` as the words of a command line.

    Raises:
        RequestError: an option that is unknown or lacks its value, or a width without a height.
    """
    prompt, *options = _OPTION.split(" " + line.strip())
    words = [f"--prompt={prompt.strip()}"] if prompt.strip() else []
    size: dict[str, str] = {}
    for option in options:
        name, _, value = option.strip().partition(" ")
        name = name.replace("_", "-")
        name, value = PROMPT_OPTIONS.get(name, name), value.strip()
        if name in ("width", "height"):
            size[name] = value
        else:
            words += _flag_words(name, value or None, flags)
    if size:
        if len(size) < 2:
            raise RequestError(f"--w and --h must be given together, got {' '.join(size)} alone")
        words.append(f"--size={size['width']}x{size['height']}")
    return words


def _json_words(line: str, flags: Mapping[str, Flag]) -> tuple[list[str], str | None]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"a job must be a JSON object, got: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(f"a job must be a JSON object, got {type(fields).__name__}")
    output = fields.pop("output", None)
    if output is not None and not isinstance(output, str):
        raise RequestError(f"output must be a file name, got {output!r}")
    words: list[str] = []
    for key, value in fields.items():
        name = str(key).replace("_", "-")
        words += _json_field(JSON_NAMES.get(name, name), value, flags)
    return words, output


def _json_field(name: str, value: Any, flags: Mapping[str, Flag]) -> list[str]:
    if value is None or value is False:
        _flag(name, flags)
        return []
    if name == "size" and isinstance(value, list) and len(value) == 2:
        value = f"{value[0]}x{value[1]}"
    values = value if isinstance(value, list) else [value]
    if any(isinstance(each, dict | list) for each in values):
        raise RequestError(f"{name} must be a number, a text or a list of them, got {value!r}")
    if not _flag(name, flags).many and len(values) > 1:
        values = [",".join(map(str, values))]
    return [word for each in values for word in _flag_words(name, None if each is True else str(each), flags)]


def _flag_words(name: str, value: str | None, flags: Mapping[str, Flag]) -> list[str]:
    flag = _flag(name, flags)
    if flag.takes_value and value is None:
        raise RequestError(f"--{name} must have a value, got none")
    if not flag.takes_value and value is not None:
        raise RequestError(f"--{name} must stand alone, got {value!r}")
    return [flag.name] if value is None else [f"{flag.name}={value}"]


def _flag(name: str, flags: Mapping[str, Flag]) -> Flag:
    flag = flags.get(f"--{name}")
    if flag is None:
        from difflib import get_close_matches

        near = get_close_matches(name, [spelling.lstrip("-") for spelling in flags], n=1)
        raise RequestError(
            f"a job's options must be those that its command's --help lists, got {name!r}",
            hint=f"did you mean {near[0]}?" if near else None,
        )
    return flag


def spoken(command: Command, job: Job, shared: Collection[str], *, hint: str) -> dict[str, Any]:
    """What a job says itself, by the keys of the flags.

    Args:
        command: that knows the flags.
        job: as it was written.
        shared: keys that are for the command line to say.
        hint: why they are.

    Raises:
        QEngineError: the line could not be read, a word is wrong, or is for the command line to say.
    """
    if job.error is not None:
        raise job.error
    try:
        context = command.make_context("job", list(job.words))
    except ClickException as error:
        raise RequestError(error.format_message()) from error
    given = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    wrong = sorted(given.keys() & set(shared))
    if wrong:
        raise RequestError(f"a job must leave {', '.join(wrong)} to the command line, got its own", hint=hint)
    return given
