"""A plan in words and as JSON values: the arithmetic, the decision, and a line to paste."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .budget import size_text
from .extractor import ExtractorPlan
from .make import Plan
from .phases import PhasePlan

GB = 10**9


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values; sizes are bytes."""
    return {
        "model": plan.label,
        "device": _device_json(plan),
        "ceilings": {"vram_bytes": plan.ceilings.vram_bytes, "ram_bytes": plan.ceilings.ram_bytes},
        "components": _components_json(plan),
        "formats": {
            "transformer": plan.formats.transformer,
            "text_encoder": plan.formats.encoder,
            "vae": plan.formats.vae,
            "compute": plan.formats.plain,
        },
        "kernels": dict(plan.kernels),
        "passed_over": {op: dict(reasons) for op, reasons in plan.passed_over.items()},
        "vae_tile_rows": plan.vae_tile_rows,
        "phases": [_phase_json(phase) for phase in plan.phases],
        "kept_on_device": list(plan.kept_on_device),
        "kept_on_host": list(plan.kept_on_host),
        "vram_bytes": plan.vram_bytes,
        "host_bytes": plan.host_bytes,
        "notes": list(plan.notes),
        "hints": list(plan.hints),
        "command": plan.command,
    }


def _device_json(plan: Plan | ExtractorPlan) -> dict[str, Any]:
    return {
        "kind": plan.device.kind,
        "name": plan.device.name,
        "architecture": plan.device.architecture,
        "context_bytes": plan.device.context_bytes,
    }


def _components_json(plan: Plan | ExtractorPlan) -> list[dict[str, Any]]:
    return [
        {
            "name": part.name,
            "parameters": part.parameters,
            "dtypes": list(part.dtypes),
            "bytes": part.nbytes,
            "used_parameters": plan.used_parameters[part.name],
        }
        for part in plan.parts
    ]


def _phase_json(phase: PhasePlan) -> dict[str, Any]:
    blocks = phase.blocks
    placed: dict[str, Any] = {}
    if blocks is not None:
        placed = {
            "blocks": blocks.placement.blocks,
            "streamed": list(blocks.placement.streamed),
            "slots": blocks.slots,
            "host": blocks.placement.host if blocks.placement.streamed else None,
            "streamed_bytes": blocks.streamed_bytes,
        }
    return {
        "name": phase.name,
        "component": phase.component,
        "device": phase.device,
        "weight_format": phase.weight_format,
        **placed,
        "vram_bytes": phase.vram_bytes,
        "host_bytes": phase.host_bytes,
        "vram_items": [list(item) for item in phase.vram_items],
        "host_items": [list(item) for item in phase.host_items],
    }


def as_text(plan: Plan, *, explain: bool = False) -> str:
    """The plan for people: components, kernels, phases with every item, the decision, notes, and the line to paste.

    Args:
        plan: the plan.
        explain: also say why preferred kernels are not used.
    """
    pieces = [
        _components(plan, _formats(plan)),
        _kernels(plan, explain=explain),
        *(_phase(phase) for phase in plan.phases),
    ]
    pieces.append(_decision(plan))
    pieces += ["\n".join(f"note: {note}" for note in plan.notes), "\n".join(f"hint: {hint}" for hint in plan.hints)]
    return "\n\n".join([piece for piece in pieces if piece] + [plan.command])


def extractor_json(plan: ExtractorPlan) -> dict[str, Any]:
    """The plan of an extraction as JSON values, with the names of :func:`as_json`; sizes are bytes."""
    return {
        "model": plan.label,
        "device": _device_json(plan),
        "ceilings": {"vram_bytes": plan.ceilings.vram_bytes, "ram_bytes": plan.ceilings.ram_bytes},
        "components": _components_json(plan),
        "formats": {"vl": plan.formats.encoder, "compute": plan.formats.plain},
        "kernels": dict(plan.kernels),
        "layers": plan.depth,
        "alone": plan.alone,
        "phases": [_phase_json(phase) for phase in plan.phases],
        "vram_bytes": plan.vram_bytes,
        "host_bytes": plan.host_bytes,
        "notes": list(plan.notes),
        "command": plan.command,
    }


