"""The plan of Qwen3-VL as an extractor of hidden states: tower, then decoder layers as far as the deepest one asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...errors import PlanError
from ...kernels.dispatch import definition
from ..formats import QUANTISED
from ..layout import ITEM_BYTES
from .activations import CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS, Linear
from .budget import Budget, Choices, size_text
from .choose import Ceilings, Kept, fits, least, phase_of, place
from .facts import DeviceFacts, Part
from .make import ceilings_of, hundredth
from .phases import Need, PhasePlan, activation_items, need_of
from .rules import Formats, pick_formats
from .vl import Extraction, ExtractorFacts, layer_bytes, tower_bytes


@dataclass(frozen=True)
class ExtractorPlan:
    """How an extraction is carried out.

    Attributes:
        label: the folder.
        device: what it was made for.
        formats: weight format of the decoder layers as ``encoder``, and the compute dtype.
        kernels: what computes; always the definitions, since hidden states are exchanged between machines.
        phases: ``see``, the vision tower, where there are pictures, and ``read``, the decoder layers.
        alone: tower and layers are never loaded together.
        depth: decoder layers that are held.
        ceilings: what may be used at most.
        parts: the model as stored.
        used_parameters: parameters that the extraction reads.
        notes: every decision that was not the user's.
        command: a line to paste that asks for this plan.
    """

    label: str
    device: DeviceFacts
    formats: Formats
    kernels: Mapping[str, str]
    phases: tuple[PhasePlan, ...]
    alone: bool
    depth: int
    ceilings: Ceilings
    parts: tuple[Part, ...]
    used_parameters: Mapping[str, int]
    notes: tuple[str, ...]
    command: str

    def phase(self, name: str) -> PhasePlan:
        """The phase of that name."""
        return next(phase for phase in self.phases if phase.name == name)

    @property
    def vram_bytes(self) -> int:
        """Predicted peak on the device."""
        return max(phase.vram_bytes for phase in self.phases)

    @property
    def host_bytes(self) -> int:
        """Predicted peak on the host."""
        return max(phase.host_bytes for phase in self.phases)


def plan_extraction(
    facts: ExtractorFacts, job: Extraction, budget: Budget, device: DeviceFacts, choices: Choices
) -> ExtractorPlan:
    """Place the decoder layers: all with the tower beside them, else after it, the fewest streamed that fit.

    Args:
        facts: the model's.
        job: what is to be extracted.
        budget: ceilings.
        device: where it runs.
        choices: ``text_encoder_weights`` (of the layers), ``offload``; what concerns other parts is ignored.

    Raises:
        PlanError: the ceilings cannot be met; the message says the least that would do.
    """
    notes = list(job.chat.notes)
    formats = pick_formats(device, job.chat, replace(choices, weights=choices.text_encoder_weights))
    ceilings = ceilings_of(budget, device, notes)
    linear = linear_by_definition(device, formats)
    together = needs(facts, job, device, formats, linear, alone=False)
    phases = _together(together, facts, device, ceilings, choices, formats)
    alone = phases is None
    if phases is None:
        phases = _apart(facts, job, device, ceilings, choices, formats, linear)
        if job.chat.patches:
            notes.append("the vision tower is freed before the decoder layers are read, and they before it")
    if choices.text_encoder_weights == "auto":
        why = "a CPU" if device.kind == "cpu" else f"sm{device.architecture}"
        notes.append(f"weights {formats.encoder}: the rule for {why}, whatever memory is free")
    seen = facts.vision_stack.parameters + facts.tower_parameters + facts.positions if job.chat.patches else 0
    layers = replace(facts.stack, blocks=facts.stack.blocks[: job.depth]).parameters
    return ExtractorPlan(
        label=facts.label,
        device=device,
        formats=formats,
        kernels={"vl.linear": linear.kernel, "vl.attention": "sdpa"},
        phases=tuple(phases),
        alone=alone,
        depth=job.depth,
        ceilings=ceilings,
        parts=(facts.part,),
        used_parameters={"vl": seen + layers + facts.hidden},
        notes=tuple(notes),
        command=_command(facts, job, ceilings, formats, device),
    )


def linear_by_definition(device: DeviceFacts, formats: Formats) -> Linear:
    """The kernel of the decoder layers' linear layers with its scratch."""
    name = definition(f"linear_{formats.encoder}") if formats.encoder in QUANTISED else "torch"
    chunk = DEVICE_CHUNK_ELEMENTS if device.kind == "cuda" else CHUNK_ELEMENTS
    return Linear(name, ITEM_BYTES[formats.plain], chunk)


