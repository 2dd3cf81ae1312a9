"""What a plan knows of the device and of the model: plain numbers, taken from headers and probes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ...loaders.shapes import text_config, vision_config
from ..formats import DEAD_IN_LAST_BLOCK, slab_specs
from ..layout import SlabLayout
from ..vae.config import VaeConfig, expected_shapes

if TYPE_CHECKING:
    from ...loaders.component import Component
    from ...loaders.source import ModelSource

Shape = tuple[int, ...]
NO_PROBES: Mapping[str, Any] = MappingProxyType({})

NOT_IN_SLABS = ("img_mod.", "txt_mod.")
"""Parameters of a transformer block that the modulation table takes the place of."""

TIMED_DIMENSIONS = 5

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


@dataclass(frozen=True)
class TransformerFacts:
    """The transformer: geometry, its blocks without modulation and dead tensors, and the parameters of its ends."""

    part: Part
    stack: Stack
    dim: int
    head_dim: int
    joint: int
    in_channels: int
    ends_parameters: int
    modulation_parameters: int


@dataclass(frozen=True)
class EncoderFacts:
    """Qwen2.5-VL without embedding table and language head: decoder layers and vision tower.

    Attributes:
        width: columns of the queries; ``kv_width`` of keys and values.
        patch_values: numbers in one patch.
    """

    part: Part
    stack: Stack
    hidden: int
    ffn: int
    width: int
    kv_width: int
    head_dim: int
    vision_stack: Stack
    vision_ends_parameters: int
    vision_hidden: int
    vision_ffn: int
    vision_heads: int
    patch_pixels: int
    patch_values: int
    merge: int


@dataclass(frozen=True)
class VaeFacts:
    """The image VAE: its config, from which `vae.memory` tells its bytes."""

    part: Part
    config: VaeConfig

    @property
    def used_parameters(self) -> int:
        """Parameters that single images meet: the last temporal tap of every convolution."""
        shapes = expected_shapes(self.config)
        kept = (shape for name, shape in shapes.items() if ".time_conv." not in name)
        return sum(prod(shape) // (shape[2] if len(shape) == TIMED_DIMENSIONS else 1) for shape in kept)


@dataclass(frozen=True)
class ModelFacts:
    """A model in numbers; :meth:`of` takes them from headers and configs alone.

    Attributes:
        label: as the user wrote it.
        variant: which Qwen-Image model it is.
        transformer: the diffusion transformer.
        encoder: the text encoder.
        vae: the image VAE.
    """

    label: str
    variant: str
    transformer: TransformerFacts
    encoder: EncoderFacts
    vae: VaeFacts

    @classmethod
    def of(cls, source: ModelSource, keep: Collection[str] = ()) -> ModelFacts:
        """Facts of an opened model.

        Args:
            source: the model.
            keep: matrices of a transformer block that stay plain in every weight format.
        """
        return cls(
            source.label,
            source.variant,
            _transformer(source.transformer, frozenset(keep)),
            _encoder(source.text_encoder),
            VaeFacts(Part.of(source.vae), VaeConfig.parse(source.vae.config)),
        )

    @cached_property
    def parts(self) -> tuple[Part, Part, Part]:
        """The components as stored."""
        return self.transformer.part, self.encoder.part, self.vae.part

    @property
    def multiple(self) -> int:
        """Pixels per token side."""
        return 2 * self.vae.config.scale_factor


def _stack(shapes: Mapping[str, Shape], root: str, count: int, keep: frozenset[str] = frozenset()) -> Stack:
    blocks: list[dict[str, Shape]] = [{} for _ in range(count)]
    for name, shape in shapes.items():
        if name.startswith(root):
            index, _, inner = name.removeprefix(root).partition(".")
            blocks[int(index)][inner] = shape
    return Stack(tuple(blocks), keep)


def _shapes(component: Component) -> dict[str, Shape]:
    return {name: info.shape for name, info in component.checkpoint.tensors.items()}


def _total(shapes: Mapping[str, Shape], *roots: str) -> int:
    return sum(prod(shape) for name, shape in shapes.items() if name.startswith(roots))


def _transformer(component: Component, keep: frozenset[str]) -> TransformerFacts:
    config, shapes = component.config, _shapes(component)
    whole = _stack(shapes, "transformer_blocks.", config["num_layers"])
    last = len(whole.blocks) - 1
    used = tuple(
        {
            name: shape
            for name, shape in block.items()
            if not name.startswith(NOT_IN_SLABS) and not (i == last and name in DEAD_IN_LAST_BLOCK)
        }
        for i, block in enumerate(whole.blocks)
    )
    modulation = sum(
        prod(shape) for block in whole.blocks for name, shape in block.items() if name.startswith(NOT_IN_SLABS)
    )
    return TransformerFacts(
        part=Part.of(component),
        stack=Stack(used, keep),
        dim=config["attention_head_dim"] * config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        joint=config["joint_attention_dim"],
        in_channels=config["in_channels"],
        ends_parameters=_total(shapes, "img_in.", "txt_in.", "txt_norm.", "proj_out."),
        modulation_parameters=modulation + _total(shapes, "norm_out.", "time_text_embed."),
    )


def _encoder(component: Component) -> EncoderFacts:
    shapes, text, vision = _shapes(component), text_config(component.config), vision_config(component.config)
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    patch = vision["patch_size"]
    return EncoderFacts(
        part=Part.of(component),
        stack=_stack(shapes, "language_model.layers.", text["num_hidden_layers"]),
        hidden=text["hidden_size"],
        ffn=text["intermediate_size"],
        width=head * text["num_attention_heads"],
        kv_width=head * text["num_key_value_heads"],
        head_dim=head,
        vision_stack=_stack(shapes, "visual.blocks.", vision["depth"]),
        vision_ends_parameters=_total(shapes, "visual.merger.", "visual.patch_embed."),
        vision_hidden=vision["hidden_size"],
        vision_ffn=vision["intermediate_size"],
        vision_heads=vision["num_heads"],
        patch_pixels=patch,
        patch_values=vision["in_channels"] * vision["temporal_patch_size"] * patch * patch,
        merge=vision["spatial_merge_size"],
    )
