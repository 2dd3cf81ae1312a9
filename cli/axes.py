"""The flags of a sweep: pictures that are read, pictures to start from, and the values to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError
from .flag import Flag

_NUMBERS = r"[0-9.]+(,[0-9.]+)*,?"

FLAGS = (
    Flag(
        name="--image",
        short="-i",
        metavar="FILE",
        help="A picture that is both read by --vl-model and started from, as --vl-image and --init-image name them.",
    ),
    Flag(
        name="--vl-image",
        also=("--vl_image",),
        metavar="FILE...",
        many=True,
        help="Pictures that --vl-model reads and that are blended with the prompt.",
    ),
    Flag(
        name="--alphas",
        also=("--vl-alphas", "--vl_alphas"),
        metavar="X...",
        many=True,
        accepts=_NUMBERS,
        help="Make a picture for each share of the picture that is read, as --alpha says one: 0 0.3 0.5.",
    ),
    Flag(
        name="--strengths",
        metavar="X...",
        many=True,
        accepts=_NUMBERS,
        help="Make a picture for each strength of the noise on the picture to start from: 0.7 0.8 0.9.",
    ),
    Flag(name="--resume", kind="switch", help="Go on with an earlier sweep in the same folder: what is done is kept."),
)


def asked(values: Mapping[str, Any]) -> bool:
    """Whether the flags ask for a sweep, if only of one."""
    return any(values.get(name) for name in ("image", "vl_image", "vl_model", "alphas", "strengths"))


def numbers_of(name: str, words: Sequence[str]) -> tuple[float, ...]:
    """``("0", "0.3,0.5")`` as (0.0, 0.3, 0.5).

    Raises:
        RequestError: a word is no number.
    """
    parts = [part for word in words for part in word.split(",") if part]
    try:
        return tuple(float(part) for part in parts)
    except ValueError as error:
        raise RequestError(f"--{name} must be numbers from 0 to 1, got {' '.join(words)}") from error


def pictures_of(values: Mapping[str, Any]) -> tuple[tuple[Path, ...], Path | None]:
    """The pictures that are read, and the one to start from.

    Raises:
        RequestError: they are named twice, or what reads them, or what is read, is not named.
    """
    read, init = tuple(Path(name) for name in values["vl_image"]), values.get("init_image")
    if values["image"] is not None:
        if read or init is not None:
            raise RequestError(
                "the picture must be named once, got --image beside --vl-image or --init-image",
                hint="--vl-image and --init-image together name two pictures",
            )
        read, init = (Path(values["image"]),), values["image"]
    if read and values["vl_model"] is None:
        raise RequestError(
            "a picture that is read must come with what reads it, got no --vl-model",
            hint="--vl-model DIR of a Qwen3-VL; --init-image FILE starts from a picture without reading it",
        )
    if values["vl_model"] is not None and not read:
        raise RequestError("--vl-model must come with a picture to read, got none", hint="-i FILE, or --vl-image FILE")
    return read, None if init is None else Path(init)
