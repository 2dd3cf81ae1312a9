"""What a plan knows of Z-Image: its transformer, Qwen3 without the last layer and the flux-type VAE, from headers."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ..kl.config import KlConfig
from ..kl.cut import kl_cut
from ..kl.memory import decode_bytes, encode_bytes, weight_bytes
from ..layout import ITEM_BYTES
from ..vae.cut import Cut
from ..zimage.config import ZImageConfig, padded
from .activations import COMPLEX_BYTES, FLOAT_BYTES, SMALL_BYTES, Linear, attention_scratch, normed_decoder_bytes
from .facts import ALIGNMENT_BYTES, Items, Part, Stack, count_under, shapes_of, stack_of

if TYPE_CHECKING:
    from ...loaders.component import Component
    from .jobs import JobFacts

MODULATION = ("adaLN_modulation.", "t_embedder.")
"""What the modulation rows take the place of, inside a block or before them."""

UNUSED_LAYERS = 1
BOUNCE_BUFFERS = 2
TURN_BYTES = 40
"""Of one rotation while it is made: an angle in float64 and float32, cosine and sine, and the joined copy."""

POSITION_BYTES = 32


@dataclass(frozen=True)
class ZTransformer:
    """The transformer of Z-Image.

    Attributes:
        stack: noise refiner and joint layers without their modulation.
        refiner: blocks of the context refiner, which run once per prompt through one slot.
        caption_parameters: of what embeds a caption.
        modulation_largest: numbers of the largest matrix that the modulation rows are made of.
    """

    part: Part
    stack: Stack
    refiner: Stack
    config: ZImageConfig
    ends_parameters: int
    caption_parameters: int
    modulation_largest: int
    ops: tuple[str, ...] = ("attention", "modulate", "rope")

    @property
    def used_parameters(self) -> int:
        """Blocks, ends and the caption branch; modulation is read as rows."""
        once = self.refiner.parameters + self.caption_parameters
        return self.stack.parameters + self.ends_parameters + once

    def rows_bytes(self, job: JobFacts, item: int) -> int:
        """``steps (4 blocks + 1) d`` numbers."""
        return job.steps * (4 * len(self.stack.blocks) + 1) * self.config.dim * item

    def denoise_bytes(self, job: JobFacts, s: int, linear: Linear, attention: str) -> int:
        """The largest of a step, of refining the captions and of computing the modulation rows."""
        step = self.step_bytes(job, s, linear, attention)
        return max(step, self.caption_bytes(job, s, attention), self.modulation_bytes(job))

    def once_bytes(self, plain: str) -> int:
        """The bounce buffers of the caption branch, and its ends before they are on the device."""
        slab = max(self.refiner.slab_bytes("bf16", plain), default=0)
        return BOUNCE_BUFFERS * slab + self.caption_parameters * ITEM_BYTES[plain]

    def step_flops(self, job: JobFacts) -> float:
        """``(8 d^2 + 6 d F) J + 4 J^2 d`` per layer and branch, and the noise refiner over the image alone."""
        config, image = self.config, padded(job.target_tokens)
        layers = [image + padded(text) for text in job.text_tokens]

        def block(tokens: int) -> int:
            return (8 * config.dim**2 + 6 * config.dim * config.ffn_dim) * tokens + 4 * tokens * tokens * config.dim

        return float(config.n_layers * sum(map(block, layers)) + config.n_refiner_layers * block(image))

    def _lasting(self, job: JobFacts, s: int) -> int:
        """What lives through a step.

        With ``d`` the width, ``I`` image tokens, ``L`` caption tokens of a branch, both padded, and ``J = I + L``: per
        branch its states ``J d s``, its caption ``L d s``, prompt embeddings and rotations ``4 J h``; latents in
        float32 with what previews and guidance make of them.
        """
        d, image = self.config.dim, padded(job.target_tokens)
        branches = [
            (image + 2 * padded(text)) * d * s
            + (image + padded(text)) * self.config.head_dim // 2 * COMPLEX_BYTES
            + text * self.config.cap_feat_dim * s
            for text in job.text_tokens
        ]
        values = job.target_tokens * self.config.patch_channels
        latents = values * (s * (1 + job.branches) + FLOAT_BYTES * (6 + 2 * job.branches))
        return SMALL_BYTES + sum(branches) + latents

    def step_bytes(self, job: JobFacts, s: int, linear: Linear, attention: str) -> int:
        """What lives through a step, and its widest moment: a block over the longest branch, or the joining."""
        joint = padded(job.target_tokens) + max(map(padded, job.text_tokens))
        images = job.branches * padded(job.target_tokens) * self.config.dim * s
        return self._lasting(job, s) + max(self._block(joint, s, linear, attention), 2 * images)

    def _block(self, tokens: int, s: int, linear: Linear, attention: str) -> int:
        """One block beside its hidden states.

        Attention: what the norm made, queries, keys, values, result and its projection ``6 J d s``; feed-forward: what
        the norm made, gate, value and result ``(2 J d + 2 J F) s``; each with the scratch of its linear layer; a norm
        in float32 beside what it reads and makes; that of the heads, some tokens at a time, beside ``4 J d s``.
        """
        d, ffn = self.config.dim, self.config.ffn_dim
        heads = attention_scratch(attention, tokens, d, self.config.n_heads, s)
        projected = linear.scratch(tokens, d, d)
        turned = 4 * tokens * d * s + min(tokens * d, linear.chunk_elements) * (3 * FLOAT_BYTES + s)
        attended = max(6 * tokens * d * s + projected, 5 * tokens * d * s + heads, turned)
        wide = (1 * d + 2 * ffn) * tokens * s
        fed = max(wide + linear.scratch(tokens, d, ffn), wide + tokens * d * s + linear.scratch(tokens, ffn, d))
        norm = tokens * d * (3 * FLOAT_BYTES + 3 * s)
        return max(attended, fed, norm)

    def caption_bytes(self, job: JobFacts, s: int, attention: str) -> int:
        """The caption branch: its ends, then one slot through which its blocks go, beside captions and prompts."""
        config, plain = self.config, "F32" if s == FLOAT_BYTES else "BF16"
        kept = sum(
            padded(text) * (config.dim * s + config.head_dim // 2 * COMPLEX_BYTES) + 2 * text * config.cap_feat_dim * s
            for text in job.text_tokens
        )
        longest, most = max(map(padded, job.text_tokens)), padded(job.target_tokens)
        norm = longest * config.cap_feat_dim * (3 * FLOAT_BYTES + 3 * s) + longest * config.dim * s
        ends = self.caption_parameters * s + ALIGNMENT_BYTES + norm
        slot = max(self.refiner.slab_bytes("bf16", plain), default=0)
        turns = (longest + most) * (config.head_dim // 2 * TURN_BYTES + POSITION_BYTES)
        return SMALL_BYTES + kept + max(ends, slot + self._block(longest, s, Linear("torch", s), attention), turns)

    def modulation_bytes(self, job: JobFacts) -> int:
        """One weight as stored and, where it is not float32, in it; the rows of every block twice in float32."""
        stored = 0 if self.part.dtypes == ("F32",) else max(ITEM_BYTES.get(name, 0) for name in self.part.dtypes)
        weight = self.modulation_largest * (stored + FLOAT_BYTES)
        return SMALL_BYTES + weight + 2 * self.rows_bytes(job, FLOAT_BYTES)


@dataclass(frozen=True)
class Qwen3Encoder:
    """Qwen3 as Z-Image uses it: all decoder layers but the last, and nothing else.

    Attributes:
        width: columns of the queries; ``kv_width`` of keys and values.
    """

    part: Part
    stack: Stack
    hidden: int
    ffn: int
    width: int
    kv_width: int
    head_dim: int

    def used_parameters(self, job: JobFacts) -> int:
        """The layers."""
        return self.stack.parameters

    def items(self, job: JobFacts, plain: str) -> Items:
        """The rotary frequencies."""
        return (("ends", self.head_dim * 4 + ALIGNMENT_BYTES),)

    def encode_bytes(self, job: JobFacts, s: int, linear: Linear) -> int:
        """The decoder layers."""
        return normed_decoder_bytes(self, job, s, linear)


@dataclass(frozen=True)
class KlVaeFacts:
    """The flux-type VAE: its config, from which `kl.memory` tells its bytes."""

    part: Part
    config: KlConfig

    @property
    def used_parameters(self) -> int:
        """All of them."""
        return self.part.parameters

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
        return self.config.block_out_channels[-1]

    def cut(self, kind: str, tile_pixels: int | None) -> Cut:
        """The bands on a kind of device."""
        return kl_cut(kind, tile_pixels)

    def weights_bytes(self, s: int, weight_format: str) -> int:
        """Both halves as loaded."""
        return sum(weight_bytes(self.config, half, s, weight_format) for half in ("encoder", "decoder"))

    def encode_bytes(self, size: tuple[int, int], s: int, cut: Cut, weight_format: str) -> int:
        """Peak of encoding a picture of (height, width) pixels."""
        return encode_bytes(self.config, *size, s, cut, weight_format)

    def decode_bytes(self, size: tuple[int, int], s: int, cut: Cut, weight_format: str) -> int:
        """Peak of decoding a picture of (height, width) pixels."""
        return decode_bytes(self.config, *size, s, cut, weight_format)


def z_transformer(component: Component, keep: frozenset[str]) -> ZTransformer:
    """Facts of a Z-Image transformer; ``keep`` names the matrices of a block that stay plain in every weight format."""
    config, shapes = ZImageConfig.from_dict(component.config), shapes_of(component)
    modulation = {name: shape for name, shape in shapes.items() if any(mark in name for mark in MODULATION)}
    used = {name: shape for name, shape in shapes.items() if name not in modulation}
    noise = stack_of(used, "noise_refiner.", config.n_refiner_layers)
    layers = stack_of(used, "layers.", config.n_layers)
    return ZTransformer(
        part=Part.of(component),
        stack=Stack((*noise.blocks, *layers.blocks), keep),
        refiner=stack_of(used, "context_refiner.", config.n_refiner_layers),
        config=config,
        ends_parameters=count_under(used, "all_x_embedder.", "all_final_layer.", "x_pad_token"),
        caption_parameters=count_under(used, "cap_embedder.", "cap_pad_token"),
        modulation_largest=max(map(prod, modulation.values())),
    )


def qwen3_encoder(component: Component) -> Qwen3Encoder:
    """Facts of Qwen3 as the text encoder of Z-Image."""
    config = component.config
    head = config["head_dim"]
    layers = config["num_hidden_layers"] - UNUSED_LAYERS
    return Qwen3Encoder(
        part=Part.of(component),
        stack=stack_of(shapes_of(component), "language_model.layers.", layers),
        hidden=config["hidden_size"],
        ffn=config["intermediate_size"],
        width=head * config["num_attention_heads"],
        kv_width=head * config["num_key_value_heads"],
        head_dim=head,
    )


def kl_vae(component: Component) -> KlVaeFacts:
    """Facts of a flux-type VAE."""
    return KlVaeFacts(Part.of(component), KlConfig.parse(component.config))
