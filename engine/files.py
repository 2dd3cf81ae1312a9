"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import OutputError

logger = logging.getLogger(__name__)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk and rename it into place.

    Args:
        path: the final name; an existing file is replaced only after the new one is complete.
        write: called with the temporary path.

    Raises:
        OutputError: the folder is missing or not writable, or the disk is full; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        write(temporary)
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


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Raises:
        OutputError: as :func:`write_whole`.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(contiguous, temporary, metadata=dict(metadata or {})))


def recall(path: Path) -> dict[str, torch.Tensor] | None:
    """Tensors of a cached file; None where there is none, or, with a warning, where it cannot be read."""
    if not path.is_file():
        return None
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        logger.warning("cached %s cannot be read (%s); computing it again", path, error)
        return None
