"""Files elsewhere, through fsspec: ``s3://``, ``gs://``, ``https://``, ``memory://`` and what else it knows."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...errors import InputError, OutputError, RequestError

CHUNK_BYTES = 4 << 20
LOCAL_NAME = "job.qx"


def is_remote(path: str | Path) -> bool:
    """Whether a name is a URL."""
    return isinstance(path, str) and "://" in path


def base_name(path: str | Path) -> str:
    """The last part of a path or URL, without what a URL's query may hold of secrets."""
    if is_remote(path):
        return shown(str(path)).rstrip("/").rsplit("/", 1)[-1]
    return Path(path).name


@contextlib.contextmanager
def fetched(url: str, most: int) -> Iterator[Path]:
    """A copy of a remote file for as long as the block runs.

    Args:
        url: where it is.
        most: bytes; more are refused.

    Raises:
        RequestError: fsspec, or what it needs for this kind of URL, is not installed.
        InputError: the file cannot be read, or is too large.
    """
    with tempfile.TemporaryDirectory(prefix="qengine-") as folder:
        local = Path(folder) / LOCAL_NAME
        try:
            with _open(url, "rb") as file, local.open("wb") as copy:
                _copy(file, copy, most, url)
        except (OSError, ValueError) as error:
            raise InputError(f"{shown(url)} must be a readable file, got: {_words(error)}") from error
        yield local


def put(url: str, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a local file, then upload it.

    Raises:
        RequestError: fsspec, or what it needs for this kind of URL, is not installed.
        OutputError: the upload fails.
    """
    with tempfile.TemporaryDirectory(prefix="qengine-") as folder:
        local = Path(folder) / LOCAL_NAME
        write(local)
        try:
            with local.open("rb") as file, _open(url, "wb") as there:
                _copy(file, there, None, url)
        except (OSError, ValueError) as error:
            raise OutputError(f"{shown(url)} must be writable, got: {_words(error)}") from error


def check_known(url: str) -> None:
    """Check that files of this kind of URL can be reached at all; asks no network.

    Raises:
        RequestError: nobody knows this kind, or fsspec, or what it needs for it, is not installed.
    """
    scheme = urlsplit(url).scheme
    try:
        _fsspec(url).get_filesystem_class(scheme)
    except ImportError as error:
        raise _missing(url, error) from error
    except ValueError as error:
        raise RequestError(f"URL must be of a kind that fsspec knows, got {scheme}://: {_words(error)}") from error


def _open(url: str, mode: str) -> Any:
    try:
        return _fsspec(url).open(url, mode)
    except ImportError as error:
        raise _missing(url, error) from error


def _fsspec(url: str) -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise _missing(url, error) from error
    return fsspec


def _missing(url: str, error: ImportError) -> RequestError:
    return RequestError(
        f"files at {urlsplit(url).scheme}:// must have a package that reads them, got none: {_words(error)}",
        hint='pip install "qengine[remote]", and s3fs for s3://, gcsfs for gs://, aiohttp for https://',
    )


def _copy(source: Any, target: Any, most: int | None, url: str) -> None:
    done = 0
    while chunk := source.read(CHUNK_BYTES):
        done += len(chunk)
        if most is not None and done > most:
            raise InputError(f"{shown(url)} must be at most {most} bytes, got more")
        target.write(chunk)


def shown(url: str) -> str:
    """Without user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rsplit('@', 1)[-1]}{parts.path}"


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
