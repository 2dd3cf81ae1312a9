"""A quanto checkpoint seen as the model that was quantised: plain names and shapes, values worked out when read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .header import TensorInfo
from .quanto import DATA, SCALE, dequantise, detect_quanto, logical_shapes

if TYPE_CHECKING:
    import torch

LOGICAL_DTYPE, LOGICAL_BYTES = "F32", 4
"""What a quantised weight counts as: the product of a row and its scale, not rounded again."""


class DequantisedCheckpoint(Checkpoint):
    """The tensors of a quanto checkpoint under the names of its model; a quantised one reads as float32 rows x scale.

    Nothing is kept: every reading works the values out anew, one tensor at a time.

    Args:
        stored: the checkpoint as it lies in its files.

    Attributes:
        weight_format: of the stored rows, ``int8`` or ``fp8``.

    Raises:
        CheckpointError: as ``quanto.detect_quanto``.
    """

    def __init__(self, stored: Checkpoint) -> None:
        self.weight_format = detect_quanto(stored)
        infos = {name: _info(stored, name, shape) for name, shape in logical_shapes(stored).items()}
        super().__init__(infos, stored.metadata, stored.paths, stored.dropped)
        self._stored = stored
        self._quantised = frozenset(name for name in infos if name + DATA in stored.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return self._stored.nbytes

    @cached_property
    def fingerprint(self) -> str:
        """That of the stored tensors."""
        return self._stored.fingerprint

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, fresh on the CPU: float32 if it is stored quantised, or cast to ``dtype``.

        Raises:
            CheckpointError: as :meth:`Checkpoint.read`, or its rows or scales are not finite.
        """
        import torch

        if name in self._quantised:
            tensor = dequantise(self._stored, name, torch.float32 if dtype is None else dtype)
        else:
            tensor = self._stored.read(name, dtype)
        self.bytes_read = self._stored.bytes_read
        return tensor

    def read_into(self, items: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Fill many tensors; see :meth:`Checkpoint.read_into`."""
        self._stored.read_into([item for item in items if item[0] not in self._quantised])
        for name, target in items:
            if name in self._quantised:
                if tuple(target.shape) != self.info(name).shape:
                    raise CheckpointError(
                        f"{self.place}: tensor {name!r} must have shape {list(target.shape)}, "
                        f"got {list(self.info(name).shape)}"
                    )
                target.copy_(self.read(name, target.dtype))
        self.bytes_read = self._stored.bytes_read

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Rows of a matrix, gathered from the file; see :meth:`Checkpoint.rows`."""
        import torch

        if name not in self._quantised:
            found = self._stored.rows(name, indices)
        else:
            scale = self._stored.read(name + SCALE, torch.float32).reshape(-1).expand(self.info(name).shape[0])
            found = self._stored.rows(name + DATA, indices).float() * scale[indices.cpu(), None]
        self.bytes_read = self._stored.bytes_read
        return found


def _info(stored: Checkpoint, name: str, shape: tuple[int, ...]) -> TensorInfo:
    data = stored.tensors.get(name + DATA)
    if data is None:
        return stored.info(name)
    return TensorInfo(name, LOGICAL_DTYPE, shape, data.path, data.offset, LOGICAL_BYTES * prod(shape))
