"""How the weights of a stack are held: in which format, and where."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..mover import Placement, Tape
from ..plan import PhasePlan
from .blocks import NO_KERNELS, BlockStack, CheckpointSource
from .pack import Progress, pack
from .packed import PackedSource


@dataclass(frozen=True)
class Hold:
    """How the weights of a stack are held, and what computes with them.

    Attributes:
        weight_format: ``bf16``, ``int8`` or ``fp8``.
        placement: which blocks are streamed; None keeps all on the device.
        packed: the packed file; None takes one in the cache where the format needs it, else the checkpoint.
        kernels: op of a block (``linear``, ``quant``, ``attention``, ``modulate``, ``rope``) to its implementation, as
            ``kernels.dispatch`` names it; an op that is not named runs in its reference.
    """

    weight_format: str = "bf16"
    placement: Placement | None = None
    packed: Path | None = None
    kernels: Mapping[str, str] = field(default_factory=lambda: NO_KERNELS)

    @classmethod
    def of(cls, phase: PhasePlan, kernels: Mapping[str, str], packed: Path | None = None) -> Hold:
        """What a plan says of a phase, with the kernels of its component (``Plan.kernels_of``)."""
        placement = None if phase.blocks is None else phase.blocks.placement
        return cls(phase.weight_format, placement, packed, kernels)


def packed_path(stack: BlockStack, cache: Path) -> Path:
    """Where the cache keeps the packed file of a stack: one name per state of the source, format and compute dtype."""
    words = [stack.checkpoint.fingerprint, stack.root, stack.weight_format, stack.plain, *sorted(stack.keep)]
    key = hashlib.sha256("|".join(words).encode()).hexdigest()[:32]
    return cache / "packed" / f"{key}.{stack.weight_format}.safetensors"


def open_tape(
    stack: BlockStack,
    hold: Hold,
    device: torch.device,
    cache: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Tape:
    """The stack's slabs on a tape; a quantised stack is packed first if it never was.

    Args:
        stack: blocks in the format of ``hold``.
        hold: where they lie.
        device: where they run.
        cache: folder of packed files.
        progress: called while packing.

    Raises:
        CheckpointError: the packed file is damaged or of another source, or the checkpoint cannot be read.
        OutputError: the packed file cannot be written.
        PlanError: the placement is not one for this stack.
    """
    placement = hold.placement or Placement(len(stack))
    path = hold.packed
    if path is None and cache is not None and (stack.quantised or placement.host == "mapped"):
        path = packed_path(stack, cache)
        if not path.exists():
            pack(stack, path, progress)
    source = CheckpointSource(stack) if path is None else PackedSource(path, stack)
    return Tape(stack.layouts, source, placement, device)
