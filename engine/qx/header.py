"""The JSON document in the header of a job file, with a hash over itself and one over the tensors."""

from __future__ import annotations

import hashlib
import json
import ntpath
import posixpath
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError, QEngineError, RequestError
from ...version import __version__
from ..given import Given
from ..vl import BlendKnobs, Knobs, RawExtraction, Seen
from .job import AGAIN, JobFile
from .settings import knob_values, knob_words

FORMAT = "qengine-job"
VERSION = 1
_FREE_TEXT = ("prompt", "negative_prompt", "text", "system_prompt")
_HIDDEN = re.compile(r"vl\.hidden\.(-[1-9][0-9]{0,3})")
_REFERENCE = re.compile(r"latent\.ref\.([0-9]{1,2})")
_VL = ("vl.input_ids", "vl.segment", "vl.grid_thw")
_GIVEN = ("text.embeds", "neg.embeds", "latent.init")


def to_text(job: JobFile, tensors: Mapping[str, torch.Tensor]) -> str:
    """The document of a job.

    Raises:
        RequestError: it holds an absolute path, or what is not JSON.
    """
    _refuse_paths(dict(job.extractor) | dict(job.model) | dict(job.render))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "producer": f"qengine {__version__}",
        "date": job.written or datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": job.kind,
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "size": job.given.size,
        "pictures": [vars(seen) for seen in job.pictures],
        "vl": None if job.raw is None else _raw_words(job.raw),
        "knobs": knob_words(job.knobs),
        "blend": knob_words(job.blend),
        "extractor": dict(job.extractor),
        "model": dict(job.model),
        "render": dict(job.render),
        "tensors": tensors_sha256(tensors),
    }
    try:
        text = _canonical(content)
    except (TypeError, ValueError) as error:
        raise RequestError(f"what a job file says must be JSON values, got: {error}") from error
    return _canonical({**content, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def from_text(text: str, tensors: Mapping[str, torch.Tensor], name: str, sha256: str) -> JobFile:
    """The job that a document and tensors say.

    Args:
        text: the document.
        tensors: of the file.
        name: of the file, for messages.
        sha256: of the file.

    Raises:
        InputError: another format or version, a hash that does not fit, or a part that is missing or of another type.
    """
    said = _checked(text, tensors, name)
    try:
        return JobFile(
            kind=said["kind"],
            raw=_raw(said["vl"], tensors, name),
            given=_given(said, tensors),
            prompt=said["prompt"],
            negative_prompt=said["negative_prompt"],
            pictures=_pictures(said["pictures"]),
            knobs=Knobs(**knob_values(said["knobs"])),
            blend=BlendKnobs(**knob_values(said["blend"])),
            extractor=dict(said["extractor"]),
            model=dict(said["model"]),
            render=dict(said["render"]),
            written=said["date"],
            sha256=sha256,
        )
    except (LookupError, TypeError, ValueError, AttributeError, QEngineError) as error:
        words = error.message if isinstance(error, QEngineError) else f"{type(error).__name__} {error}"
        raise InputError(f"{name} must hold a whole job, got one that cannot be used: {words}", hint=AGAIN) from error


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checked(text: str, tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, Any]:
    """The document, its format, version and hashes checked."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: header must hold JSON, got: {error}", hint=AGAIN) from error
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise InputError(f"{name} must be a {FORMAT} file, got another", hint=AGAIN)
    if type(said.get("version")) is not int or said["version"] != VERSION:
        raise InputError(
            f"{name} must be of version {VERSION}, got {said.get('version')!r}",
            hint="this qengine is older than the file; update it, or extract again",
        )
    claimed = said.pop("sha256", None)
    try:
        found = hashlib.sha256(_canonical(said).encode()).hexdigest()
    except ValueError as error:
        raise InputError(f"{name}: header must hold finite numbers and whole text, got: {error}", hint=AGAIN) from error
    if found != claimed:
        raise InputError(f"{name} must hold the header that was written, got an altered one", hint=AGAIN)
    if tensors_sha256(tensors) != said.get("tensors"):
        raise InputError(f"{name} must hold the tensors that were written, got altered ones", hint=AGAIN)
    return said


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _refuse_paths(value: Any, key: str = "") -> None:
    """Raise RequestError for an absolute path in what a job says; what a user wrote as words is left alone."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            _refuse_paths(each, str(name))
    elif isinstance(value, list | tuple):
        for each in value:
            _refuse_paths(each, key)
    elif isinstance(value, str) and key not in _FREE_TEXT and (posixpath.isabs(value) or ntpath.isabs(value)):
        raise RequestError(f"{key} in a job file must not be an absolute path, got {value}", hint="use its base name")


def _raw_words(raw: RawExtraction) -> dict[str, Any]:
    states = next(iter(raw.hidden.values()))
    return {
        "layers": sorted(raw.hidden, reverse=True),
        "width": states.shape[1],
        "dtype": str(states.dtype).removeprefix("torch."),
        "prompt": raw.prompt,
        "text": raw.text,
        "system_prompt": raw.system_prompt,
        "variant": raw.variant,
        "think_block": raw.think_block,
        "pictures": [vars(seen) for seen in raw.pictures],
        "masked": list(raw.masked),
    }


def _raw(words: Mapping[str, Any] | None, tensors: Mapping[str, torch.Tensor], name: str) -> RawExtraction | None:
    found = {int(match[1]): tensor for each, tensor in tensors.items() if (match := _HIDDEN.fullmatch(each))}
    strange = [each for each in tensors if not _known(each)]
    if strange or bool(found) != (words is not None) or (words is None) != (not any(each in tensors for each in _VL)):
        raise InputError(f"{name} must hold the tensors that its header names, got {sorted(tensors)[:10]}", hint=AGAIN)
    if words is None:
        return None
    if sorted(found, reverse=True) != words["layers"]:
        raise InputError(f"{name} must hold layers {words['layers']}, got {sorted(found, reverse=True)}", hint=AGAIN)
    return RawExtraction(
        hidden={layer: found[layer] for layer in words["layers"]},
        input_ids=tensors["vl.input_ids"],
        segments=tensors["vl.segment"],
        grid_thw=tensors["vl.grid_thw"],
        prompt=words["prompt"],
        text=words["text"],
        system_prompt=words["system_prompt"],
        variant=words["variant"],
        think_block=words["think_block"],
        pictures=_pictures(words["pictures"]),
        masked=tuple(words["masked"]),
    )


def _known(name: str) -> bool:
    return name in (*_VL, *_GIVEN) or bool(_HIDDEN.fullmatch(name) or _REFERENCE.fullmatch(name))


def _given(said: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Given:
    count = sum(name.startswith("latent.ref.") for name in tensors)
    size = said["size"]
    return Given(
        prompt_embeds=tensors.get("text.embeds"),
        negative_embeds=tensors.get("neg.embeds"),
        references=tuple(tensors[f"latent.ref.{number}"] for number in range(count)),
        init=tensors.get("latent.init"),
        size=None if size is None else (int(size[0]), int(size[1])),
    )


def _pictures(words: list[Mapping[str, Any]]) -> tuple[Seen, ...]:
    return tuple(Seen(str(each["sha256"]), int(each["width"]), int(each["height"])) for each in words)
