"""Stacks of equal blocks in a checkpoint: their slabs, where they are read from, and the file that packs them."""

from __future__ import annotations

from .blocks import NO_KERNELS, BlockStack, CheckpointSource
from .hold import Hold, open_tape, packed_path
from .pack import pack, packed_bytes
from .packed import PackedSource, packed_format

__all__ = [
    "NO_KERNELS",
    "BlockStack",
    "CheckpointSource",
    "Hold",
    "PackedSource",
    "open_tape",
    "pack",
    "packed_bytes",
    "packed_format",
    "packed_path",
]
