"""``qengine extract``: read and encode here what is rendered elsewhere, into one ``.qx`` file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from . import dataset, queue
from .blend import BLEND, KNOBS, VL
from .expand import looks_like_picture
from .flag import Flag
from .options import DEVICE, KERNELS, MEMORY, MODEL, PACKED, REQUEST, TALK, TEMPLATE, VARIANT
from .order import SINGLE_FILES, check_files
from .outputs import check_picture_file, check_preview_folder, check_targets
from .progress import Talk
from .steer import prompt_of
from .words import bytes_text, seconds_text
from .zimage import START, refuse_in_edit

if TYPE_CHECKING:
    from ..engine.qx import JobFile

SUFFIX = ".qx"
MAX_NAME_TRIES = 10_000
HELP = (
    "Read pictures and encode prompts here; render elsewhere.\n\n"
    'qengine extract --image ref.png --text "a watercolour" --vl-model QWEN3VL -o job.qx\n\n'
    'qengine extract --image photo.png --prompt "make it night" --model qwen-image-edit-2511 -o job.qx\n\n'
    "The first reads hidden states of a picture for Z-Image; with --model and --prompt the prompt, and with "
    "--init-image that picture, are encoded too. The second encodes a whole edit. Nothing in the file depends on this "
    "machine; qengine generate --conditioning job.qx goes on from it, with any knobs. -o takes URLs (s3://, memory://) "
    "where fsspec is installed."
)
OUTPUT = (
    Flag(
        name="--output",
        short="-o",
        metavar="FILE",
        help="The .qx file to write, or a folder. A file you name is overwritten; one that qengine names never is.",
    ),
    Flag(
        name="--report",
        metavar="FILE",
        help="Draw what was read: every column's spread against the reference, and what the blend makes of it (.png).",
    ),
)
SECTIONS = {
    "Request": tuple(flag for flag in REQUEST if flag.key != "count") + TEMPLATE,
    "Starting": START,
    "Pictures as conditioning": VL + KNOBS,
    "Blend with the prompt": BLEND,
    "Many": queue.FLAGS + dataset.FLAGS,
    "Model": MODEL + VARIANT,
    "Device": DEVICE,
    "Memory": MEMORY + PACKED,
    "Kernels": KERNELS,
    "Output": OUTPUT,
    "Words": TALK,
}

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What one extraction is of.

    Attributes:
        pictures: to read, or to edit.
        prompt: of the run, or None.
        model: what renders is named, so that prompt and latents are encoded too.
        reads: a model that reads pictures is named.
    """

    pictures: tuple[Path, ...]
    prompt: str | None
    model: bool
    reads: bool


def carry_out(words: Sequence[str], values: Values, talk: Talk) -> int:
    """Extract one job, a file of jobs, or a dataset's caches; returns the exit code.

    Everything that can be wrong without a model is found before one is opened.
    """
    if values["jobs"] is not None:
        return queue.carry_out(words, values, talk)
    if values["dataset_config"] is not None or values["cache"] is not None:
        return dataset.carry_out(words, values, talk)
    _refuse_many(values)
    wanted = wanted_of(words, values)
    place = _place(wanted, values)
    start = time.perf_counter()
    try:
        job = make_job(wanted, values, talk)
        return _write(job, place, values, talk, start)
    finally:
        talk.display.close()


def wanted_of(words: Sequence[str], values: Values) -> Wanted:
    """What the words and flags ask for.

    Raises:
        RequestError: nothing to read or encode is named, or the prompt is given twice.
        InputError: a picture is not there.
    """
    shown = [word for word in words if looks_like_picture(word) or os.path.isfile(word)]
    said = [word for word in words if word not in shown]
    prompts = [text for text in (prompt_of(values), values["prompt"], *said) if text is not None]
    if len(prompts) > 1:
        raise RequestError(f"prompt must be given once, got {len(prompts)}", hint="put it in one pair of quotes")
    pictures = tuple(Path(name) for name in (*shown, *values["ref"]))
    wanted = Wanted(pictures, next(iter(prompts), None), _named(values), values["vl_model"] is not None)
    if not wanted.model and not wanted.reads:
        raise RequestError(
            "extract must get a model that reads or encodes, got none",
            hint="--vl-model QWEN3VL for Z-Image, or --model of an edit model",
        )
    if wanted.reads and not pictures:
        raise RequestError("--vl-model must have a picture to read, got none", hint="--image FILE")
    if wanted.model and wanted.prompt is None:
        raise RequestError("--model must have a prompt to encode, got none", hint="--prompt TEXT")
    if pictures and not wanted.reads:
        refuse_in_edit(values)
    check_files([*pictures, *([Path(values["init_image"])] if values["init_image"] else [])])
    return wanted


