"""What each phase of a run holds: weights by placement, activations, and what the device and the process take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...loaders.checkpoint import STAGING_BYTES
from ..formats import QUANTISED
from ..layout import ITEM_BYTES
from ..vae.cut import PROJECTION_CELLS, Cut
from .budget import Choices
from .facts import ALIGNMENT_BYTES, DeviceFacts, Items, Part
from .jobs import JobFacts
from .kernels import attention_of, linear_of
from .model import ModelFacts
from .placement import Blocks
from .rules import Formats

MIB = 1 << 20
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


def cut_of(model: ModelFacts, device: DeviceFacts, choices: Choices) -> Cut:
    """The VAE's bands: by its kind, the kind of device and the chosen tile alone."""
    return model.vae.cut(device.kind, choices.vae_tile)


def tile_rows(model: ModelFacts, job: JobFacts, cut: Cut) -> int:
    """Pixel rows of the output in one band of the decoder's first level."""
    rows, columns = job.latent_sizes[0]
    scale = model.vae.scale_factor
    return min(rows, cut.rows(columns, model.vae.deepest, scale)) * scale


def needs(model: ModelFacts, job: JobFacts, device: DeviceFacts, formats: Formats, choices: Choices) -> dict[str, Need]:
    """The phases of a run, in order."""
    vae, cut, s = model.vae, cut_of(model, device, choices), ITEM_BYTES[formats.plain]
    made = [_encode(model, job, device, formats, choices)]
    sizes = [(rows * vae.scale_factor, columns * vae.scale_factor) for rows, columns in job.latent_sizes]
    side = PROJECTION_CELLS * vae.scale_factor
    held = [
        vae.encode_bytes(size, s, cut, formats.vae) + 4 * vae.input_channels * size[0] * size[1] for size in sizes[1:]
    ]
    # the preview's colours: the decoded cells, and their averages in float64
    held.append(vae.decode_bytes((side, side), s, cut, formats.vae) + 8 * 4 * vae.input_channels * side * side)
    made.append(_vae("reference", model, job, device, formats, max(held)))
    made.append(_denoise(model, job, device, formats, choices))
    height, width = sizes[0]
    most = vae.decode_bytes(sizes[0], s, cut, formats.vae)
    # the picture is brought to 8 bits in float32; the preview's colours are fitted to a decoded square of fixed size
    side = PREVIEW_CELLS * vae.scale_factor
    fitted = vae.decode_bytes((side, side), s, cut, formats.vae) + 5 * 4 * vae.input_channels * side * side
    most = max(most, 4 * 4 * vae.input_channels * height * width, fitted)
    made.append(_vae("decode", model, job, device, formats, most))
    return {need.name: replace(need, mapped=need.weight_format in QUANTISED) for need in made}


def vae_weights(model: ModelFacts, formats: Formats) -> int:
    """Bytes of the VAE's weights on the device."""
    return model.vae.weights_bytes(ITEM_BYTES[formats.plain], formats.vae) + ALIGNMENT_BYTES


def _encode(model: ModelFacts, job: JobFacts, device: DeviceFacts, formats: Formats, choices: Choices) -> Need:
    s, encoder = ITEM_BYTES[formats.plain], model.encoder
    kind = "cpu" if choices.text_encoder_cpu else device.kind
    if not job.encodes:
        return Need("encode", encoder.part.name, kind, formats.encoder, (), (), ())
    linear = linear_of("text_encoder", device, formats, choices)
    items = [*encoder.items(job, formats.plain), *activation_items(kind, encoder.encode_bytes(job, s, linear), 0)]
    slabs = encoder.stack.slab_bytes(formats.encoder, formats.plain)
    return need_of("encode", encoder.part, kind, formats.encoder, slabs, items, formats)


def _denoise(model: ModelFacts, job: JobFacts, device: DeviceFacts, formats: Formats, choices: Choices) -> Need:
    s, transformer = ITEM_BYTES[formats.plain], model.transformer
    linear = linear_of("transformer", device, formats, choices)
    most = transformer.denoise_bytes(job, s, linear, attention_of(device, formats, choices))
    rows = transformer.rows_bytes(job, s)
    items = [("ends", transformer.ends_parameters * s + ALIGNMENT_BYTES), ("modulation rows", rows)]
    kept = transformer.rows_bytes(job, 4)
    if device.kind == "cpu" and s < 4:
        items.append(("modulation rows, float32", kept))
    items += activation_items(device.kind, most, 0)
    slabs = transformer.stack.slab_bytes(formats.transformer, formats.plain)
    need = need_of("denoise", transformer.part, device.kind, formats.transformer, slabs, items, formats)
    if device.kind == "cpu":
        return need
    once = transformer.once_bytes(formats.plain)
    read = (("caption branch, once per prompt", once),) if once else ()
    return replace(need, host_items=(*need.host_items, ("modulation rows, float32", kept), *read))


def _vae(name: str, model: ModelFacts, job: JobFacts, device: DeviceFacts, formats: Formats, activations: int) -> Need:
    items = [("weights", vae_weights(model, formats))]
    # latents of the target and of all references, packed and unpacked, live through these phases
    held = sum(rows * columns for rows, columns in job.latent_sizes) * model.vae.z_dim * 3 * 4
    items += activation_items(device.kind, activations + held, CONVOLUTION_WORKSPACE_BYTES)
    return need_of(name, model.vae.part, device.kind, formats.vae, (), items, formats)


def activation_items(kind: str, nbytes: int, convolution: int) -> list[tuple[str, int]]:
    """Activations and, on a card, the workspaces of libraries and what the allocator loses between tensors."""
    items = [("activations", nbytes)]
    if kind == "cuda":
        items.append(("workspace", GEMM_WORKSPACE_BYTES + convolution))
        items.append(("allocator", FRAGMENT_BYTES + nbytes // FRAGMENT_SHARE))
    return items


def need_of(
    name: str,
    part: Part,
    kind: str,
    weight_format: str,
    slabs: tuple[int, ...],
    items: list[tuple[str, int]],
    formats: Formats,
) -> Need:
    """A phase, with what is held while its weights are read."""
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
