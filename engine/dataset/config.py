"""The TOML file that describes a dataset, in musubi-tuner's keys (its docs/dataset_config.md; seed 004).

What is written under ``[general]`` holds for every ``[[datasets]]`` that does not say otherwise. Paths are against the
folder of the file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError

MAX_FILE_BYTES = 16 << 20
MAX_SIDE_PIXELS = 8192
STEP = 16


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One ``[[datasets]]`` with the defaults of ``[general]``.

    Attributes:
        image_directory: pictures, each with its caption beside it; None where there is a list.
        image_jsonl_file: a list of pictures with captions; None where there is a folder.
        cache_directory: where the caches go.
        resolution: (width, height), or with buckets the area and the longest use of it.
        caption_extension: of the captions beside the pictures; None takes all pictures, without captions.
        control_directory: pictures that are shown beside each; None for none.
        enable_bucket: sizes near each picture's own shape; otherwise ``resolution`` alone.
        bucket_no_upscale: pictures of less area keep their size.
        control_resolution: area of the controls; None gives them the size of their picture.
        no_resize_control: controls keep their size, up to ``control_resolution``.
        batch_size: of training; it changes nothing of a cache.
        num_repeats: of training; it changes nothing of a cache.
    """

    image_directory: Path | None = None
    image_jsonl_file: Path | None = None
    cache_directory: Path
    resolution: tuple[int, int] = (960, 544)
    caption_extension: str | None = None
    control_directory: Path | None = None
    enable_bucket: bool = False
    bucket_no_upscale: bool = False
    control_resolution: tuple[int, int] | None = None
    no_resize_control: bool = False
    batch_size: int = 1
    num_repeats: int = 1


def read_config(path: Path) -> tuple[Dataset, ...]:
    """The datasets of a file.

    Raises:
        InputError: it is missing, no TOML, or a key or value is not one of a picture dataset.
    """
    document = _load(path)
    _check_keys(document, ("general", "datasets"), f"{path}")
    general, several = document.get("general", {}), document.get("datasets", [])
    if not isinstance(general, dict) or not isinstance(several, list) or not several:
        raise InputError(f"{path} must hold [[datasets]], got none", hint="[general] alone describes no dataset")
    _check_keys(general, _SHARED, f"{path}: [general]")
    found = tuple(_dataset(general, each, path, number) for number, each in enumerate(several, 1))
    _check_apart(found, path)
    return found


def _load(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path} must be at most {MAX_FILE_BYTES} bytes, got {path.stat().st_size}")
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} must be a TOML file, got no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} must be a TOML file, got: {error}") from error


def _dataset(general: Mapping[str, Any], own: Any, path: Path, number: int) -> Dataset:
    where = f"{path}: dataset {number}"
    if not isinstance(own, dict):
        raise InputError(f"{where} must be a table, got {own!r}", hint="write [[datasets]]")
    _refuse_others(own, where)
    _check_keys(own, (*_READERS, *_OLD), where)
    plain = {_OLD.get(key, key): value for key, value in own.items()}
    if len(plain) < len(own):
        raise InputError(f"{where} must name each setting once, got an old name beside its new one")
    read = {key: _READERS[key](value, f"{where}: {key}") for key, value in {**general, **plain}.items()}
    for key in ("image_directory", "image_jsonl_file", "control_directory", "cache_directory"):
        if key in read:
            read[key] = path.parent / read[key]
    read.pop("multiple_target", None)
    sources = [key for key in ("image_directory", "image_jsonl_file") if key in read]
    if len(sources) != 1:
        raise InputError(f"{where} must have image_directory or image_jsonl_file, got {len(sources)} of them")
    if sources == ["image_jsonl_file"] and "cache_directory" not in read:
        raise InputError(f"{where} must have cache_directory beside image_jsonl_file, got none")
    read.setdefault("cache_directory", read.get("image_directory"))
    made = Dataset(**read)
    width, height = made.resolution
    if not made.enable_bucket and (width % STEP or height % STEP):
        raise InputError(
            f"{where}: resolution must be multiples of {STEP} without enable_bucket, got {width}x{height}",
            hint=f"[{width - width % STEP}, {height - height % STEP}], or enable_bucket = true",
        )
    return made


def _refuse_others(own: Mapping[str, Any], where: str) -> None:
    video = sorted(key for key in own if key.startswith(("video_", "fp_", "flux_")))
    if video:
        raise InputError(f"{where} must be of pictures for Qwen-Image, got {video[0]}", hint="leave it out")


def _check_keys(found: Mapping[str, Any], known: Any, where: str) -> None:
    strange = [key for key in found if key not in known]
    if strange:
        raise InputError(f"{where} must have keys out of {', '.join(known)}, got {strange[0]!r}")


def _check_apart(found: tuple[Dataset, ...], path: Path) -> None:
    folders = [dataset.cache_directory.resolve() for dataset in found]
    for folder in folders:
        if folders.count(folder) > 1:
            raise InputError(
                f"{path} must give each dataset a cache_directory of its own, got {folder} twice",
                hint="trainers take every cache file of a folder for its dataset",
            )


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{where} must be text, got {value!r}")
    return value


def _extension(value: Any, where: str) -> str:
    text = _text(value, where)
    if not text.startswith(".") or "/" in text or "\\" in text:
        raise InputError(f'{where} must be like ".txt", got {value!r}')
    return text


def _switch(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{where} must be true or false, got {value!r}")
    return value


def _never(value: Any, where: str) -> bool:
    if _switch(value, where):
        raise InputError(f"{where} must be false, got true: layered targets are not cached here")
    return False


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{where} must be a whole number above 0, got {value!r}")
    return value


def _resolution(value: Any, where: str) -> tuple[int, int]:
    sides = value if isinstance(value, list) else [value, value]
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if len(sides) != 2 or not whole or not all(STEP <= side <= MAX_SIDE_PIXELS for side in sides):
        raise InputError(f"{where} must be [width, height] from {STEP} to {MAX_SIDE_PIXELS}, got {value!r}")
    return sides[0], sides[1]


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "image_directory": _text,
    "image_jsonl_file": _text,
    "control_directory": _text,
    "cache_directory": _text,
    "resolution": _resolution,
    "caption_extension": _extension,
    "batch_size": _count,
    "num_repeats": _count,
    "enable_bucket": _switch,
    "bucket_no_upscale": _switch,
    "control_resolution": _resolution,
    "no_resize_control": _switch,
    "multiple_target": _never,
}
_SHARED = ("resolution", "caption_extension", "batch_size", "num_repeats", "enable_bucket", "bucket_no_upscale")
_OLD = {
    "qwen_image_edit_no_resize_control": "no_resize_control",
    "qwen_image_edit_control_resolution": "control_resolution",
}
