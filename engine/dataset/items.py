"""What lies in a dataset: pictures, their captions, the pictures shown beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from .config import Dataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".tif", ".tiff", ".gif")
MAX_CAPTION_BYTES = 1 << 20
MAX_LIST_BYTES = 1 << 30

_NUMBERED = re.compile(r"(?P<stem>.+)_(?P<number>\d+)")


@dataclass(frozen=True)
class Item:
    """One picture of a dataset.

    Attributes:
        path: of the picture.
        caption: its text; None where the dataset has no captions.
        controls: pictures shown beside it, first to last.
        error: why it cannot be used, or None.
    """

    path: Path
    caption: str | None = None
    controls: tuple[Path, ...] = ()
    error: InputError | None = None


def list_items(dataset: Dataset) -> tuple[list[Item], tuple[str, ...]]:
    """The pictures of a dataset, and what is worth telling.

    Where captions have an extension, pictures without a caption are left out, as musubi-tuner does.

    Raises:
        InputError: a folder or the list is missing, or there is no picture.
    """
    notes: list[str] = []
    items = list(_listed(dataset) if dataset.image_jsonl_file is not None else _found(dataset, notes))
    where = dataset.image_jsonl_file or dataset.image_directory
    if not items:
        raise InputError(f"{where} must hold pictures with captions, got none", hint=notes[0] if notes else None)
    return _once(items), tuple(notes)


def _found(dataset: Dataset, notes: list[str]) -> Iterator[Item]:
    folder = dataset.image_directory
    if folder is None:
        return
    paths = _pictures(folder)
    if dataset.caption_extension is not None:
        bare = [path for path in paths if not path.with_suffix(dataset.caption_extension).is_file()]
        if bare:
            words = f"no {dataset.caption_extension} and are left out, the first is {bare[0].name}"
            notes.append(f"{len(bare)} picture(s) in {folder} have {words}")
        paths = [path for path in paths if path not in set(bare)]
    controls = _controls(dataset, {path.stem for path in paths})
    for path in paths:
        try:
            shown = () if controls is None else controls.get(path.stem, ())
            if controls is not None and not shown:
                raise InputError(f"{path} must have a control in {dataset.control_directory}, got none")
            extension = dataset.caption_extension
            yield Item(path, None if extension is None else _caption(path.with_suffix(extension)), shown)
        except InputError as error:
            yield Item(path, error=error)


def _pictures(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    except OSError as error:
        raise InputError(f"{folder} must be a folder of pictures, got: {error.strerror or error}") from error


def _controls(dataset: Dataset, stems: set[str]) -> dict[str, tuple[Path, ...]] | None:
    """By the stem of their picture: ``a.png`` and ``a_0.png``, ``a_1.png``, ... in the order of their numbers."""
    if dataset.control_directory is None:
        return None
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in _pictures(dataset.control_directory):
        numbered = _NUMBERED.fullmatch(path.stem)
        if path.stem in stems:
            found.setdefault(path.stem, []).append((-1, path))
        elif numbered is not None:
            found.setdefault(numbered["stem"], []).append((int(numbered["number"]), path))
    return {stem: tuple(path for _, path in sorted(each)) for stem, each in found.items()}


def _caption(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_CAPTION_BYTES:
            raise InputError(f"{path} must be at most {MAX_CAPTION_BYTES} bytes, got {path.stat().st_size}")
        return path.read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} must be readable as UTF-8 text, got: {error}") from error


def _listed(dataset: Dataset) -> Iterator[Item]:
    path = dataset.image_jsonl_file
    if path is None:
        return
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise InputError(f"{path} must be at most {MAX_LIST_BYTES} bytes, got {path.stat().st_size}")
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} must be a list of JSON objects, got: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _line(line, path, f"{path}:{number}")


def _line(line: str, path: Path, where: str) -> Item:
    try:
        fields: Any = json.loads(line)
        if not isinstance(fields, dict):
            raise InputError(f"{where} must be a JSON object, got {type(fields).__name__}")
        named = {key: value for key, value in fields.items() if key.startswith(("image_path", "control_path"))}
        if not all(isinstance(value, str) and value for value in named.values()) or "image_path" not in named:
            raise InputError(f"{where} must have image_path, and paths that are text, got {sorted(fields)}")
        caption = fields.get("caption")
        if caption is not None and not isinstance(caption, str):
            raise InputError(f"{where}: caption must be text, got {caption!r}")
    except (ValueError, RecursionError) as error:
        return Item(Path(where), error=InputError(f"{where} must be a JSON object, got: {error}"))
    except InputError as error:
        return Item(Path(where), error=error)
    controls = sorted((key for key in named if key.startswith("control_path")), key=_number)
    return Item(path.parent / named["image_path"], caption, tuple(path.parent / named[key] for key in controls))


def _number(key: str) -> int:
    number = key.rpartition("_")[2]
    return int(number) if number.isdigit() else -1


def _once(items: list[Item]) -> list[Item]:
    """Of two pictures of one name the second is an error: their caches would be one file."""
    stems: dict[str, Path] = {}
    checked = []
    for item in items:
        first = stems.setdefault(item.path.stem, item.path)
        if first != item.path and item.error is None:
            error = InputError(f"{item.path} must have a name of its own in its dataset, got {first.name} too")
            item = Item(item.path, error=error)
        checked.append(item)
    return checked
