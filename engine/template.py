"""One block that runs as every block of a stack.

A *slab* holds every tensor of one block in one contiguous run of bytes; a *tape* (``mover``) is the sequence of slabs
in execution order; the *template* is one block whose parameters are rebound to views of slab ``i`` before block ``i``
runs. Where a slab lies (device, host, file) is the tape's affair alone, so the block never knows and the bits never
change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

import torch
from torch import nn

from ..loaders.checkpoint import TORCH_NAMES
from .layout import SLAB_ALIGNMENT_BYTES

Block = TypeVar("Block", bound=nn.Module)


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

    In a ``with`` statement, the template lets go of the last slab at the end.

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

    def __enter__(self) -> Template[Block]:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the last slab, so that its memory can be freed."""
        self.bind({})
