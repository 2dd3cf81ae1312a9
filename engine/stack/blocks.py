"""The blocks of one kind in a checkpoint: a template, and one slab layout per block."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Generic

import torch

from ...loaders.checkpoint import Checkpoint
from ..formats import QUANTISED, check_format, slab_specs
from ..layout import SlabLayout
from ..quant import quantise_module
from ..template import Block, Template, dtype_name

NO_KERNELS: Mapping[str, str] = MappingProxyType({})
"""Every op in its definition."""


class BlockStack(Generic[Block]):
    """The blocks under one root of a checkpoint, ``transformer_blocks.0.`` and so on.

    Args:
        checkpoint: where the weights are stored.
        root: what stands before the number, with its dot.
        count: number of blocks.
        module: one block on the meta device; its linear layers are replaced where the format asks for it.
        weight_format: ``bf16`` (every tensor in the compute dtype), ``int8`` or ``fp8``.
        dtype: compute dtype.
        dead: names that the last block does not need; they take no space.
        keep: matrices that stay in the compute dtype.
        kernels: op of a block to its implementation; ``linear`` and ``quant`` are what 8-bit layers ask for.

    Attributes:
        template: the block that runs over the tape.
        layouts: one per block.
    """

    def __init__(  # noqa: PLR0913 (the options by name)
        self,
        checkpoint: Checkpoint,
        root: str,
        count: int,
        module: Block,
        *,
        weight_format: str = "bf16",
        dtype: torch.dtype,
        dead: Collection[str] = (),
        keep: Collection[str] = (),
        kernels: Mapping[str, str] = NO_KERNELS,
    ) -> None:
        self.checkpoint, self.root, self.weight_format = checkpoint, root, check_format(weight_format)
        self.plain, self.keep = dtype_name(dtype), frozenset(keep)
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        quantise_module(
            module, weight_format, self.keep, implementation=kernels.get("linear"), quantiser=kernels.get("quant")
        )
        self.template = Template(module)
        whole = SlabLayout.of(slab_specs(shapes, weight_format, self.plain, self.keep))
        alive = {name: shape for name, shape in shapes.items() if name not in dead}
        last = SlabLayout.of(slab_specs(alive, weight_format, self.plain, self.keep & alive.keys()))
        self.layouts = (*[whole] * (count - 1), last)

    def __len__(self) -> int:
        return len(self.layouts)

    @property
    def quantised(self) -> bool:
        """The format is not one that a checkpoint holds, so the slabs have to be packed first."""
        return self.weight_format in QUANTISED

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(layout.nbytes for layout in self.layouts)

    def prefix(self, index: int) -> str:
        """What stands before the names of block ``index`` in the checkpoint."""
        return f"{self.root}{index}."


class CheckpointSource:
    """Slabs read tensor by tensor from the checkpoint, cast to the compute dtype where it differs.

    Args:
        stack: blocks in the format ``bf16``.
    """

    def __init__(self, stack: BlockStack) -> None:
        self._stack = stack

    def read(self, index: int, into: torch.Tensor) -> None:
        """Fill ``into`` (uint8 [nbytes of slab ``index``], CPU)."""
        items: Sequence[tuple[str, torch.Tensor]] = [
            (self._stack.prefix(index) + name, view) for name, view in self._stack.layouts[index].views(into).items()
        ]
        self._stack.checkpoint.read_into(items)
