"""A transformer as one template block and a tape of weight slabs.

A *slab* holds every tensor of one block in one contiguous run of bytes; a *tape* is the sequence of slabs in execution
order; the *template* is one block whose parameters are rebound to views of slab ``i`` before block ``i`` runs. Where a
slab lies (device, host, file) is the tape's affair alone, so the block never knows and the bits never change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from ..loaders.checkpoint import TORCH_NAMES
from .layout import SLAB_ALIGNMENT_BYTES, SlabLayout

Block = TypeVar("Block", bound=nn.Module)


class TensorReader(Protocol):
    """What a tape needs of a checkpoint: filling given tensors by name."""

    def read_into(self, items: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Fill every tensor with the stored one of that name, cast to the tensor's dtype."""
        ...


def aligned_bytes(nbytes: int, device: torch.device) -> torch.Tensor:
    """Allocate ``nbytes`` bytes whose address is a multiple of the slab alignment.

    Alignment is part of the numerics contract: GEMM libraries choose kernels by it, and a 4-byte offset has been seen
    to change bits.

    Returns:
        uint8 tensor [nbytes] on ``device``, uninitialised.
    """
    raw = torch.empty(nbytes + SLAB_ALIGNMENT_BYTES, dtype=torch.uint8, device=device)
    start = -raw.data_ptr() % SLAB_ALIGNMENT_BYTES
    return raw[start : start + nbytes]


def dtype_name(dtype: torch.dtype) -> str:
    """Safetensors name of a torch dtype."""
    short = str(dtype).removeprefix("torch.")
    return next(name for name, known in TORCH_NAMES.items() if known == short)


class Template(Generic[Block]):
    """One block, built on the meta device, that runs as any block of a tape.

    Args:
        module: a block whose parameters live on the meta device.
    """

    def __init__(self, module: Block) -> None:
        self.module = module.eval().requires_grad_(False)
        self._meta = dict(module.named_parameters())
        self._places = {name: self._place(name) for name in self._meta}

    def _place(self, name: str) -> tuple[dict[str, torch.Tensor | None], str]:
        owner, _, leaf = name.rpartition(".")
        return self.module.get_submodule(owner)._parameters, leaf  # pyright: ignore[reportReturnType]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by its name inside the block."""
        return {name: tuple(parameter.shape) for name, parameter in self._meta.items()}

    def bind(self, views: Mapping[str, torch.Tensor]) -> Block:
        """Point every parameter at its view and return the block.

        A parameter that the slab leaves out (the dead weights of a last block) goes back to the meta device, so using
        it by mistake raises instead of reading the block before.
        """
        for name, (parameters, leaf) in self._places.items():
            parameters[leaf] = views.get(name, self._meta[name])
        return self.module


class Tape:
    """The slabs of a stack of blocks, resident on one device."""

    def __init__(self, layouts: Sequence[SlabLayout], arena: torch.Tensor) -> None:
        self.nbytes = sum(layout.nbytes for layout in layouts)
        self._arena = arena
        self._views: list[dict[str, torch.Tensor]] = []
        start = 0
        for layout in layouts:
            self._views.append(layout.views(arena[start : start + layout.nbytes]))
            start += layout.nbytes

    @classmethod
    def load(
        cls,
        template: Template,
        checkpoint: TensorReader,
        prefixes: Sequence[str],
        *,
        dtype: torch.dtype,
        device: torch.device,
        skip: Callable[[int], Collection[str]] = lambda index: (),
    ) -> Tape:
        """Read one slab per prefix, in order.

        Args:
            template: the block that will run over the tape.
            checkpoint: where tensor ``prefixes[i] + name`` is read from.
            prefixes: one per block, ``"transformer_blocks.0."`` and so on.
            dtype: stored and compute dtype of every tensor.
            device: where the slabs stay.
            skip: names that block ``i`` does not need; they take no space.
        """
        plain = dtype_name(dtype)
        layouts = [
            SlabLayout.of({name: (shape, plain) for name, shape in template.shapes.items() if name not in set(skip(i))})
            for i in range(len(prefixes))
        ]
        tape = cls(layouts, aligned_bytes(sum(layout.nbytes for layout in layouts), device))
        if device.type == "cpu":
            tape._fill(checkpoint, prefixes)
        else:
            tape._fill_through_host(checkpoint, prefixes, layouts)
        return tape

    def _fill(self, checkpoint: TensorReader, prefixes: Sequence[str]) -> None:
        for views, prefix in zip(self._views, prefixes, strict=True):
            checkpoint.read_into([(prefix + name, view) for name, view in views.items()])

    def _fill_through_host(
        self, checkpoint: TensorReader, prefixes: Sequence[str], layouts: Iterable[SlabLayout]
    ) -> None:
        start = 0
        for layout, prefix in zip(layouts, prefixes, strict=True):
            host = aligned_bytes(layout.nbytes, torch.device("cpu"))
            checkpoint.read_into([(prefix + name, view) for name, view in layout.views(host).items()])
            self._arena[start : start + layout.nbytes].copy_(host)
            start += layout.nbytes

    def __len__(self) -> int:
        return len(self._views)

    def views(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of block ``index``, ready to be bound."""
        return self._views[index]