def make_job(wanted: Wanted, values: Values, talk: Talk) -> JobFile:
    """Read, then encode; what reads is freed before what encodes is loaded.

    Raises:
        RequestError: an option is out of range, or the model does not do what is asked.
        InputError: a picture cannot be used.
        CheckpointError: a model is missing or damaged.
    """
    from . import extraction

    if values["vl_statistics"]:
        extraction.read_statistics(values["vl_statistics"])
    for path in (*wanted.pictures, *([Path(values["init_image"])] if values["init_image"] else [])):
        extraction.check_picture(path)
    knobs, blend, layers = extraction.settings(values)
    if wanted.reads and wanted.model:
        extraction.check_pair(values)
    job = extraction.read(wanted, values, layers, talk) if wanted.reads else None
    if wanted.model:
        made = extraction.encode(wanted, values, talk)
        job = made if job is None else replace(made, raw=job.raw, extractor=job.extractor)
    if job is None:
        raise RuntimeError("a job must be read or encoded")
    render = extraction.render_of(values, job)
    return replace(job, prompt=wanted.prompt, knobs=knobs, blend=blend, render=render)


def _refuse_many(values: Values) -> None:
    """Raise RequestError for a flag that only many jobs, or a dataset, have a use for."""
    for flag in queue.FLAGS + dataset.FLAGS:
        if values[flag.key] not in (None, False, ()):
            raise RequestError(
                f"{flag.name} must stand beside --jobs or --dataset-config, got it for one job", hint="leave it out"
            )


def _named(values: Values) -> bool:
    return values["model"] is not None or any(values[name] for name in SINGLE_FILES)


def _place(wanted: Wanted, values: Values) -> str | Path:
    """Where the file goes, checked before a model is opened."""
    from ..engine.qx.file import check_name
    from ..engine.qx.remote import check_known, is_remote

    report = values["report"]
    if report is not None and not wanted.reads:
        raise RequestError("--report must stand beside --vl-model, whose states it draws, got it alone")
    if report is not None:
        check_picture_file(Path(report), wanted.pictures)
    text = values["output"]
    if text is not None and is_remote(text):
        check_name(text)
        check_known(text)
        return text
    path, chosen = _local(text, wanted)
    check_name(path)
    check_preview_folder(path.parent)
    read = [*wanted.pictures, *(Path(values[name]) for name in ("vl_statistics", "init_image") if values[name])]
    check_targets([path], read, new=chosen)
    return path


def _local(text: str | None, wanted: Wanted) -> tuple[Path, bool]:
    """The file, and whether its name was chosen here."""
    stem = wanted.pictures[0].stem if wanted.pictures else "job"
    if text is not None and not (text.endswith(("/", os.sep)) or Path(text).is_dir()):
        return Path(text), False
    folder = Path(text or "")
    names = [stem, *(f"{stem}-{number}" for number in range(1, MAX_NAME_TRIES))]
    return next(path for name in names if not os.path.lexists(path := folder / (name + SUFFIX))), True


def _write(job: JobFile, place: str | Path, values: Values, talk: Talk, start: float) -> int:
    from ..engine.qx import write_job
    from ..engine.qx.remote import shown
    from .extraction import draw

    lines = _tell(job, values, talk)
    write_job(place, job)
    if job.raw is not None and values["report"]:
        draw(job, values["vl_statistics"], Path(values["report"]))
    size = sum(tensor.nbytes for tensor in job.tensors.values())
    name = shown(place) if isinstance(place, str) else str(place)
    what = ", ".join(f"{each} {'x'.join(map(str, tensor.shape))}" for each, tensor in job.tensors.items())
    talk.detail(f"{'holds':<8} {what}")
    talk.say(f"{'done':<8} {name}  {bytes_text(size)}  {seconds_text(time.perf_counter() - start)}")
    if values["json"]:
        shapes = {each: list(tensor.shape) for each, tensor in job.tensors.items()}
        said = {"output": name, "kind": job.kind, "bytes": size, "tensors": shapes, "report": lines}
        print(json.dumps(said | ({"plot": values["report"]} if values["report"] else {}), indent=2))
    else:
        print(name, flush=True)
        if values["report"]:
            print(values["report"], flush=True)
    return 0


def _tell(job: JobFile, values: Values, talk: Talk) -> list[str]:
    """What was read, in numbers."""
    if job.raw is None:
        return []
    from .extraction import numbers

    lines = numbers(job, values["vl_statistics"])
    for line in lines:
        talk.say(line if line.startswith("note: ") else f"{'read':<8} {line}")
    return lines
