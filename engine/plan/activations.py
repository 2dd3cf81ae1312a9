"""Upper bounds of the bytes that the phases allocate beside weights, from what the code of each phase keeps alive.

``s`` is the size of an element of the compute dtype. A bound counts every tensor that can be alive at the widest
moment of a phase; where a path depends on the kernel, the kernel's own scratch is counted (:class:`Linear`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .jobs import JobFacts
    from .qwen import QwenEncoder, QwenTransformer

COMPLEX_BYTES = 8
FLOAT_BYTES = 4


SMALL_BYTES = 64 << 10
"""Frequencies, positions, timestep features and other vectors that no formula below counts one by one."""

CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS = 2 << 20, 8 << 20
CHUNK_COPIES = 5
OUTPUT_COLUMNS = 1024
DEQUANTISED_ELEMENTS = 8 << 20
DEQUANTISED_ROWS = 256
CHUNK_SCORES = 8 << 20


@dataclass(frozen=True)
class Linear:
    """A linear layer's kernel by its scratch beside input, output and weight.

    Attributes:
        kernel: ``torch`` and ``triton-w8a16`` (none); ``triton`` (8-bit tokens); ``int_mm`` and ``reference`` (8-bit
            tokens, twice where they are padded, and four float32 or int32 copies of 1024 output columns);
            ``scaled_mm`` (8-bit tokens); ``dequantise`` (8 M weights in the compute dtype and the columns that they
            make).
        s: size of an element of the compute dtype.
        chunk_elements: numbers that are quantised or dequantised at a time.
    """

    kernel: str
    s: int
    chunk_elements: int = CHUNK_ELEMENTS

    def scratch(self, rows: int, inputs: int, outputs: int) -> int:
        """Bytes for [rows, inputs] times a weight [outputs, inputs]."""
        tokens = rows * (inputs + FLOAT_BYTES)
        chunk = CHUNK_COPIES * FLOAT_BYTES * min(rows * inputs, self.chunk_elements + inputs)
        if self.kernel in ("int_mm", "reference"):
            columns = min(outputs, OUTPUT_COLUMNS)
            sums = 4 * FLOAT_BYTES * rows * columns + 2 * FLOAT_BYTES * columns * min(inputs, OUTPUT_COLUMNS)
            return max(tokens + chunk, 2 * tokens + sums)
        if self.kernel == "dequantise":
            step = max(DEQUANTISED_ROWS, DEQUANTISED_ELEMENTS // inputs)
            weights = min(outputs, step) * inputs
            floats = 2 * FLOAT_BYTES * min(weights, self.chunk_elements + inputs)
            return weights * self.s + floats + (rows * step * self.s if outputs > step else 0)
        return {"torch": 0, "triton-w8a16": 0, "triton": tokens, "scaled_mm": tokens + chunk}[self.kernel]


def attention_scratch(kernel: str, tokens: int, d: int, heads: int, s: int) -> int:
    """What a kernel of attention holds beside queries, keys, values and result, each ``[tokens, d]``.

    ``sdpa`` of a CPU: nothing that a bound on the block does not hold; flash and memory-efficient kernels: a float32
    per query and head; ``sage``: keys without their mean, queries and keys in 8 and values in 16 bits, and scales;
    ``math``: a head's float32 queries, keys and values, and three times 8 M scores.
    """
    sums = FLOAT_BYTES * tokens * heads
    if kernel == "sage":
        return tokens * d * (s + 4) + 3 * sums
    if kernel == "math":
        return 5 * FLOAT_BYTES * tokens * (d // heads) + 3 * FLOAT_BYTES * (CHUNK_SCORES + tokens) + sums
    return 0 if kernel == "sdpa" else sums


def step_bytes(model: QwenTransformer, job: JobFacts, s: int, linear: Linear, kernel: str = "sdpa") -> int:
    """One network evaluation of all branches: what lives through it, and the widest moment of a block.

    With ``d`` the width, ``I`` image tokens (``T`` of the target), ``L`` text tokens of a branch, ``J = I + L``:

    - through the step: embedded image ``I d s``; per branch its image and text states and its embedded text
      ``(I + 2 L) d s``, rotations ``4 J h`` of head width ``h``, and prompt embeddings; latents, references, rows;
    - attention: modulated ``J``, queries, keys and values ``3 J``, one more ``J`` while the last of them are joined or
      for the result, and ``L``: ``(5 J + L) d s``, with the scratch of its kernel; where keys are normalised and
      rotated, ``(2 J + 2 L) d s`` and float32 copies of the longer stream ``M = max(I, L)``: ``12 + s`` bytes per
      element below float32 and 12 in it;
    - feed-forward: the attention's updates ``J``, modulated ``M``, hidden before and after GELU ``8 M``:
      ``(9 M + J) d s``; in the last block of a model without references ``11 I d s``;
    - guidance after the last block: the branches' velocities and what combines them, in float32;
    - each with the scratch of the linear layer that runs there.
    """
    d, target, image = model.dim, job.target_tokens, job.target_tokens + job.reference_tokens
    text = max(job.text_tokens)
    joint, widest = image + text, max(image, text)
    rotated = FLOAT_BYTES * 3 + (s if s < FLOAT_BYTES else 0)
    attention = max(
        (5 * joint + text) * d * s
        + attention_scratch(kernel, joint, d, d // model.head_dim, s)
        + _weighing(model, job, s),
        (2 * joint + 2 * text) * d * s + rotated * widest * d,
        (3 * joint + 2 * text + widest) * d * s + linear.scratch(joint, d, d),
    )
    copied = target if job.references else 0
    feed_forward = max(
        (9 * widest + joint) * d * s,
        (image + 10 * target + copied) * d * s,
        (joint + 5 * widest) * d * s + linear.scratch(widest, d, 4 * d),
        (joint + 6 * widest) * d * s + linear.scratch(widest, 4 * d, d),
    )
    guidance = (2 * FLOAT_BYTES * job.branches + 4 * FLOAT_BYTES) * target * model.in_channels
    return _lasting(model, job, s) + max(attention, feed_forward, guidance)


def _weighing(model: QwenTransformer, job: JobFacts, s: int) -> int:
    """Joining attention over runs of keys: two parts as they come and, below float32, in it, and what they make."""
    if not job.steered:
        return 0
    leading = job.target_tokens + max(job.text_tokens)
    return leading * model.dim * (s + FLOAT_BYTES + (2 * FLOAT_BYTES if s < FLOAT_BYTES else 0))


def _lasting(model: QwenTransformer, job: JobFacts, s: int) -> int:
    d, image = model.dim, job.target_tokens + job.reference_tokens
    per_branch = [
        (image + 2 * text) * d * s + (image + text) * model.head_dim // 2 * COMPLEX_BYTES + text * model.joint * s
        for text in job.text_tokens
    ]
    latents = model.in_channels * (2 * image * s + job.target_tokens * (FLOAT_BYTES + s))
    if job.steered:
        latents += model.in_channels * (image * (s + FLOAT_BYTES) + 6 * job.target_tokens * FLOAT_BYTES)
    others = (job.casts - 1) * sum(
        text * (d + model.joint) * s + (image + text) * model.head_dim // 2 * COMPLEX_BYTES for text in job.text_tokens
    )
    return SMALL_BYTES + image * d * s + sum(per_branch) + others + latents


def rows_bytes(model: QwenTransformer, job: JobFacts, item: int) -> int:
    """Modulation rows of all steps and of timestep zero: ``(steps + 1) (12 blocks + 2) d`` elements."""
    return (job.steps + 1) * (12 * len(model.stack.blocks) + 2) * model.dim * item


def modulation_bytes(model: QwenTransformer, job: JobFacts) -> int:
    """Computing the modulation rows: one ``[6 d, d]`` weight in float32, and the rows of every block in float32."""
    return SMALL_BYTES + 6 * model.dim * (model.dim + 1) * FLOAT_BYTES + 2 * rows_bytes(model, job, FLOAT_BYTES)


class Decoder(Protocol):
    """Widths of decoder layers."""

    @property
    def hidden(self) -> int:
        """Of states."""
        ...

    @property
    def ffn(self) -> int:
        """Inside the feed-forward layer."""
        ...

    @property
    def width(self) -> int:
        """Of queries."""
        ...

    @property
    def kv_width(self) -> int:
        """Of keys and of values."""
        ...

    @property
    def head_dim(self) -> int:
        """Of one head."""
        ...


def decoder_bytes(model: Decoder, job: JobFacts, s: int, linear: Linear) -> int:
    """Decoder layers over the common beginning and the endings.

    With ``D`` the width, ``F`` the feed-forward width, ``W`` and ``V`` the widths of queries and of keys, ``n`` the
    longest run of tokens and ``N`` all of them:

    - through a pass: states before and after the layer ``2 N D s``, rotations ``2 N h s``, the common keys and values,
      and the masks of the endings;
    - norm ``n D (12 + s)``; attention ``n (2 D + 6 W + 4 V) s``; feed-forward ``n (3 D + 3 F) s``.
    """
    longest = max(job.prompt_tokens)
    total = job.shared_tokens + sum(count - job.shared_tokens for count in job.prompt_tokens)
    endings = [count - job.shared_tokens for count in job.prompt_tokens] if job.branches > 1 else []
    masks = sum(ending * longest for ending in endings) * (1 + s)
    lasting = total * (2 * model.hidden + 2 * model.head_dim + 2 * model.kv_width) * s + masks
    lasting += total * (model.hidden + 6 * 8 + 2 * model.head_dim * FLOAT_BYTES)
    attention = longest * (2 * model.hidden + 6 * model.width + 4 * model.kv_width) * s
    feed_forward = longest * (3 * model.hidden + 3 * model.ffn) * s
    quantised = linear.scratch(longest, max(model.hidden, model.ffn), min(model.hidden, model.ffn))
    norm = longest * model.hidden * (3 * FLOAT_BYTES + s)
    return SMALL_BYTES + lasting + max(norm, attention, feed_forward + quantised)


def normed_decoder_bytes(model: Decoder, job: JobFacts, s: int, linear: Linear) -> int:
    """:func:`decoder_bytes` of layers that norm queries and keys per head, in float32 below it."""
    longest = max(job.prompt_tokens)
    normed = longest * (2 * model.hidden * s + model.width * (3 * FLOAT_BYTES + 2 * s))
    return max(decoder_bytes(model, job, s, linear), normed)


def language_bytes(model: QwenEncoder, job: JobFacts, s: int, linear: Linear) -> int:
    """:func:`decoder_bytes`, with the pictures' patches and rows."""
    patches = sum(rows * columns for rows, columns in job.patches)
    pictures = patches * model.patch_values * FLOAT_BYTES + patches // model.merge**2 * model.hidden * s
    return pictures + decoder_bytes(model, job, s, linear)