def needs(
    facts: ExtractorFacts, job: Extraction, device: DeviceFacts, formats: Formats, linear: Linear, *, alone: bool
) -> list[Need]:
    """The phases of an extraction before anything is placed."""
    s, plain, kind = ITEM_BYTES[formats.plain], formats.plain, device.kind
    tower = ("vision tower", facts.tower_bytes(plain))
    made = []
    if job.chat.patches:
        items = [tower, *activation_items(kind, tower_bytes(facts, job, s), 0)]
        made.append(need_of("see", facts.part, kind, "bf16", (), items, formats))
    items = [("ends", facts.ends_bytes(plain)), *activation_items(kind, layer_bytes(facts, job, s, linear), 0)]
    items = [*([] if alone or not job.chat.patches else [tower]), *items]
    slabs = facts.stack.slab_bytes(formats.encoder, plain)[: job.depth]
    made.append(need_of("read", facts.part, kind, formats.encoder, slabs, items, formats))
    return [replace(need, mapped=need.weight_format in QUANTISED) for need in made]


def _together(
    made: Sequence[Need],
    facts: ExtractorFacts,
    device: DeviceFacts,
    ceilings: Ceilings,
    choices: Choices,
    formats: Formats,
) -> list[PhasePlan] | None:
    """Tower and all layers loaded at once; None where that does not fit or some layers are to be streamed."""
    try:
        read = place(made[-1], device, ceilings, choices)
    except PlanError:
        return None
    if read.blocks is None or read.blocks.placement.copied:
        return None
    kept = Kept("decoder layers", read.blocks.device_bytes + facts.ends_bytes(formats.plain), 0)
    phases = [phase_of(need, device, None, [kept]) for need in made[:-1]]
    return [*phases, read] if all(fits(phase, ceilings) for phase in phases) else None


def _apart(  # noqa: PLR0913 (facts of the whole decision)
    facts: ExtractorFacts,
    job: Extraction,
    device: DeviceFacts,
    ceilings: Ceilings,
    choices: Choices,
    formats: Formats,
    linear: Linear,
) -> list[PhasePlan]:
    made = needs(facts, job, device, formats, linear, alone=True)
    phases, refusals = [], []
    for need in made:
        try:
            phases.append(place(need, device, ceilings, choices))
        except PlanError as error:
            refusals.append(error)
    if not refusals:
        return phases
    needed = [least(need, device, ceilings, choices) for need in made]
    vram = None if ceilings.vram_bytes is None else hundredth(max(each[0] for each in needed))
    enough = Ceilings(vram, hundredth(max(each[1] for each in needed)))
    command = _command(facts, job, enough, formats, device)
    raise PlanError(refusals[0].message, hint=f"this fits with the least: {command}")


def _command(facts: ExtractorFacts, job: Extraction, ceilings: Ceilings, formats: Formats, device: DeviceFacts) -> str:
    words = ["qengine", job.words or "extract --image photo.jpg -o job.qx", f"--vl-model {facts.label}"]
    words += [f"--vl-weights {formats.encoder}", f"--vl-device {device.kind}"]
    words.append(f"--vl-dtype {'float32' if formats.plain == 'F32' else 'bfloat16'}")
    if ceilings.vram_bytes is not None:
        words.append(f"--vram {size_text(ceilings.vram_bytes, up=False)}")
    return " ".join([*words, f"--ram {size_text(ceilings.ram_bytes, up=False)}"])
