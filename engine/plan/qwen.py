"""What a plan knows of Qwen-Image and its editors: transformer, Qwen2.5-VL and the image VAE, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ...loaders.shapes import text_config, vision_config
from ..formats import DEAD_IN_LAST_BLOCK
from ..layout import ITEM_BYTES
from ..vae.config import VaeConfig, expected_shapes
from ..vae.cut import Cut
from ..vae.memory import decode_bytes, encode_bytes, weight_bytes
from .activations import Linear, language_bytes, modulation_bytes, rows_bytes, step_bytes, vision_bytes
from .facts import ALIGNMENT_BYTES, Items, Part, Stack, count_under, shapes_of, stack_of

if TYPE_CHECKING:
    from ...loaders.component import Component
    from .jobs import JobFacts

NOT_IN_SLABS = ("img_mod.", "txt_mod.")
"""Parameters of a transformer block that the modulation table takes the place of."""

TIMED_DIMENSIONS = 5


@dataclass(frozen=True)
class QwenTransformer:
    """The transformer: geometry, its blocks without modulation and dead tensors, and the parameters of its ends."""

    part: Part
    stack: Stack
    dim: int
    head_dim: int
    joint: int
    in_channels: int
    ends_parameters: int
    ops: tuple[str, ...] = ("attention", "modulate", "rope", "guidance")

    @property
    def used_parameters(self) -> int:
        """Blocks and ends; modulation is read as rows."""
        return self.stack.parameters + self.ends_parameters

    def rows_bytes(self, job: JobFacts, item: int) -> int:
        """See :func:`activations.rows_bytes`."""
        return rows_bytes(self, job, item)

    def denoise_bytes(self, job: JobFacts, s: int, linear: Linear, attention: str) -> int:
        """The larger of a step and of computing the modulation rows."""
        return max(step_bytes(self, job, s, linear, attention), modulation_bytes(self, job))

    def once_bytes(self, plain: str) -> int:
        """Nothing: prompt embeddings go in as they are."""
        return 0

    def step_flops(self, job: JobFacts) -> float:
        """``blocks * (24 d^2 J + 4 J^2 d)`` summed over the branches, with J tokens in each."""
        image = job.target_tokens + job.reference_tokens
        joints = [image + text for text in job.text_tokens]
        d = self.dim
        return float(len(self.stack.blocks) * sum(24 * d * d * joint + 4 * joint * joint * d for joint in joints))


@dataclass(frozen=True)
class QwenEncoder:
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
    patch_values: int
    merge: int

    def used_parameters(self, job: JobFacts) -> int:
        """Layers and final norm, and the vision tower where there are pictures."""
        seen = self.vision_stack.parameters + self.vision_ends_parameters if job.patches else 0
        return self.stack.parameters + self.hidden + seen

    def items(self, job: JobFacts, plain: str) -> Items:
        """The vision tower, where there are pictures, and the final norm with the rotary frequencies."""
        s = ITEM_BYTES[plain]
        ends = ("ends", self.hidden * s + self.head_dim * 4 + ALIGNMENT_BYTES)
        if not job.patches:
            return (ends,)
        tower = sum(self.vision_stack.slab_bytes("bf16", plain))
        return ("vision tower", tower + self.vision_ends_parameters * s + 2 * ALIGNMENT_BYTES), ends

    def encode_bytes(self, job: JobFacts, s: int, linear: Linear) -> int:
        """The larger of the decoder layers and of the vision tower, whose layers are never quantised."""
        return max(language_bytes(self, job, s, linear), vision_bytes(self, job, s, Linear("torch", s)))


@dataclass(frozen=True)
class QwenVae:
    """The image VAE: its config, from which `vae.memory` tells its bytes."""

    part: Part
    config: VaeConfig

    @property
    def scale_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return self.config.scale_factor

    @property
    def z_dim(self) -> int:
        """Channels of a latent."""
        return self.config.z_dim

    @property
    def input_channels(self) -> int:
        """Channels of a picture."""
        return self.config.input_channels

    @property
    def deepest(self) -> int:
        """Channels of the smallest maps."""
        return self.config.dims[-1]

    def cut(self, kind: str, tile_pixels: int | None) -> Cut:
        """The bands on a kind of device."""
        return Cut.of(kind, tile_pixels)

    def weights_bytes(self, s: int, weight_format: str) -> int:
        """Both halves as loaded."""
        return sum(weight_bytes(self.config, part, s, weight_format) for part in ("encoder", "decoder"))

    def encode_bytes(self, size: tuple[int, int], s: int, cut: Cut, weight_format: str) -> int:
        """Peak of encoding a picture of (height, width) pixels."""
        return encode_bytes(self.config, *size, s, cut, weight_format)

    def decode_bytes(self, size: tuple[int, int], s: int, cut: Cut, weight_format: str) -> int:
        """Peak of decoding a picture of (height, width) pixels."""
        return decode_bytes(self.config, *size, s, cut, weight_format)

    @property
    def used_parameters(self) -> int:
        """Parameters that single images meet: the last temporal tap of every convolution."""
        shapes = expected_shapes(self.config)
        kept = (shape for name, shape in shapes.items() if ".time_conv." not in name)
        return sum(prod(shape) // (shape[2] if len(shape) == TIMED_DIMENSIONS else 1) for shape in kept)


def qwen_transformer(component: Component, keep: frozenset[str]) -> QwenTransformer:
    """Facts of a transformer; ``keep`` names the matrices of a block that stay plain in every weight format."""
    config, shapes = component.config, shapes_of(component)
    whole = stack_of(shapes, "transformer_blocks.", config["num_layers"])
    last = len(whole.blocks) - 1
    used = tuple(
        {
            name: shape
            for name, shape in block.items()
            if not name.startswith(NOT_IN_SLABS) and not (i == last and name in DEAD_IN_LAST_BLOCK)
        }
        for i, block in enumerate(whole.blocks)
    )
    return QwenTransformer(
        part=Part.of(component),
        stack=Stack(used, keep),
        dim=config["attention_head_dim"] * config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        joint=config["joint_attention_dim"],
        in_channels=config["in_channels"],
        ends_parameters=count_under(shapes, "img_in.", "txt_in.", "txt_norm.", "proj_out."),
    )


def qwen_encoder(component: Component) -> QwenEncoder:
    """Facts of a text encoder."""
    shapes, text, vision = shapes_of(component), text_config(component.config), vision_config(component.config)
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    patch = vision["patch_size"]
    return QwenEncoder(
        part=Part.of(component),
        stack=stack_of(shapes, "language_model.layers.", text["num_hidden_layers"]),
        hidden=text["hidden_size"],
        ffn=text["intermediate_size"],
        width=head * text["num_attention_heads"],
        kv_width=head * text["num_key_value_heads"],
        head_dim=head,
        vision_stack=stack_of(shapes, "visual.blocks.", vision["depth"]),
        vision_ends_parameters=count_under(shapes, "visual.merger.", "visual.patch_embed."),
        vision_hidden=vision["hidden_size"],
        vision_ffn=vision["intermediate_size"],
        vision_heads=vision["num_heads"],
        patch_values=vision["in_channels"] * vision["temporal_patch_size"] * patch * patch,
        merge=vision["spatial_merge_size"],
    )


def qwen_vae(component: Component) -> QwenVae:
    """Facts of a VAE."""
    return QwenVae(Part.of(component), VaeConfig.parse(component.config))
