"""``qengine info``: what made this picture, what this model is, or what this job file holds."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, RequestError
from ..loaders.header import read_header
from . import backend
from .expand import looks_like_picture
from .order import SINGLE_FILES, model_choice
from .outputs import LATENTS
from .words import bytes_text, table

JOB, JOB_KEY, JOB_FORMAT = ".qx", "qengine", "qengine-job"
HASHES = ("sha256", "tensors")
REPEATED = re.compile(r"(<\|image_pad\|>)\1+")

if TYPE_CHECKING:
    from ..loaders.source import ModelSource


def show(words: Sequence[str], values: Mapping[str, Any]) -> int:
    """Print what is known of a picture or a model; returns the exit code.

    Raises:
        RequestError: not exactly one subject is named.
    """
    files = any(values[name] for name in SINGLE_FILES)
    if len(words) != (0 if files else 1):
        got = f"{len(words)} beside --dit" if files else len(words)
        raise RequestError(f"info must get one picture, model or job file, got {got}", hint="qengine info tiny")
    if files:
        return _print(model_facts({**values, "model": None}), values)
    subject = words[0]
    path = Path(subject)
    if _is_job(path):
        return _print(job_facts(path), values)
    is_result = looks_like_picture(subject) or (path.is_file() and path.suffix.lower() == LATENTS)
    data = picture_facts(path) if is_result else model_facts({**values, "model": subject})
    return _print(data, values)


def _print(data: Mapping[str, Any], values: Mapping[str, Any]) -> int:
    print(json.dumps(data, indent=2, default=str) if values["json"] else _as_text(data))
    return 0


def picture_facts(path: Path) -> dict[str, Any]:
    """The record in a picture or latents file.

    Raises:
        InputError: there is no such file, or no record in it.
    """
    if not path.is_file():
        raise InputError(f"{path} must be a picture or a model, got no such file")
    record = backend.read_metadata(path)
    if not record:
        raise InputError(f"{path} must carry a qengine record, got none", hint="was it made with --no-metadata?")
    return record


def job_facts(path: Path) -> dict[str, Any]:
    """The document and the tensors of a job file, after every check of it.

    Raises:
        InputError: it cannot be used.
    """
    backend.check_job(path)
    header = read_header(path)
    said = json.loads(header.metadata[JOB_KEY])
    if said["vl"] is not None:
        said["vl"]["prompt"] = REPEATED.sub(lambda run: f"{run[1]}x{len(run[0]) // len(run[1])}", said["vl"]["prompt"])
    tensors = {name: f"{info.dtype} {list(info.shape)}" for name, info in sorted(header.tensors.items())}
    return {**{name: value for name, value in said.items() if name not in HASHES}, "tensors": tensors}


def _is_job(path: Path) -> bool:
    if path.suffix.lower() == JOB:
        return True
    if path.suffix.lower() != LATENTS or not path.is_file():
        return False
    return JOB_FORMAT in read_header(path).metadata.get(JOB_KEY, "")


def model_facts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Variant, components and defaults of a model, from its headers alone."""
    choice = model_choice(values)
    source = backend.open_source(**choice)
    return {
        "model": source.label,
        "variant": source.variant,
        "fingerprint": source.fingerprint,
        "components": _components(source),
        "defaults": dataclasses.asdict(backend.defaults_of(source)),
        "notes": list(source.notes),
    }


def _components(source: ModelSource) -> list[dict[str, Any]]:
    parts = (source.transformer, source.text_encoder, source.vae)
    rows = []
    for part in parts:
        tensors = part.checkpoint.tensors.values()
        rows.append(
            {
                "name": part.name,
                "tensors": len(part.checkpoint.tensors),
                "parameters": sum(_count(info.shape) for info in tensors),
                "dtypes": sorted({info.dtype for info in tensors}),
                "bytes": part.checkpoint.nbytes,
            }
        )
    return rows


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _as_text(data: Mapping[str, Any]) -> str:
    rows: list[tuple[str, ...]] = []
    lists: list[str] = []
    for name, value in data.items():
        if name == "components":
            lists.append(_component_table(value))
        elif isinstance(value, dict):
            rows += [(f"{name}.{key}", _plain(inner)) for key, inner in value.items()]
        elif isinstance(value, list):
            rows += [(f"{name}[{number}]", _plain(inner)) for number, inner in enumerate(value)]
        else:
            rows.append((name, _plain(value)))
    return "\n\n".join([table(rows), *lists])


def _component_table(components: list[dict[str, Any]]) -> str:
    head = ("component", "parameters", "tensors", "stored as", "size")
    body = [
        (
            part["name"],
            f"{part['parameters']:,}",
            str(part["tensors"]),
            " ".join(part["dtypes"]),
            bytes_text(part["bytes"]),
        )
        for part in components
    ]
    return table([head, *body])


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key}={_plain(inner)}" for key, inner in value.items())
    return "" if value is None else str(value).replace("\n", "\\n")
