"""What each phase of a run holds: weights by placement, activations, and what the device and the process take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...loaders.checkpoint import STAGING_BYTES
from ..formats import QUANTISED
from ..layout import ITEM_BYTES
from ..vae.cut import PROJECTION_CELLS, Cut
from ..vae.memory import decode_bytes, encode_bytes, weight_bytes
from .activations import Linear, language_bytes, modulation_bytes, rows_bytes, step_bytes, vision_bytes
from .budget import Choices
from .facts import DeviceFacts, ModelFacts, Part
from .jobs import JobFacts
from .kernels import attention_of, linear_of
from .placement import Blocks
from .rules import Formats

Items = tuple[tuple[str, int], ...]

MIB = 1 << 20
ALIGNMENT_BYTES = 64 << 10
RING_BYTES = 1 << 30
PROCESS_BYTES = {"cpu": 700 * MIB, "cuda": 2048 * MIB}
"""Host memory of a process with its imports, where it was not measured; with CUDA the driver's part is included."""

GEMM_WORKSPACE_BYTES = 34 * MIB
CONVOLUTION_WORKSPACE_BYTES = 128 * MIB
PREVIEW_CELLS = 32
FRAGMENT_BYTES = 32 * MIB
FRAGMENT_SHARE = 16
NAMES = ("encode", "reference", "denoise", "decode")


@dataclass(frozen=True)
class Need:
    """One phase before anything is placed.

    Attributes:
        name: one of ``NAMES``.
        component: whose weights run.
        device: ``cpu`` or ``cuda``.
        weight_format: of its blocks.
        slab_bytes: of its streamable blocks; empty where nothing streams.
        device_items: on the device beside the blocks and the context.
        host_items: on the host beside streamed slabs and the process.
        mapped: slabs are packed, so a CPU can use them where their file is mapped.
    """

    name: str
    component: str
    device: str
    weight_format: str
    slab_bytes: tuple[int, ...]
    device_items: Items
    host_items: Items
    mapped: bool = False


@dataclass(frozen=True)
class PhasePlan:
    """One phase as planned.

    Attributes:
        name: ``encode``, ``reference``, ``denoise`` or ``decode``.
        component: whose weights run.
        device: ``cpu`` or ``cuda``.
        weight_format: of its blocks.
        blocks: its blocks and their placement; None where nothing streams.
        vram_items: label and bytes of everything on the device; on a CPU, of everything that a ``--vram`` limit counts.
        host_items: the same of host memory.
    """

    name: str
    component: str
    device: str
    weight_format: str
    blocks: Blocks | None
    vram_items: Items
    host_items: Items

    @property
    def vram_bytes(self) -> int:
        """Predicted peak on the device."""
        return sum(size for _, size in self.vram_items)

    @property
    def host_bytes(self) -> int:
        """Predicted peak on the host."""
        return sum(size for _, size in self.host_items)


