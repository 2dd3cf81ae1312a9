"""Placing the blocks of each phase under two ceilings: the fewest streamed blocks that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import PlanError
from .budget import Choices, size_text
from .facts import DeviceFacts
from .phases import Items, Need, PhasePlan, host_slab_bytes, process_bytes
from .placement import SLOTS, Blocks, useful_counts


@dataclass(frozen=True)
class Ceilings:
    """What may be used at most, in bytes; ``vram_bytes`` is None on a CPU that is limited by its memory alone."""

    vram_bytes: int | None
    ram_bytes: int


@dataclass(frozen=True)
class Kept:
    """A component that stays loaded through the phases of others: what it takes on the device and on the host."""

    name: str
    device_bytes: int
    host_bytes: int


def place(need: Need, device: DeviceFacts, ceilings: Ceilings, choices: Choices) -> PhasePlan:
    """The phase with the fewest streamed blocks that fit, or with the number that was chosen.

    Raises:
        PlanError: nothing that was allowed fits; the message says the least that would.
    """
    options = [phase_of(need, device, blocks) for blocks in _placements(need, device, ceilings, choices)]
    for option in options:
        if fits(option, ceilings):
            return option
    raise _refusal(need, options, ceilings, choices)


def fits(phase: PhasePlan, ceilings: Ceilings) -> bool:
    """Whether both predictions lie within the ceilings."""
    within = ceilings.vram_bytes is None or phase.vram_bytes <= ceilings.vram_bytes
    return within and phase.host_bytes <= ceilings.ram_bytes


def phase_of(need: Need, device: DeviceFacts, blocks: Blocks | None, kept: Sequence[Kept] = ()) -> PhasePlan:
    """A phase with its blocks placed, and what others keep beside it.

    On a CPU the device's memory is the host's: everything that a ``--vram`` limit counts is counted there again.
    """
    vram: list[tuple[str, int]] = [("context", device.context_bytes)] if device.context_bytes else []
    host: list[tuple[str, int]] = [("process", process_bytes(device))]
    here = [*_slab_items(blocks), *need.device_items]
    if need.device == "cuda" or device.kind == "cpu":
        vram += here
    if need.device == "cpu":
        host += here
    if blocks is not None and blocks.placement.streamed:
        where = blocks.placement.host
        host.append(("mapped slabs" if where == "mapped" else f"streamed slabs, {where}", host_slab_bytes(blocks)))
    host += need.host_items
    for part in kept:
        vram += [(f"{part.name}, kept", part.device_bytes)] if part.device_bytes else []
        on_host = part.host_bytes + (part.device_bytes if device.kind == "cpu" else 0)
        host += [(f"{part.name}, kept", on_host)] if on_host else []
    return PhasePlan(need.name, need.component, need.device, need.weight_format, blocks, tuple(vram), tuple(host))


def least(need: Need, device: DeviceFacts, ceilings: Ceilings, choices: Choices) -> tuple[int, int]:
    """(VRAM, RAM) of the smallest way to do a phase: by VRAM first where that is limited, else by RAM."""
    unlimited = Ceilings(None if ceilings.vram_bytes is None else 1 << 60, 1 << 60)
    options = [phase_of(need, device, blocks) for blocks in _placements(need, device, unlimited, choices)]
    sizes = [(option.vram_bytes, option.host_bytes) for option in options]
    return min(sizes) if ceilings.vram_bytes is not None else min(sizes, key=lambda pair: pair[1])


def _slab_items(blocks: Blocks | None) -> Items:
    if blocks is None:
        return ()
    resident = blocks.placement.blocks - len(blocks.placement.streamed)
    items = [(f"{resident} resident blocks", blocks.resident_bytes)] if resident else []
    if blocks.slots:
        items.append((f"{blocks.slots} slots", blocks.slot_bytes))
    return tuple(items)


def _placements(need: Need, device: DeviceFacts, ceilings: Ceilings, choices: Choices) -> list[Blocks | None]:
    """What may be tried, best first.

    On a CPU that is limited by its memory alone, blocks are used where the packed file is mapped; nothing is copied.
    """
    if not need.slab_bytes:
        return [None]
    count = len(need.slab_bytes)
    found: list[Blocks | None] = []
    free = need.device == "cpu" and (device.kind != "cpu" or ceilings.vram_bytes is None)
    if (
        need.mapped
        and free
        and choices.offload == "auto"
        and (choices.blocks_to_swap is None or need.component != "transformer")
    ):
        found.append(Blocks.of(need.slab_bytes, count, "mapped"))
    for streamed in _counts(need, device, choices):
        found += [Blocks.of(need.slab_bytes, streamed, host) for host in _hosts(need, streamed)]
    return found


def _hosts(need: Need, streamed: int) -> tuple[str, ...]:
    """Where streamed slabs may wait; a CPU reads packed ones from their file, since an arena would hold them twice."""
    if not streamed:
        return ("arena",)
    return ("disk",) if need.mapped and need.device == "cpu" else ("arena", "disk")


def _counts(need: Need, device: DeviceFacts, choices: Choices) -> Sequence[int]:
    blocks = len(need.slab_bytes)
    if need.device != device.kind:
        return (0,)
    if need.component == "transformer" and choices.blocks_to_swap is not None:
        return (choices.blocks_to_swap,)
    counts = useful_counts(blocks, SLOTS)
    return {"auto": counts, "none": counts[:1], "blocks": counts[1:] or counts, "sequential": (blocks,)}[
        choices.offload
    ]


def _refusal(need: Need, options: Sequence[PhasePlan], ceilings: Ceilings, choices: Choices) -> PlanError:
    by_vram = min(option.vram_bytes for option in options)
    by_ram = min(option.host_bytes for option in options)
    asked = f" with {choices.blocks_to_swap} blocks streamed" if choices.blocks_to_swap is not None else ""
    asked = f" with offload {choices.offload}" if choices.offload != "auto" else asked
    if ceilings.vram_bytes is not None and by_vram > ceilings.vram_bytes:
        short, name, got = by_vram, "--vram", ceilings.vram_bytes
    elif by_ram > ceilings.ram_bytes:
        short, name, got = by_ram, "--ram", ceilings.ram_bytes
    else:
        within = [o.host_bytes for o in options if ceilings.vram_bytes is None or o.vram_bytes <= ceilings.vram_bytes]
        short, name, got = min(within), "--ram", ceilings.ram_bytes
    freer = "" if not asked else ", or leave the number of streamed blocks to the plan"
    return PlanError(
        f"{name} must be at least {size_text(short)} to {need.name} with {need.component}{asked}, "
        f"got {size_text(got, up=False)}",
        hint=f"add {name} {size_text(short)}{freer}",
    )


def with_kept(
    made: Mapping[str, Need],
    phases: Mapping[str, PhasePlan],
    device: DeviceFacts,
    ceilings: Ceilings,
    parts: Sequence[Kept],
) -> dict[str, PhasePlan] | None:
    """The same placements with ``parts`` kept through the phases of other components; None where that does not fit."""
    result = {}
    for name, phase in phases.items():
        others = [part for part in parts if part.name != phase.component]
        result[name] = phase_of(made[name], device, phase.blocks, others)
        if not fits(result[name], ceilings):
            return None
    return result
