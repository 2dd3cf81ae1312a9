"""How the weights of a stack are held: in which format, and where."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ...kernels.linear_fp8 import Fp8Path
from ..mover import Placement, Tape
from ..plan import PhasePlan
from .blocks import BlockStack, CheckpointSource
from .pack import Progress, pack
from .packed import PackedSource


@dataclass(frozen=True)
class Hold:
    """How the weights of a stack are held.

    Attributes:
        weight_format: ``bf16``, ``int8`` or ``fp8``.
        placement: which blocks are streamed; None keeps all on the device.
        packed: the packed file; None takes one in the cache where the format needs it, else the checkpoint.
        fp8_path: how fp8 multiplies.
    """

    weight_format: str = "bf16"
    placement: Placement | None = None
    packed: Path | None = None
    fp8_path: Fp8Path = "dequantise"

    @classmethod
    def of(cls, phase: PhasePlan, kernel: str, packed: Path | None = None) -> Hold:
        """What a plan says of a phase, with the kernel of its linear layers."""
        placement = None if phase.blocks is None else phase.blocks.placement
        return cls(phase.weight_format, placement, packed, "scaled_mm" if kernel == "scaled_mm" else "dequantise")


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