def ring_bytes(blocks: Blocks) -> int:
    """Host memory through which slabs pass from a file: about 1 GiB, two slabs at least, and no more than there is."""
    largest = max((blocks.slab_bytes[i] for i in blocks.placement.copied), default=0)
    return min(blocks.streamed_bytes, max(2 * largest, RING_BYTES // max(1, largest) * largest))


def host_slab_bytes(blocks: Blocks | None) -> int:
    """Host memory that streamed slabs take."""
    if blocks is None or not blocks.placement.streamed:
        return 0
    sizes = {"arena": blocks.streamed_bytes, "mapped": blocks.mapped_bytes}
    return sizes.get(blocks.placement.host, 0) or ring_bytes(blocks)


def cut_of(device: DeviceFacts, choices: Choices) -> Cut:
    """The VAE's bands: by the kind of device and the chosen tile alone."""
    return Cut.of(device.kind, choices.vae_tile)


def tile_rows(model: ModelFacts, job: JobFacts, cut: Cut) -> int:
    """Pixel rows of the output in one band of the decoder's first level."""
    config = model.vae.config
    rows, columns = job.latent_sizes[0]
    return min(rows, cut.rows(columns, config.dims[-1], config.scale_factor)) * config.scale_factor


def needs(model: ModelFacts, job: JobFacts, device: DeviceFacts, formats: Formats, choices: Choices) -> dict[str, Need]:
    """The phases of a run, in order."""
    config, cut, s = model.vae.config, cut_of(device, choices), ITEM_BYTES[formats.plain]
    made = [_encode(model, job, device, formats, choices)]
    sizes = [(rows * config.scale_factor, columns * config.scale_factor) for rows, columns in job.latent_sizes[1:]]
    side = PROJECTION_CELLS * config.scale_factor
    held = [
        encode_bytes(config, height, width, s, cut, formats.vae) + 4 * config.input_channels * height * width
        for height, width in sizes
    ]
    # the preview's colours: the decoded cells, and their averages in float64
    held.append(decode_bytes(config, side, side, s, cut, formats.vae) + 8 * 4 * config.input_channels * side * side)
    most = max(held)
    made.append(_vae("reference", model, job, device, formats, most))
    made.append(_denoise(model, job, device, formats, choices))
    height, width = (side * config.scale_factor for side in job.latent_sizes[0])
    most = decode_bytes(config, height, width, s, cut, formats.vae)
    # the picture is brought to 8 bits in float32; the preview's colours are fitted to a decoded square of fixed size
    side = PREVIEW_CELLS * config.scale_factor
    fitted = decode_bytes(config, side, side, s, cut, formats.vae) + 5 * 4 * config.input_channels * side * side
    most = max(most, 4 * 4 * config.input_channels * height * width, fitted)
    made.append(_vae("decode", model, job, device, formats, most))
    return {need.name: replace(need, mapped=need.weight_format in QUANTISED) for need in made}


def vae_weights(model: ModelFacts, formats: Formats) -> int:
    """Bytes of the VAE's weights on the device."""
    s = ITEM_BYTES[formats.plain]
    return (
        sum(weight_bytes(model.vae.config, part, s, formats.vae) for part in ("encoder", "decoder")) + ALIGNMENT_BYTES
    )


def _encode(model: ModelFacts, job: JobFacts, device: DeviceFacts, formats: Formats, choices: Choices) -> Need:
    s, encoder = ITEM_BYTES[formats.plain], model.encoder
    kind = "cpu" if choices.text_encoder_cpu else device.kind
    linear = linear_of("text_encoder", device, formats, choices)
    items: list[tuple[str, int]] = []
    if job.patches:
        tower = sum(encoder.vision_stack.slab_bytes("bf16", formats.plain))
        items.append(("vision tower", tower + encoder.vision_ends_parameters * s + 2 * ALIGNMENT_BYTES))
    items.append(("ends", encoder.hidden * s + encoder.head_dim * 4 + ALIGNMENT_BYTES))
    most = max(
        language_bytes(encoder, job, s, linear),
        vision_bytes(encoder, job, s, Linear("torch", s)),
    )
    items += _activations(kind, most, 0)
    slabs = encoder.stack.slab_bytes(formats.encoder, formats.plain)
    return _need("encode", encoder.part, kind, formats.encoder, slabs, items, formats)


def _denoise(model: ModelFacts, job: JobFacts, device: DeviceFacts, formats: Formats, choices: Choices) -> Need:
    s, transformer = ITEM_BYTES[formats.plain], model.transformer
    linear = linear_of("transformer", device, formats, choices)
    step = step_bytes(transformer, job, s, linear, attention_of(device, formats, choices))
    most = max(step, modulation_bytes(transformer, job))
    rows = rows_bytes(transformer, job, s)
    items = [("ends", transformer.ends_parameters * s + ALIGNMENT_BYTES), ("modulation rows", rows)]
    kept = rows_bytes(transformer, job, 4)
    if device.kind == "cpu" and s < 4:
        items.append(("modulation rows, float32", kept))
    items += _activations(device.kind, most, 0)
    slabs = transformer.stack.slab_bytes(formats.transformer, formats.plain)
    need = _need("denoise", transformer.part, device.kind, formats.transformer, slabs, items, formats)
    if device.kind == "cpu":
        return need
    return replace(need, host_items=(*need.host_items, ("modulation rows, float32", kept)))


def _vae(name: str, model: ModelFacts, job: JobFacts, device: DeviceFacts, formats: Formats, activations: int) -> Need:
    items = [("weights", vae_weights(model, formats))]
    # latents of the target and of all references, packed and unpacked, live through these phases
    held = sum(rows * columns for rows, columns in job.latent_sizes) * model.vae.config.z_dim * 3 * 4
    items += _activations(device.kind, activations + held, CONVOLUTION_WORKSPACE_BYTES)
    return _need(name, model.vae.part, device.kind, formats.vae, (), items, formats)


def _activations(kind: str, nbytes: int, convolution: int) -> list[tuple[str, int]]:
    items = [("activations", nbytes)]
    if kind == "cuda":
        items.append(("workspace", GEMM_WORKSPACE_BYTES + convolution))
        items.append(("allocator", FRAGMENT_BYTES + nbytes // FRAGMENT_SHARE))
    return items


def _need(
    name: str,
    part: Part,
    kind: str,
    weight_format: str,
    slabs: tuple[int, ...],
    items: list[tuple[str, int]],
    formats: Formats,
) -> Need:
    staged = min(part.nbytes, STAGING_BYTES + part.largest_bytes)
    loading = max(staged, part.largest_bytes) + max(slabs, default=0)
    casts = weight_format != "bf16" or set(part.dtypes) != {formats.plain}
    if kind == "cpu" and casts:
        items = [*items, ("loading", loading)]
    return Need(
        name,
        part.name,
        kind,
        weight_format,
        slabs,
        tuple(items),
        (("loading", loading),) if kind != "cpu" else (),
    )


def process_bytes(device: DeviceFacts) -> int:
    """Host memory that the process takes before any weight."""
    measured: Mapping[str, int] = device.probes
    return measured.get("process_bytes", PROCESS_BYTES[device.kind])
