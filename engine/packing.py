"""Packing a component of an opened model on purpose: the files that runs map, or one in optimum-quanto's names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path

import torch

from ..errors import RequestError
from ..kernels.quant import quantise_rows
from ..loaders import ModelSource
from ..loaders.quanto import write_quanto
from .families import family_of
from .formats import QUANTISED
from .places import default_cache
from .stack import NO_KERNELS, BlockStack, Hold, pack, packed_path
from .stack.pack import Progress, check_room, quantised

COMPONENTS = ("transformer", "text_encoder")


def stack_of(source: ModelSource, component: str, weight_format: str, dtype: torch.dtype) -> BlockStack:
    """The blocks of a component that a packed file holds.

    Args:
        source: the opened model.
        component: ``transformer`` or ``text_encoder``.
        weight_format: ``bf16``, ``int8`` or ``fp8``.
        dtype: compute dtype.

    Raises:
        CheckpointError: the config describes a model that this engine does not run.
        RequestError: there is no such component or format.
    """
    if component not in COMPONENTS:
        raise RequestError(f"component must be one of {', '.join(COMPONENTS)}, got {component!r}")
    family = family_of(source)
    if component == "transformer":
        return family.stack(source.transformer, weight_format, dtype, NO_KERNELS)
    cpu, hold = torch.device("cpu"), Hold(weight_format)
    encoder = family.open_encoder(
        source, cpu, dtype, hold, default_cache(), alone=False, progress=lambda done, total: None
    )
    return encoder.stack(weight_format)


def pack_component(
    source: ModelSource,
    component: str,
    weight_format: str,
    *,
    dtype: torch.dtype,
    path: Path | None = None,
    cache: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Write the packed file of a component, anew if there is one.

    Args:
        source: the opened model.
        component: ``transformer`` or ``text_encoder``.
        weight_format: ``bf16``, ``int8`` or ``fp8``.
        dtype: compute dtype of the runs that use it.
        path: the file; None takes the place where a run looks for it.
        cache: as in ``Engine.open``.
        progress: called with bytes done and in all; may raise to stop.

    Returns:
        Where it was written.

    Raises:
        CheckpointError: a weight is not finite, or the source cannot be read.
        OutputError: it cannot be written there, or the disk has no room.
        RequestError: there is no such component or format.
    """
    stack = stack_of(source, component, weight_format, dtype)
    place = packed_path(stack, cache or default_cache()) if path is None else path
    pack(stack, place, progress)
    return place


def pack_quanto(
    source: ModelSource, weight_format: str, path: Path, progress: Progress = lambda done, total: None
) -> None:
    """Write the whole transformer in optimum-quanto's names: the matrices of its blocks quantised, the rest as stored.

    Rows are not rotated, and scales are bfloat16 unless the weights are stored in float32. Unlike a packed file, the
    whole result is in memory at once.

    Args:
        source: the opened model.
        weight_format: ``int8`` or ``fp8``.
        path: the safetensors file; ``quanto_qmap.json`` appears beside it.
        progress: called with bytes done and in all, counted as in the source; may raise to stop.

    Raises:
        CheckpointError: a weight is not finite, or the source cannot be read.
        OutputError: it cannot be written there, or the disk has no room.
        RequestError: the format is not one of quanto's.
    """
    if weight_format not in QUANTISED:
        raise RequestError(f"quanto weights must be one of {', '.join(QUANTISED)}, got {weight_format!r}")
    checkpoint = source.transformer.checkpoint
    matrices = _matrices(stack_of(source, "transformer", weight_format, torch.bfloat16))
    sizes = {name: info.nbytes for name, info in checkpoint.tensors.items()}
    check_room(path, sum(prod(checkpoint.info(n).shape) if n in matrices else size for n, size in sizes.items()))
    done = 0

    def count(name: str) -> None:
        nonlocal done
        done += sizes[name]
        progress(done, sum(sizes.values()))

    def rows() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        for name in matrices:
            yield name, *quantised(checkpoint, name, partial(_quanto_rows, weight_format=weight_format))
            count(name)

    plain = {}
    for name in sizes.keys() - matrices.keys():
        plain[name] = checkpoint.read(name)
        count(name)
    write_quanto(path, rows(), plain)


def _quanto_rows(weight: torch.Tensor, weight_format: str) -> tuple[torch.Tensor, torch.Tensor]:
    scale_dtype = torch.float32 if weight.dtype == torch.float32 else torch.bfloat16
    return quantise_rows(weight, weight_format, 1, scale_dtype=scale_dtype)


def _matrices(stack: BlockStack) -> dict[str, None]:
    """Names of everything that the stack quantises, those that its last block leaves out among them."""
    inner = [f.name.removesuffix("scale") + "weight" for f in stack.layouts[0].fields if f.name.endswith(".scale")]
    return {stack.prefix(index) + name: None for index in range(len(stack)) for name in inner}
