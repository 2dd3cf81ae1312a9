"""What a plan knows of the device and of the model: plain numbers, taken from headers and probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from ..formats import slab_specs
from ..layout import SlabLayout

if TYPE_CHECKING:
    from ...loaders.component import Component
    from ..vae.cut import Cut
    from .activations import Linear
    from .jobs import JobFacts

Shape = tuple[int, ...]
Items = tuple[tuple[str, int], ...]
NO_PROBES: Mapping[str, Any] = MappingProxyType({})

ALIGNMENT_BYTES = 64 << 10
"""What a part takes beyond its numbers: small tensors are rounded up each."""

NEVER_LOADED = ("language_model.embed_tokens.weight", "lm_head.weight")
"""Rows of the embedding table are gathered from the file, and the language head is never used."""


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """A device and its host, as measured before the plan is made.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        name: as the driver says it.
        architecture: compute capability as one number (86 is 8.6); None on a CPU.
        total_bytes: memory of the device; on a CPU the host's.
        free_bytes: of it, what could be had now.
        context_bytes: what the driver takes for a process before its first tensor.
        host_total_bytes: memory of the host.
        host_free_bytes: of it, what could be had now.
        link_bytes_per_second: measured host-to-device bandwidth.
        probes: further results of start-up probes: ``tflops`` by weight format, ``process_bytes`` (host memory that
            imports take).
        unusable: why an implementation cannot be used here, by name: ``triton``, ``native``, ``scaled_mm``, ``int_mm``,
            kernels and libraries of attention. What is not named can.
    """

    kind: str
    name: str = ""
    architecture: int | None = None
    total_bytes: int
    free_bytes: int
    context_bytes: int = 0
    host_total_bytes: int
    host_free_bytes: int
    link_bytes_per_second: float | None = None
    probes: Mapping[str, Any] = field(default_factory=lambda: NO_PROBES)
    unusable: Mapping[str, str] = field(default_factory=lambda: NO_PROBES)


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind in execution order.

    Attributes:
        blocks: per block, name inside the block to shape.
        keep: matrices that stay plain in every weight format.
    """

    blocks: tuple[Mapping[str, Shape], ...]
    keep: frozenset[str] = frozenset()

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(prod(shape) for block in self.blocks for shape in block.values())

    def slab_bytes(self, weight_format: str, plain: str) -> tuple[int, ...]:
        """Size of every block's slab in a weight format; ``plain`` is the safetensors name of the compute dtype."""
        known: dict[tuple[tuple[str, Shape], ...], int] = {}
        sizes = []
        for block in self.blocks:
            key = tuple(block.items())
            if key not in known:
                known[key] = SlabLayout.of(slab_specs(block, weight_format, plain, self.keep)).nbytes
            sizes.append(known[key])
        return tuple(sizes)


@dataclass(frozen=True)
class Part:
    """One component as stored.

    Attributes:
        name: ``transformer``, ``text_encoder`` or ``vae``.
        parameters: number of stored parameters.
        nbytes: of the stored tensors.
        dtypes: safetensors names of the stored dtypes.
        largest_bytes: of the largest tensor in float32 that is ever read whole, which packing holds.
    """

    name: str
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]
    largest_bytes: int

    @classmethod
    def of(cls, component: Component) -> Part:
        """Counts of a component's headers."""
        infos = component.checkpoint.tensors.values()
        counts = {info.name: prod(info.shape) for info in infos}
        return cls(
            component.name,
            sum(counts.values()),
            component.checkpoint.nbytes,
            tuple(sorted({info.dtype for info in infos})),
            4 * max((count for name, count in counts.items() if name not in NEVER_LOADED), default=0),
        )


class TransformerFacts(Protocol):
    """What a plan asks of a diffusion transformer."""

    @property
    def part(self) -> Part:
        """As stored."""
        ...

    @property
    def stack(self) -> Stack:
        """The blocks that a step visits."""
        ...

    @property
    def ops(self) -> tuple[str, ...]:
        """Ops of a step that have more than one implementation, beside linear layers."""
        ...

    @property
    def ends_parameters(self) -> int:
        """Parameters that stay on the device beside the blocks."""
        ...

    @property
    def used_parameters(self) -> int:
        """Parameters that a run reads."""
        ...

    def rows_bytes(self, job: JobFacts, item: int) -> int:
        """Modulation rows of a run, in numbers of ``item`` bytes."""
        ...

    def denoise_bytes(self, job: JobFacts, s: int, linear: Linear, attention: str) -> int:
        """Most bytes beside weights, ends and rows that anything between the first prompt and the last step takes."""
        ...

    def once_bytes(self, plain: str) -> int:
        """Host memory for what is read once per prompt and freed."""
        ...

    def step_flops(self, job: JobFacts) -> float:
        """Operations of one step, all branches."""
        ...


class EncoderFacts(Protocol):
    """What a plan asks of a text encoder."""

    @property
    def part(self) -> Part:
        """As stored."""
        ...

    @property
    def stack(self) -> Stack:
        """The decoder layers that run."""
        ...

    def used_parameters(self, job: JobFacts) -> int:
        """Parameters that the request reads."""
        ...

    def items(self, job: JobFacts, plain: str) -> Items:
        """What stays on the device beside the layers: label and bytes."""
        ...

    def encode_bytes(self, job: JobFacts, s: int, linear: Linear) -> int:
        """Most bytes beside weights while prompts are encoded."""
        ...


class VaeFacts(Protocol):
    """What a plan asks of a VAE."""

    @property
    def part(self) -> Part:
        """As stored."""
        ...

    @property
    def used_parameters(self) -> int:
        """Parameters that single images meet."""
        ...

    @property
    def scale_factor(self) -> int:
        """Pixels per latent cell along one side."""
        ...

    @property
    def z_dim(self) -> int:
        """Channels of a latent."""
        ...

    @property
    def input_channels(self) -> int:
        """Channels of a picture."""
        ...

    @property
    def deepest(self) -> int:
        """Channels of the smallest maps."""
        ...

    def cut(self, kind: str, tile_pixels: int | None) -> Cut:
        """The bands on a kind of device."""
        ...

    def weights_bytes(self, s: int, weight_format: str) -> int:
        """Both halves as loaded, in numbers of ``s`` bytes."""
        ...

    def encode_bytes(self, size: tuple[int, int], s: int, cut: Cut, weight_format: str) -> int:
        """Peak of encoding a picture of (height, width) pixels, beside the weights."""
        ...

    def decode_bytes(self, size: tuple[int, int], s: int, cut: Cut, weight_format: str) -> int:
        """Peak of decoding a picture of (height, width) pixels, beside the weights."""
        ...


def stack_of(shapes: Mapping[str, Shape], root: str, count: int, keep: frozenset[str] = frozenset()) -> Stack:
    """Blocks ``0 .. count - 1`` of those under a root of a checkpoint; further ones are left out."""
    blocks: list[dict[str, Shape]] = [{} for _ in range(count)]
    for name, shape in shapes.items():
        if name.startswith(root):
            index, _, inner = name.removeprefix(root).partition(".")
            if int(index) < count:
                blocks[int(index)][inner] = shape
    return Stack(tuple(blocks), keep)


def shapes_of(component: Component) -> dict[str, Shape]:
    """Name to shape of a component's tensors."""
    return {name: info.shape for name, info in component.checkpoint.tensors.items()}


def count_under(shapes: Mapping[str, Shape], *roots: str) -> int:
    """Parameters whose names begin with one of the roots."""
    return sum(prod(shape) for name, shape in shapes.items() if name.startswith(roots))
