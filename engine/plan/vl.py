"""What a plan knows of Qwen3-VL and of an extraction: plain numbers, from headers, and bounds on activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..layout import ITEM_BYTES
from .activations import FLOAT_BYTES, SMALL_BYTES, Linear, normed_decoder_bytes
from .facts import ALIGNMENT_BYTES, Part, Stack, count_under, shapes_of, stack_of
from .jobs import JobFacts, Size, patch_grid

if TYPE_CHECKING:
    from ...loaders.vl import VLSource

CHAT_TOKENS = 24
"""Bound on the tokens of the chat around one user message, with an empty think block."""

PICTURE_TOKENS = 2
SYSTEM_TOKENS = 8


@dataclass(frozen=True)
class ExtractorFacts:
    """Qwen3-VL in numbers, from headers and configs alone.

    Attributes:
        part: as stored.
        stack: all decoder layers.
        tower_parameters: of the tower beside its blocks and positions.
        positions: learned positions, held in float32.
        stacked: how many decoder layers get features of the tower.
        width: columns of the queries; ``kv_width`` of keys and values.
        patch_values: numbers in one patch.
        processor: settings of the image processor.
    """

    label: str
    part: Part
    stack: Stack
    vision_stack: Stack
    tower_parameters: int
    positions: int
    stacked: int
    hidden: int
    ffn: int
    width: int
    kv_width: int
    head_dim: int
    vision_hidden: int
    vision_ffn: int
    vision_heads: int
    patch_values: int
    merge: int
    processor: Mapping[str, Any]

    @classmethod
    def of(cls, source: VLSource) -> ExtractorFacts:
        """Facts of an opened folder."""
        component, shapes = source.component, shapes_of(source.component)
        text, vision = component.config["text_config"], component.config["vision_config"]
        return cls(
            label=str(source.folder),
            part=Part.of(component),
            stack=stack_of(shapes, "language_model.layers.", text["num_hidden_layers"]),
            vision_stack=stack_of(shapes, "visual.blocks.", vision["depth"]),
            tower_parameters=count_under(
                shapes, "visual.merger.", "visual.deepstack_merger_list.", "visual.patch_embed."
            ),
            positions=count_under(shapes, "visual.pos_embed."),
            stacked=len(vision["deepstack_visual_indexes"]),
            hidden=text["hidden_size"],
            ffn=text["intermediate_size"],
            width=text["head_dim"] * text["num_attention_heads"],
            kv_width=text["head_dim"] * text["num_key_value_heads"],
            head_dim=text["head_dim"],
            vision_hidden=vision["hidden_size"],
            vision_ffn=vision["intermediate_size"],
            vision_heads=vision["num_heads"],
            patch_values=vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
            merge=vision["spatial_merge_size"],
            processor=source.processor_config,
        )

    def tower_bytes(self, plain: str) -> int:
        """The vision tower on the device."""
        blocks = sum(self.vision_stack.slab_bytes("bf16", plain))
        return blocks + self.tower_parameters * ITEM_BYTES[plain] + self.positions * FLOAT_BYTES + 2 * ALIGNMENT_BYTES

    def ends_bytes(self, plain: str) -> int:
        """The final norm and the rotary frequencies."""
        return self.hidden * ITEM_BYTES[plain] + 2 * self.head_dim * FLOAT_BYTES + ALIGNMENT_BYTES


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What is to be extracted, in numbers.

    Attributes:
        chat: patches of the pictures, and a bound on the tokens of the chat.
        depth: decoder layers that run.
        kept: hidden states that are kept.
        masked: some image tokens are hidden from the others.
        words: the command as it is typed, without what the plan adds.
    """

    chat: JobFacts
    depth: int
    kept: int = 1
    masked: bool = False
    words: str = ""

    @classmethod
    def foresee(  # noqa: PLR0913 (the options by name)
        cls,
        facts: ExtractorFacts,
        pictures: Sequence[Size],
        *,
        text: str | None = None,
        system_prompt: str | None = None,
        layers: Sequence[int] = (-6,),
        masked: bool = False,
        dtype: str = "auto",
        words: str = "",
    ) -> Extraction:
        """From the sizes of pictures and the texts; reads nothing.

        Args:
            facts: the model's.
            pictures: (width, height) of every picture.
            text: beside the pictures.
            system_prompt: a message before all.
            layers: hidden layers, -1 to minus the model's.
            masked: some image tokens are hidden.
            dtype: compute dtype.
            words: as typed.
        """
        patches = tuple(patch_grid(width, height, facts.processor) for width, height in pictures)
        count = sum(rows * columns for rows, columns in patches) // facts.merge**2 + PICTURE_TOKENS * len(patches)
        count += CHAT_TOKENS + len((text or "").encode())
        count += 0 if system_prompt is None else SYSTEM_TOKENS + len(system_prompt.encode())
        chat = JobFacts(
            kind="extract",
            target=(0, 0),
            patches=patches,
            prompt_tokens=(count,),
            shared_tokens=count,
            dropped_tokens=0,
            steps=0,
            dtype=dtype,
        )
        blocks = len(facts.stack.blocks)
        return cls(
            chat=chat,
            depth=max(blocks + 1 + layer for layer in layers),
            kept=len(set(layers)),
            masked=masked,
            words=words,
        )


def layer_bytes(facts: ExtractorFacts, job: Extraction, s: int, linear: Linear) -> int:
    """Decoder layers over one chat: with features to add, states to keep and, where tokens are hidden, a mask."""
    count = job.chat.prompt_tokens[0]
    images = sum(rows * columns for rows, columns in job.chat.patches) // facts.merge**2
    added = (1 + facts.stacked) * images * facts.hidden * s + (2 * images + count) * facts.hidden * s
    turns = 4 * count * facts.head_dim * FLOAT_BYTES
    mask = count * count * (1 + s) if job.masked else 0
    kept = job.kept * count * facts.hidden * s
    return added + turns + mask + kept + normed_decoder_bytes(facts, job.chat, s, linear)


def tower_bytes(facts: ExtractorFacts, job: Extraction, s: int) -> int:
    """The vision tower over the patches of all pictures.

    With ``n`` patches of ``P`` numbers, width ``H`` and feed-forward width ``F``: pixels ``n P (4 + s)``, positions and
    rotations in float32, states ``2 n H s``; then the widest of norm ``n H (12 + s)``, attention ``n H (7 s + 24)`` and
    feed-forward ``n (3 F + 2 H) s``; and the rows that each merger gives.
    """
    count = sum(rows * columns for rows, columns in job.chat.patches)
    if not count:
        return 0
    h, head = facts.vision_hidden, facts.vision_hidden // facts.vision_heads
    pixels = count * facts.patch_values * (FLOAT_BYTES + (s if s < FLOAT_BYTES else 0))
    lasting = pixels + count * (2 * h * s + 6 * head * FLOAT_BYTES + 6 * 8)
    places = 3 * count * h * FLOAT_BYTES + count * h * s
    rows = (1 + facts.stacked) * (count // facts.merge**2) * facts.hidden * s
    norm = count * h * (3 * FLOAT_BYTES + 2 * s)
    attention = count * h * (7 * s + 6 * FLOAT_BYTES)
    feed_forward = count * (3 * facts.vision_ffn + 2 * h) * s
    merging = 4 * count * h * s + count // facts.merge**2 * facts.hidden * s
    return SMALL_BYTES + lasting + rows + max(places, norm, attention, feed_forward, merging)
