"""Tensors in files that appear whole or not at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .whole import write_whole

logger = logging.getLogger(__name__)


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