def extractor_text(plan: ExtractorPlan) -> str:
    """The plan of an extraction for people, as :func:`as_text` prints others."""
    formats = {"vl": plan.formats.encoder}
    kernels = _table([("kernel", "runs as"), *plan.kernels.items()])
    decision = [_peaks(plan), f"{plan.depth} decoder layers run, none above them is read"]
    if plan.phases[0].name == "see":
        both = "and freed before" if plan.alone else "beside"
        decision.append(f"the vision tower is loaded {both} the layers")
    pieces = [_components(plan, formats), kernels, *map(_phase, plan.phases), "\n".join(decision)]
    pieces.append("\n".join(f"note: {note}" for note in plan.notes))
    return "\n\n".join([piece for piece in pieces if piece] + [plan.command])


def _formats(plan: Plan) -> dict[str, str]:
    return {"transformer": plan.formats.transformer, "text_encoder": plan.formats.encoder, "vae": plan.formats.vae}


def _components(plan: Plan | ExtractorPlan, formats: Mapping[str, str]) -> str:
    rows = [("component", "parameters", "stored as", "stored", "used", "runs as", "place")]
    for part in plan.parts:
        places = dict.fromkeys(_place(phase) for phase in plan.phases if phase.component == part.name)
        rows.append(
            (
                part.name,
                f"{part.parameters:,}",
                " ".join(part.dtypes),
                f"{part.nbytes / GB:.2f} GB",
                f"{plan.used_parameters[part.name]:,}",
                formats[part.name] if formats[part.name] != "bf16" else plan.formats.plain.lower(),
                "; ".join(places),
            )
        )
    return _table(rows)


def _kernels(plan: Plan, *, explain: bool) -> str:
    rows = [("kernel", "runs as")]
    for op, made in plan.kernels.items():
        rows.append((op, made))
        if explain:
            rows += [("", f"not {name}: {why}") for name, why in plan.passed_over.get(op, {}).items()]
    return _table(rows)


def _place(phase: PhasePlan) -> str:
    if phase.blocks is None:
        return phase.device
    placed = phase.blocks.placement
    if not placed.streamed:
        return f"{phase.device}, all {placed.blocks} blocks resident"
    if placed.host == "mapped":
        return f"{phase.device}, all {placed.blocks} blocks where the packed file is mapped"
    return (
        f"{phase.device}, {placed.blocks - len(placed.streamed)} blocks resident, {len(placed.streamed)} streamed "
        f"from {placed.host} through {phase.blocks.slots} slots"
    )


def _phase(phase: PhasePlan) -> str:
    rows = [(f"{phase.name} ({phase.component})", "VRAM", "RAM")]
    labels = dict.fromkeys([label for label, _ in phase.vram_items] + [label for label, _ in phase.host_items])
    vram, host = _sums(phase.vram_items), _sums(phase.host_items)
    rows += [(f"  {label}", _cell(vram.get(label)), _cell(host.get(label))) for label in labels]
    rows.append(("  together", _cell(phase.vram_bytes), _cell(phase.host_bytes)))
    return _table(rows)


def _sums(items: Sequence[tuple[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for label, size in items:
        found[label] = found.get(label, 0) + size
    return found


def _cell(size: int | None) -> str:
    return "" if not size else size_text(size)


def _peaks(plan: Plan | ExtractorPlan) -> str:
    vram = plan.ceilings.vram_bytes
    rows = [
        ("", "peak", "ceiling"),
        ("VRAM", size_text(plan.vram_bytes), "none" if vram is None else size_text(vram, up=False)),
        ("RAM", size_text(plan.host_bytes), size_text(plan.ceilings.ram_bytes, up=False)),
    ]
    return _table(rows)


def _decision(plan: Plan) -> str:
    lines = [_peaks(plan)]
    denoise = plan.phase("denoise").blocks
    if denoise is not None and denoise.streamed_bytes:
        lines.append(f"{size_text(denoise.streamed_bytes)} are copied to the device per step, once for all branches")
    lines.append(f"VAE in bands of {plan.vae_tile_rows} output rows")
    for title, names in (("on the device", plan.kept_on_device), ("in RAM", plan.kept_on_host)):
        if names:
            lines.append(f"kept {title} between phases: {', '.join(names)}")
    return "\n".join(lines)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
