"""Files that appear whole or not at all. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from ..errors import OutputError


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk and rename it into place.

    Others may read it as far as the process's mask allows.

    Args:
        path: the final name; an existing file is replaced only after the new one is complete.
        write: called with the temporary path.

    Raises:
        OutputError: the folder is missing or not writable, or the disk is full; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        allowed = stat.S_IMODE(os.fstat(opened).st_mode)
        os.close(opened)
        write(temporary)
        # safetensors puts a file of its own there, which nobody else may read
        os.chmod(temporary, allowed)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{path} must be writable, got: {getattr(error, 'strerror', None) or error}",
            hint="choose another place for it, or make room there",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
