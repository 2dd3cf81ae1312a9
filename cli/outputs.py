"""Where results go: names chosen and places checked before any model is read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError, RequestError

PICTURE = ".png"
LATENTS = ".safetensors"
PICTURES = (PICTURE, ".jpg", ".jpeg", ".webp")
SUFFIXES = (*PICTURES, LATENTS)
MAX_NAME_TRIES = 10_000


@dataclass(frozen=True)
class Target:
    """Files of one result; None for what is not written."""

    picture: Path | None
    latents: Path | None

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that will be written."""
        return tuple(path for path in (self.picture, self.latents) if path is not None)

    @property
    def stem(self) -> str:
        """Name without suffix."""
        return self.paths[0].stem


@dataclass(frozen=True)
class Wish:
    """What the user said about the output.

    Attributes:
        output: value of ``--output``, or None.
        save_path: value of ``--save_path``, or None.
        kind: ``images``, ``latents`` or ``both``.
        default_stem: name used where the user named no file.
        append: text added to the name, or "".
        never: files that must not be overwritten: the inputs.
    """

    output: str | None
    save_path: str | None
    kind: str
    default_stem: str
    append: str = ""
    never: tuple[Path, ...] = ()


def choose(wish: Wish, seeds: Sequence[int]) -> list[Target]:
    """One target per seed, each in a folder that can be written.

    A file named by the user is overwritten; a name chosen here never is. Several results, and results in a folder,
    carry their seed in the name.

    Raises:
        RequestError: the wish contradicts itself or would overwrite an input picture.
        OutputError: the folder is missing or cannot be written.
    """
    folder, stem, suffix = _place(wish)
    named = suffix is not None
    _check_folder(folder, create=wish.save_path is not None)
    if wish.append and wish.append not in stem:
        stem = f"{stem}_{wish.append}"
    into_folder = not named and (wish.output is not None or wish.save_path is not None)
    tagged = len(seeds) > 1 or into_folder
    stems = [f"{stem}_{seed}" if tagged else stem for seed in seeds]
    if suffix is None:
        targets = [_target(folder, _free(folder, each, wish.kind), wish.kind) for each in stems]
    else:
        targets = [_target(folder, each, wish.kind, suffix) for each in stems]
    for path in (path for target in targets for path in target.paths):
        _check_file(path, wish.never)
    return targets


def _place(wish: Wish) -> tuple[Path, str, str | None]:
    """(folder, stem, suffix of the picture, or None where the user named no file)."""
    if wish.output is not None and wish.save_path is not None:
        raise RequestError("the output must be named once, got both --output and --save_path")
    text = wish.output if wish.output is not None else wish.save_path
    if text is None:
        return Path(), wish.default_stem, None
    if not text.strip():
        raise RequestError(f"output must be a file or a folder, got {text!r}")
    path = Path(text)
    suffix = path.suffix.lower()
    if path.is_dir() or text.endswith(("/", os.sep)) or (wish.save_path is not None and suffix not in SUFFIXES):
        return path, wish.default_stem, None
    if suffix not in (*SUFFIXES, ""):
        raise RequestError(
            f"output must end in one of {', '.join(SUFFIXES)}, got {text}", hint=f"-o {path.with_suffix(PICTURE)}"
        )
    return path.parent, path.stem, path.suffix if suffix in PICTURES else PICTURE


def _target(folder: Path, stem: str, kind: str, suffix: str = PICTURE) -> Target:
    return Target(
        picture=folder / (stem + suffix) if kind != "latents" else None,
        latents=folder / (stem + LATENTS) if kind != "images" else None,
    )


def _free(folder: Path, stem: str, kind: str) -> str:
    """The stem, or the first of stem-1, stem-2, ... under which nothing stands yet."""
    for candidate in _candidates(stem):
        if not any(os.path.lexists(path) for path in _target(folder, candidate, kind).paths):
            return candidate
    raise OutputError(f"{folder / stem} must have a free number up to {MAX_NAME_TRIES}", hint="name the output with -o")


def _candidates(stem: str) -> Iterator[str]:
    yield stem
    for number in range(1, MAX_NAME_TRIES):
        yield f"{stem}-{number}"


def check_picture_file(path: Path, never: Sequence[Path]) -> None:
    """Check that a picture can be written under a name.

    Raises:
        RequestError: the name has no picture's suffix, or is one of the inputs.
        OutputError: the folder is missing or cannot be written.
    """
    if path.suffix.lower() not in PICTURES:
        raise RequestError(f"output must end in one of {', '.join(PICTURES)}, got {path}")
    _check_folder(path.parent, create=False)
    _check_file(path, never)


def check_targets(paths: Sequence[Path], never: Sequence[Path], *, new: bool) -> None:
    """Check that results can be written under their names.

    Args:
        paths: of the results.
        never: files that must not be overwritten: the inputs.
        new: the names were chosen here, so nothing may stand there yet.

    Raises:
        RequestError: a name is one of the inputs.
        OutputError: something stands there that is not to be overwritten, or cannot be.
    """
    for path in paths:
        _check_file(path, never)
        if new and os.path.lexists(path):
            raise OutputError(f"{path} must be a new file, got one that is there", hint="name another place with -o")


def free_picture(stem: str) -> Path:
    """A picture's name in the current folder under which nothing stands yet."""
    return Path(_free(Path(), stem, "images") + PICTURE)


def check_preview_folder(folder: Path) -> None:
    """Raise OutputError where step pictures could not be written; the folder itself may be missing."""
    _check_folder(folder, create=True)


def _check_folder(folder: Path, *, create: bool) -> None:
    existing = folder
    if create:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
    if not existing.is_dir():
        state = "a file" if existing.exists() else "nothing there"
        hint = "name another folder" if existing.exists() else f"mkdir -p {folder}"
        raise OutputError(f"output folder {existing} must be an existing folder, got {state}", hint=hint)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OutputError(
            f"output folder {existing.resolve()} must be writable, got: {error.strerror or error}",
            hint="name another place with -o",
        ) from error


def _check_file(path: Path, never: Sequence[Path]) -> None:
    if path.is_dir():
        raise OutputError(f"output {path} must be a file, got a folder", hint=f"-o {path}/ writes into it")
    if not path.exists():
        return
    if any(other.exists() and path.samefile(other) for other in never):
        raise RequestError(f"output must differ from the input pictures, got {path}", hint="name another file with -o")
    if not os.access(path, os.W_OK):
        raise OutputError(f"output {path} must be writable, got a read-only file", hint="name another file with -o")
