"""From facts, request, ceilings and choices to a plan: a pure function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ...errors import PlanError, QEngineError, RequestError
from ..vae.cut import Cut
from .budget import Budget, Choices, parse_size, size_text
from .choose import Ceilings, Kept, least, place, with_kept
from .facts import DeviceFacts, Part
from .jobs import JobFacts
from .kernels import pick
from .model import ModelFacts
from .phases import NAMES, Need, PhasePlan, cut_of, host_slab_bytes, needs, tile_rows, vae_weights
from .rules import Formats, pick_formats, step_seconds

MARGIN_SHARE = 16
LEAST_MARGIN_BYTES = 256 << 20
LOSSLESS_SLOWDOWN = 1.1
KEEP_ORDER = ("vae", "transformer", "text_encoder")


@dataclass(frozen=True)
class Plan:
    """How a request is carried out; nothing below it decides again.

    Attributes:
        label: the model as the user wrote it.
        device: what it was made for.
        formats: weight formats and compute dtype.
        kernels: implementation by place and op: ``transformer.linear`` and so on.
        safe: the same places and ops, each in its definition.
        attention: the way of attention that was asked for.
        pinned: implementations that were asked for.
        passed_over: by place and op, the implementations that would have been preferred, and why they are not used.
        phases: encode, reference (the VAE before the transformer), denoise, decode; in order.
        cut: the bands of the VAE.
        vae_tile_rows: pixel rows of the output per band; depends on the size and the kind of device alone.
        ceilings: what may be used at most.
        kept_on_device: components that stay on the device through the phases of others.
        kept_on_host: components whose streamed slabs stay in host memory through the phases of others.
        parts: the components as stored.
        used_parameters: per component, parameters that a run of this request reads.
        notes: every decision that was not the user's.
        hints: what might be better, with the words to ask for it.
        command: a line to paste that asks for this plan.
    """

    label: str
    device: DeviceFacts
    formats: Formats
    kernels: Mapping[str, str]
    safe: Mapping[str, str]
    attention: str
    pinned: Mapping[str, str]
    passed_over: Mapping[str, Mapping[str, str]]
    phases: tuple[PhasePlan, ...]
    cut: Cut
    vae_tile_rows: int
    ceilings: Ceilings
    kept_on_device: tuple[str, ...]
    kept_on_host: tuple[str, ...]
    parts: tuple[Part, ...]
    used_parameters: Mapping[str, int]
    notes: tuple[str, ...]
    hints: tuple[str, ...]
    command: str

    def phase(self, name: str) -> PhasePlan:
        """The phase of that name."""
        return next(phase for phase in self.phases if phase.name == name)

    def kernels_of(self, component: str, *, safe: bool = False) -> dict[str, str]:
        """Op to implementation for the blocks of a component: ``linear``, ``attention``, ...

        Args:
            component: ``transformer``, ``text_encoder`` or ``vae``.
            safe: the definitions.
        """
        root, source = f"{component}.", self.safe if safe else self.kernels
        return {name.removeprefix(root): made for name, made in source.items() if name.startswith(root)}

    @property
    def vram_bytes(self) -> int:
        """Predicted peak on the device."""
        return max(phase.vram_bytes for phase in self.phases)

    @property
    def host_bytes(self) -> int:
        """Predicted peak on the host."""
        return max(phase.host_bytes for phase in self.phases)


def make_plan(model: ModelFacts, job: JobFacts, budget: Budget, device: DeviceFacts, choices: Choices) -> Plan:
    """Decide everything that can be decided before a weight is read.

    Formats and kernels follow from the architecture, tiles from the size; placement is the fewest streamed blocks
    that fit both ceilings, so more memory never streams more.

    Raises:
        PlanError: the ceilings cannot be met; the message says the least that would do.
        RequestError: more blocks are to be streamed than can be, or a kernel that is asked for cannot run here.
    """
    blocks = len(model.transformer.stack.blocks)
    if choices.blocks_to_swap is not None and choices.blocks_to_swap >= blocks:
        raise RequestError(
            f"blocks_to_swap must be from 0 to {blocks - 1}, got {choices.blocks_to_swap}",
            hint="offload sequential streams every block",
        )
    notes = list(job.notes)
    formats = pick_formats(device, job, choices)
    ceilings = ceilings_of(budget, device, notes)
    picked = pick(device, formats, choices, branches=job.branches, rcm=job.rcm, ops=model.transformer.ops)
    made = needs(model, job, device, formats, choices)
    made = {name: need for name, need in made.items() if not job.only or name in job.only}
    command = _command(model, job, ceilings, formats, choices)
    phases = _place_all(made, device, ceilings, choices, lambda room: _command(model, job, room, formats, choices))
    phases, on_device, on_host = _keep(model, made, phases, device, ceilings, choices, formats)
    denoise = phases.get("denoise")
    swapped = None if denoise is None else denoise.blocks
    if swapped is not None and swapped.streamed_bytes and choices.offload != "sequential":
        command = _command(model, job, ceilings, formats, _swapping(choices, len(swapped.placement.copied), blocks))
    notes += _words_on(phases, formats, device, choices)
    hints = () if denoise is None else _hints(model, job, ceilings, device, choices, denoise)
    return Plan(
        label=model.label,
        device=device,
        formats=formats,
        kernels=MappingProxyType(dict(picked.names)),
        safe=MappingProxyType(dict(picked.safe)),
        attention=choices.attention,
        pinned=MappingProxyType(dict(choices.kernels)),
        passed_over=MappingProxyType(dict(picked.passed_over)),
        phases=tuple(phases[name] for name in NAMES if name in phases),
        cut=cut_of(model, device, choices),
        vae_tile_rows=tile_rows(model, job, cut_of(model, device, choices)),
        ceilings=ceilings,
        kept_on_device=on_device,
        kept_on_host=on_host,
        parts=model.parts,
        used_parameters=MappingProxyType(_used(model, job)),
        notes=tuple(notes),
        hints=hints,
        command=command,
    )


def _swapping(choices: Choices, streamed: int, blocks: int) -> Choices:
    if streamed == blocks:
        return replace(choices, offload="sequential", blocks_to_swap=None)
    return replace(choices, offload="auto", blocks_to_swap=streamed)


def _used(model: ModelFacts, job: JobFacts) -> dict[str, int]:
    return {
        "transformer": model.transformer.used_parameters,
        "text_encoder": model.encoder.used_parameters(job) if job.encodes else 0,
        "vae": model.vae.used_parameters,
    }


def ceilings_of(budget: Budget, device: DeviceFacts, notes: list[str]) -> Ceilings:
    """What is given, else what is free less a margin; the notes say so."""
    ram = budget.ram_bytes
    if ram is None:
        ram = _free("RAM", device.host_free_bytes, notes)
    vram = budget.vram_bytes
    if vram is None and device.kind == "cuda":
        vram = _free("VRAM", device.free_bytes, notes)
    if budget.vram_bytes is not None and device.kind == "cuda" and budget.vram_bytes > device.total_bytes > 0:
        notes.append(f"--vram is lowered to the {size_text(device.total_bytes, up=False)} that {device.name} has")
        vram = device.total_bytes
    return Ceilings(vram, ram)


def _free(name: str, free: int, notes: list[str]) -> int:
    margin = min(free // 2, max(LEAST_MARGIN_BYTES, free // MARGIN_SHARE))
    ceiling = max(1, free - margin)
    notes.append(
        f"{name} ceiling {size_text(ceiling, up=False)}: {size_text(free, up=False)} is free now, "
        f"{size_text(margin)} of it is left to others"
    )
    return ceiling


def _place_all(
    made: Mapping[str, Need],
    device: DeviceFacts,
    ceilings: Ceilings,
    choices: Choices,
    command: Callable[[Ceilings], str],
) -> dict[str, PhasePlan]:
    phases, refusals = {}, []
    for name, need in made.items():
        try:
            phases[name] = place(need, device, ceilings, choices)
        except PlanError as error:
            refusals.append(error)
    if not refusals:
        return phases
    needed = [least(need, device, ceilings, choices) for need in made.values()]
    vram = None if ceilings.vram_bytes is None else hundredth(max(each[0] for each in needed))
    enough = Ceilings(vram, hundredth(max(each[1] for each in needed)))
    raise PlanError(refusals[0].message, hint=f"this fits with the least: {command(enough)}")


def hundredth(nbytes: int) -> int:
    """The size that ``size_text`` says, so that what is printed is enough."""
    return parse_size(size_text(nbytes)) + 1


def _keep(
    model: ModelFacts,
    made: Mapping[str, Need],
    phases: dict[str, PhasePlan],
    device: DeviceFacts,
    ceilings: Ceilings,
    choices: Choices,
    formats: Formats,
) -> tuple[dict[str, PhasePlan], tuple[str, ...], tuple[str, ...]]:
    """Keep loaded what fits beside the others at no cost: first on the host, then on the device as well."""
    held: dict[str, Kept] = {}
    if choices.offload == "sequential":
        return phases, (), ()
    for on_device in (False, True):
        for name in KEEP_ORDER:
            part = _kept(name, model, phases, formats, on_device=on_device)
            if part is None:
                continue
            tried = {**held, name: part}
            result = with_kept(made, phases, device, ceilings, list(tried.values()))
            if result is not None:
                held, phases = tried, result
    loaded = tuple(name for name, part in held.items() if part.device_bytes)
    return phases, loaded, tuple(name for name, part in held.items() if part.host_bytes)


def _kept(
    name: str, model: ModelFacts, phases: Mapping[str, PhasePlan], formats: Formats, *, on_device: bool
) -> Kept | None:
    phase = next((phase for phase in phases.values() if phase.component == name), None)
    if phase is None:
        return None
    on_disk = phase.blocks is None or phase.blocks.placement.host == "disk"
    host = 0 if on_disk else host_slab_bytes(phase.blocks)
    if not on_device:
        return Kept(name, 0, host) if host else None
    if name == "vae":
        return Kept(name, vae_weights(model, formats), 0)
    labels = {"ends", "vision tower", "modulation rows"}
    ends = sum(size for label, size in phase.vram_items if label in labels)
    weights = phase.blocks.device_bytes if phase.blocks is not None else 0
    return Kept(name, ends + weights, host) if phase.vram_items and ends else None


def _words_on(phases: Mapping[str, PhasePlan], formats: Formats, device: DeviceFacts, choices: Choices) -> list[str]:
    notes = []
    if choices.weights == "auto":
        why = "a CPU" if device.kind == "cpu" else f"sm{device.architecture}"
        what = "as stored" if formats.transformer == "bf16" else formats.transformer
        notes.append(f"weights {what}: the rule for {why}, whatever memory is free")
    if choices.text_encoder_cpu:
        notes.append("the text encoder runs on the CPU, which is part of what the picture depends on")
    for phase in phases.values():
        if phase.blocks is not None and phase.blocks.placement.copied and phase.blocks.placement.host == "disk":
            size = size_text(phase.blocks.streamed_bytes)
            why = "" if phase.device == "cpu" else ": --ram is below them"
            notes.append(f"{phase.name}: {size} are read from the packed file in every pass{why}")
    return notes


def _hints(
    model: ModelFacts, job: JobFacts, ceilings: Ceilings, device: DeviceFacts, choices: Choices, chosen: PhasePlan
) -> tuple[str, ...]:
    if chosen.weight_format == "bf16" or chosen.blocks is None:
        return ()
    lossless = replace(choices, weights="bf16", text_encoder_weights="auto")
    try:
        made = needs(model, job, device, pick_formats(device, job, lossless), lossless)
        phase = place(made["denoise"], device, ceilings, lossless)
    except QEngineError:
        return ()
    if phase.blocks is None or phase.blocks.placement.host == "disk":
        return ()
    flops = model.transformer.step_flops(job)
    ours = step_seconds(device, flops, chosen.weight_format, chosen.blocks.streamed_bytes)
    theirs = step_seconds(device, flops, "bf16", phase.blocks.streamed_bytes)
    if ours is None or theirs is None or theirs > LOSSLESS_SLOWDOWN * ours:
        return ()
    return (f"lossless bf16 weights fit as well, at {theirs / ours:.2f}x the time of a step: --weights bf16",)


def _command(model: ModelFacts, job: JobFacts, ceilings: Ceilings, formats: Formats, choices: Choices) -> str:
    words = ["qengine", job.words or _example(job), f"--model {model.label}"]
    if ceilings.vram_bytes is not None:
        words.append(f"--vram {size_text(ceilings.vram_bytes, up=False)}")
    words += [f"--ram {size_text(ceilings.ram_bytes, up=False)}", f"--weights {formats.transformer}"]
    if choices.text_encoder_weights != "auto":
        words.append(f"--text-encoder-weights {choices.text_encoder_weights}")
    if choices.blocks_to_swap is not None:
        words.append(f"--blocks-to-swap {choices.blocks_to_swap}")
    if choices.offload != "auto" and choices.blocks_to_swap is None:
        words.append(f"--offload {choices.offload}")
    if choices.text_encoder_cpu:
        words.append("--text-encoder-cpu")
    if choices.vae_tile is not None:
        words.append(f"--vae-tile {choices.vae_tile}")
    if choices.vae_weights != "bf16":
        words.append(f"--vae-weights {choices.vae_weights}")
    if choices.attention != "sdpa":
        words.append(f"--attn-mode {choices.attention}")
    words += [f"--kernel {op}={name}" for op, name in choices.kernels.items()]
    return " ".join(words)


def _example(job: JobFacts) -> str:
    return 'edit photo.jpg "make it night"' if job.kind == "edit" else 'generate "a red bicycle"'