def vision_bytes(model: QwenEncoder, job: JobFacts, s: int, linear: Linear) -> int:
    """The vision tower over all patches of all pictures.

    With ``n`` patches of ``P`` numbers, width ``H`` and feed-forward width ``F``: pixels ``n P (4 + s)``, cosine and
    sine ``8 n h``, states ``2 n H s``; then the widest of norm ``12 n H``, attention ``n H (6 s + 24)`` (rotation is in
    float32) and feed-forward ``n (3 F + 2 H) s``; and the rows of the image tokens.
    """
    patches = sum(rows * columns for rows, columns in job.patches)
    if not patches:
        return 0
    h, head = model.vision_hidden, model.vision_hidden // model.vision_heads
    lasting = patches * (model.patch_values * (FLOAT_BYTES + (s if s < FLOAT_BYTES else 0)) + 6 * head * FLOAT_BYTES)
    lasting += patches * 2 * h * s + 4 * patches * 8
    attention = patches * h * (6 * s + 6 * FLOAT_BYTES)
    feed_forward = patches * (3 * model.vision_ffn + 2 * h) * s
    wide, narrow = max(3 * h, model.vision_ffn), h
    quantised = linear.scratch(patches, wide, narrow)
    features = 2 * patches // model.merge**2 * model.hidden * s
    return (
        SMALL_BYTES + lasting + features + max(patches * h * (3 * FLOAT_BYTES + s), attention, feed_forward + quantised)
    )
