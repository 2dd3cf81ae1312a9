"""What the layers of the image VAE keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from qengine.engine.vae.layers import Rows


def tensors_of(part: Any) -> Iterator[torch.Tensor | Rows]:
    """Everything that layers keep, in order."""
    if isinstance(part, torch.Tensor | Rows):
        yield part
    elif isinstance(part, tuple | list):
        for entry in part:
            yield from tensors_of(entry)
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield from tensors_of(getattr(part, field.name))


def kept_bytes(part: Any) -> int:
    """Bytes of everything that layers keep."""
    total = 0
    for kept in tensors_of(part):
        total += kept.stored.nbytes + kept.scale.nbytes if isinstance(kept, Rows) else kept.nbytes
    return total
