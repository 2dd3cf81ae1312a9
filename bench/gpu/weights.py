"""Weights without a file: every tensor is a window into one pool of random numbers per kind, so filling is a copy."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...loaders.checkpoint import Checkpoint
from ...loaders.component import Component
from ...loaders.header import TensorInfo
from ...loaders.source import ModelSource

WINDOW = 1 << 16
"""Tensors of one shape begin at different elements of the pool below this, so that no two blocks are alike."""

SPREAD = 0.02
STORED_SPREAD = 40.0
ALIGNMENT_ELEMENTS = 64


class RandomCheckpoint(Checkpoint):
    """A checkpoint in bfloat16 whose values are drawn, not read; it also fills 8-bit matrices with their scales.

    Matrices and biases have spread 0.02 in every format, norms lie around 1.

    Args:
        name: of the component; seeds the values.
        shapes: tensor name to shape.
    """

    def __init__(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        path = Path("random") / name
        tensors = {key: TensorInfo(key, "BF16", shape, path, 0, 2 * prod(shape)) for key, shape in shapes.items()}
        super().__init__(tensors, {}, [path])
        self.fingerprint = self.identity = f"random {name}"
        self._seed = zlib.crc32(name.encode())
        self._largest = max((prod(shape) for key, shape in shapes.items() if "embed_tokens" not in key), default=0)
        self._pools: dict[tuple[torch.dtype, str], torch.Tensor] = {}

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor on the CPU; in bfloat16 it is the pool itself and must not be written to."""
        shape = self.info(name).shape
        values = self._values(name, torch.bfloat16, prod(shape)).view(shape)
        return values if dtype is None else values.to(dtype)

    def read_into(self, items: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Fill targets of any dtype and device; ``x.scale`` gets the scales of an 8-bit ``x.weight``."""
        for name, target in items:
            values = self._values(name, target.dtype, target.numel())
            target.detach().view(-1).view(torch.uint8).copy_(values.view(torch.uint8))
            self.bytes_read += target.nbytes

    def prepare(self, *dtypes: torch.dtype) -> None:
        """Draw the pools for these dtypes now."""
        for dtype in dtypes:
            self._pool(dtype, "matrix")
        for kind in ("scale", "norm"):
            self._pool(torch.float32, kind)
            self._pool(torch.bfloat16, kind)

    def _values(self, name: str, dtype: torch.dtype, count: int) -> torch.Tensor:
        known = self.tensors.get(name)
        normed = name.endswith(".weight") and known is not None and len(known.shape) == 1
        kind = "scale" if name.endswith(".scale") else "norm" if normed else "matrix"
        start = zlib.crc32(name.encode()) % WINDOW // ALIGNMENT_ELEMENTS * ALIGNMENT_ELEMENTS
        return self._pool(dtype, kind)[start : start + count]

    def _pool(self, dtype: torch.dtype, kind: str) -> torch.Tensor:
        if (dtype, kind) not in self._pools:
            generator = torch.Generator().manual_seed(self._seed)
            count = WINDOW + (self._largest if kind == "matrix" else min(self._largest, WINDOW))
            self._pools[dtype, kind] = _draw(count, dtype, kind, generator)
        return self._pools[dtype, kind]


def _draw(count: int, dtype: torch.dtype, kind: str, generator: torch.Generator) -> torch.Tensor:
    if kind == "scale":
        shares = torch.rand(count, generator=generator).mul_(0.5).add_(0.75)
        return shares.mul_(SPREAD / STORED_SPREAD).to(dtype)
    values = torch.randn(count, generator=generator)
    if kind == "norm":
        return values.mul_(SPREAD).add_(1).to(dtype)
    if dtype == torch.int8:
        return values.mul_(STORED_SPREAD).round_().clamp_(-127, 127).to(dtype)
    return values.mul_(STORED_SPREAD if dtype == torch.float8_e4m3fn else SPREAD).to(dtype)


def random_source(
    variant: str,
    parts: Mapping[str, tuple[Mapping[str, Any], Mapping[str, tuple[int, ...]]]],
    scheduler: Mapping[str, Any],
) -> ModelSource:
    """A model with random weights and no files.

    Args:
        variant: which model it is.
        parts: of ``transformer``, ``vae`` and ``text_encoder``: config, and tensor name to shape.
        scheduler: config of the schedule.
    """
    components = {
        name: Component(name, config, RandomCheckpoint(name, shapes)) for name, (config, shapes) in parts.items()
    }
    return ModelSource(
        label="random",
        variant=variant,
        defaults=variant,
        tokenizer_dir=Path("random"),
        processor_config={},
        scheduler_config=scheduler,
        notes=(),
        fingerprint="random",
        **components,
    )
