"""Where each tensor of a block lies inside its slab; knows sizes and names, and needs no torch to compute them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..loaders.checkpoint import TORCH_NAMES

if TYPE_CHECKING:
    import torch

TENSOR_ALIGNMENT_BYTES = 256
SLAB_ALIGNMENT_BYTES = 4096
ITEM_BYTES = {"F64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}
"""Bytes per element of the dtypes that stand in slabs, by their safetensors names."""

Specs = Mapping[str, tuple[tuple[int, ...], str]]
"""Tensor name to shape and safetensors dtype name, in execution order."""


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Field:
    """One tensor of a slab: its place in bytes from the slab's start; ``dtype`` is its safetensors name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset_bytes: int
    nbytes: int


@dataclass(frozen=True)
class SlabLayout:
    """Every tensor starts at a 256-byte boundary; the slab's size is a multiple of 4096 bytes."""

    fields: tuple[Field, ...]
    nbytes: int

    @classmethod
    def of(cls, specs: Specs) -> SlabLayout:
        """Lay the tensors out in the order given."""
        fields, offset = [], 0
        for name, (shape, dtype) in specs.items():
            nbytes = ITEM_BYTES[dtype]
            for side in shape:
                nbytes *= side
            fields.append(Field(name, tuple(shape), dtype, offset, nbytes))
            offset = round_up(offset + nbytes, TENSOR_ALIGNMENT_BYTES)
        return cls(tuple(fields), round_up(offset, SLAB_ALIGNMENT_BYTES))

    def views(self, slab: torch.Tensor) -> dict[str, torch.Tensor]:
        """Typed views of the slab's bytes (uint8 [nbytes]), one per field; nothing is copied."""
        import torch

        return {
            field.name: slab[field.offset_bytes : field.offset_bytes + field.nbytes]
            .view(getattr(torch, TORCH_NAMES[field.dtype]))
            .view(field.shape)
            for field in self.fields
        }
