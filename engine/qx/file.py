"""A job file: one safetensors file of raw hidden states and encoded parts, with a header that says what they are.

Tensors: ``vl.hidden.<layer>`` [S, D], ``vl.input_ids`` int32 [S], ``vl.segment`` uint8 [S], ``vl.grid_thw`` int32
[n, 3]; ``text.embeds`` [T, D], ``neg.embeds`` [T', D]; ``latent.init`` and ``latent.ref.<k>`` [1, z, 1, h, w]. The
header holds one JSON document under ``qengine``; see ``header.py``. No path, no device, nothing pickled.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from ...errors import InputError, QEngineError, RequestError
from ...loaders.header import read_header
from ..files import write_tensors
from .header import from_text, sha256_of, to_text
from .job import AGAIN, JobFile
from .remote import fetched, is_remote, put, shown
from .verify import verify

__all__ = ["JobFile", "check_name", "read_job", "write_job"]

SUFFIXES = (".qx", ".safetensors")
MAX_FILE_BYTES = 8 << 30

_KEY = "qengine"
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")


def write_job(path: str | Path, job: JobFile) -> None:
    """Write a job file, whole or not at all; its bytes depend on the job and its date alone.

    Args:
        path: .qx or .safetensors; a URL such as ``s3://…`` with the extra ``remote``.
        job: what to write.

    Raises:
        RequestError: the job is empty or contradicts itself, holds an absolute path, or the name has another suffix.
        OutputError: it cannot be written.
    """
    check_name(path)
    if is_remote(path):
        put(str(path), lambda local: write_job(local, job))
        return
    try:
        verify(job)
    except InputError as error:
        raise RequestError(f"job must be whole to be written: {error.message}", hint=error.hint) from error
    tensors = job.tensors
    write_tensors(Path(path), tensors, {_KEY: to_text(job, tensors)})


def check_name(path: str | Path) -> None:
    """Raise RequestError for a name that is no job file's."""
    name = str(path).lower()
    if not name.endswith(SUFFIXES):
        raise RequestError(f"job file must end in {' or '.join(SUFFIXES)}, got {path}", hint="-o job.qx")


def read_job(path: str | Path) -> JobFile:
    """Read a job file and check everything in it; the file is not kept open.

    Args:
        path: the file; a URL such as ``s3://…`` with the extra ``remote``.

    Raises:
        InputError: there is no such file, it is cut, foreign, pickled or altered, of another version, or its parts
            contradict each other.
    """
    if is_remote(path):
        with fetched(str(path), MAX_FILE_BYTES) as local:
            return _read(local, shown(str(path)))
    return _read(Path(path), str(path))


def _read(path: Path, name: str) -> JobFile:
    _refuse_others(path, name)
    try:
        header = read_header(path)
    except QEngineError as error:
        words = error.message.replace(str(path), name)
        raise InputError(f"{name} must be a whole job file, got one that is none: {words}", hint=AGAIN) from error
    if _KEY not in header.metadata:
        raise InputError(f"{name} must be a qengine job file, got a safetensors file of something else", hint=AGAIN)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {each: file.get_tensor(each).clone() for each in header.tensors}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{name} must be readable as its header says, got: {error}", hint=AGAIN) from error
    job = from_text(header.metadata[_KEY], tensors, name, sha256_of(path))
    verify(job, name)
    return job


def _refuse_others(path: Path, name: str) -> None:
    """Raise InputError for what is no file, and for a pickle, which is not even opened as one."""
    if not path.is_file():
        state = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{name} must be a job file, got {state}", hint=AGAIN)
    with path.open("rb") as file:
        head, size = file.read(4), file.seek(0, 2)
    if name.lower().endswith(_PICKLE_SUFFIXES) or head.startswith(_PICKLES):
        raise InputError(f"{name} must be a job file, got a pickle, which is never read", hint=AGAIN)
    if size > MAX_FILE_BYTES:
        raise InputError(f"{name} must be at most {MAX_FILE_BYTES >> 30} GiB, got {size} bytes", hint=AGAIN)
