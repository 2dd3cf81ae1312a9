"""The double-stream block of Qwen-Image, without its modulation weights.

``img_mod`` and ``txt_mod`` see only the timestep; their rows come from the modulation table (``modulation.py``), so the
block holds two thirds of the stored weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ...kernels.attention import attend
from ...kernels.epilogue import Epilogue
from ...kernels.modulate import add_gated, modulate
from ...kernels.rope import norm_rope_joint
from ..quant import QuantLinear, linear, project
from .emphasis import Emphasis
from .kernels import DEFINITIONS, Kernels

EPS = 1e-6


class Modulation(NamedTuple):
    """Shift, scale and gate rows of one norm, each [dim] in the compute dtype."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


@dataclass(frozen=True)
class Ranges:
    """Modulation of one norm of one stream: ``first`` for its first ``split`` tokens, ``rest`` for the others.

    ``rest`` and ``split`` are None where all tokens share one.
    """

    first: Modulation
    rest: Modulation | None = None
    split: int | None = None

    @property
    def target(self) -> Ranges:
        """The first range as a stream of its own."""
        return Ranges(self.first)

    def modulate(self, x: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        """``LayerNorm(x) * (1 + scale) + shift``: [batch, tokens, dim]."""
        rest = None if self.rest is None else (self.rest.shift, self.rest.scale)
        shift, scale, _ = self.first
        return modulate(x, shift, scale, rest, self.split, eps=EPS, implementation=kernels.modulate)

    def add(self, x: torch.Tensor, layer: nn.Module, inputs: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        """``x + gate * layer(inputs)`` over x: [batch, tokens, dim]; a layer of 8-bit weights adds as it writes."""
        gate, rest = self.first.gate, None if self.rest is None else self.rest.gate
        if isinstance(layer, QuantLinear):
            return linear(layer, inputs, Epilogue(gate=gate, gate_rest=rest, split=self.split, residual=x), out=x)
        return add_gated(x, layer(inputs), gate, rest, self.split, implementation=kernels.modulate)


@dataclass(frozen=True)
class BlockRows:
    """One block's modulation rows for one timestep, each [6 * dim]: two times (shift, scale, gate).

    ``reference`` is the row of timestep zero, used for reference tokens where the model was trained so (zero_cond_t);
    None where all image tokens share the row of the current timestep.
    """

    image: torch.Tensor
    text: torch.Tensor
    reference: torch.Tensor | None = None

    def pick(self, norm: int, target_tokens: int) -> tuple[Ranges, Ranges]:
        """Modulation of the image and of the text stream by norm 0 (attention) or 1 (feed-forward)."""
        image, text = self._split(self.image, norm), self._split(self.text, norm)
        if self.reference is None:
            return Ranges(image), Ranges(text)
        return Ranges(image, self._split(self.reference, norm), target_tokens), Ranges(text)

    @staticmethod
    def _split(row: torch.Tensor, norm: int) -> Modulation:
        return Modulation(*row.chunk(6)[3 * norm : 3 * norm + 3])


class _Activation(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(self.proj, x, Epilogue(gelu=True))


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear with the checkpoint's names (``net.0.proj``, ``net.2``)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_Activation(dim, hidden), nn.Identity(), nn.Linear(hidden, dim)])

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """What the last layer reads: [batch, tokens, dim] to [batch, tokens, hidden]."""
        return self.net[0](x)


class _Scale(nn.Module):
    """Weight of the RMS norm over the head dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))


class Rotations(NamedTuple):
    """Rotary factors: complex64 [text tokens, head_dim/2] and [image tokens, head_dim/2]."""

    text: torch.Tensor
    image: torch.Tensor


_Parts = list[tuple[nn.Module, _Scale | None, torch.Tensor]]
"""Layers that read one stream, the norms of those that make queries or keys, and where each of them writes."""


class JointAttention(nn.Module):
    """Attention over the joint sequence [text, target, references]; each stream has its own projections."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (_Scale(dim // heads) for _ in range(4))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_add_out = nn.Linear(dim, dim)

    def forward(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        rotations: Rotations,
        kernels: Kernels,
        emphasis: Emphasis | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend with every token as a query.

        Args:
            image: [batch, image tokens, dim], modulated.
            text: [batch, text tokens, dim], modulated.
            rotations: rotary factors of both streams.
            kernels: implementations.
            emphasis: how the references weigh; None as trained.

        Returns:
            What ``to_out`` and ``to_add_out`` read: the image and the text part, shaped as the inputs.
        """
        queries, keys, values = (self._joint(image, text) for _ in range(3))
        length = text.shape[1]
        parts: _Parts = [
            (self.add_q_proj, self.norm_added_q, queries[:, :length]),
            (self.add_k_proj, self.norm_added_k, keys[:, :length]),
            (self.add_v_proj, None, values[:, :length]),
        ]
        self._fill(parts, text, rotations.text, kernels)
        parts = [
            (self.to_q, self.norm_q, queries[:, length:]),
            (self.to_k, self.norm_k, keys[:, length:]),
            (self.to_v, None, values[:, length:]),
        ]
        self._fill(parts, image, rotations.image, kernels)
        if emphasis is None:
            out = attend(queries, keys, values, mode=kernels.attention)
        else:
            out = emphasis.attend(queries, keys, values, kernels.attention)
        return out[:, length:], out[:, :length]

    def forward_target(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        rotations: Rotations,
        target_tokens: int,
        kernels: Kernels,
        emphasis: Emphasis | None = None,
    ) -> torch.Tensor:
        """Attend with the target tokens alone as queries: [batch, target_tokens, dim], which ``to_out`` reads."""
        target = image[:, :target_tokens]
        queries, keys, values = self._joint(target), self._joint(image, text), self._joint(image, text)
        length = text.shape[1]
        parts: _Parts = [(self.to_q, self.norm_q, queries)]
        self._fill(parts, target, rotations.image[:target_tokens], kernels)
        parts = [(self.add_k_proj, self.norm_added_k, keys[:, :length]), (self.add_v_proj, None, values[:, :length])]
        self._fill(parts, text, rotations.text, kernels)
        parts = [(self.to_k, self.norm_k, keys[:, length:]), (self.to_v, None, values[:, length:])]
        self._fill(parts, image, rotations.image, kernels)
        if emphasis is not None:
            return emphasis.attend_leading(queries, keys, values, kernels.attention)
        return attend(queries, keys, values, mode=kernels.attention)

    def _joint(self, *streams: torch.Tensor) -> torch.Tensor:
        """A buffer for the tokens of all streams: [batch, tokens, heads, head_dim]."""
        batch, _, dim = streams[0].shape
        return streams[0].new_empty(batch, sum(x.shape[1] for x in streams), self.heads, dim // self.heads)

    def _fill(self, parts: _Parts, x: torch.Tensor, rotations: torch.Tensor, kernels: Kernels) -> None:
        """Project x by each layer into its slice of a joint buffer; what has a norm is normalised and rotated there."""
        project(x, [layer for layer, _, _ in parts], [out.flatten(2) for *_, out in parts])
        for _, norm, out in parts:
            if norm is not None:
                norm_rope_joint(out, norm.weight, rotations, out, eps=EPS, implementation=kernels.rope)


class DoubleStreamBlock(nn.Module):
    """One block; ``forward`` keeps both streams, ``forward_last`` computes only what the output reads.

    Source: huggingface/diffusers@v0.42.1:src/diffusers/models/transformers/transformer_qwenimage.py
    (QwenImageTransformerBlock); ours takes modulation rows instead of a time embedding, slices instead of ``where``,
    and updates the hidden states in place.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = JointAttention(dim, heads)
        self.img_mlp = FeedForward(dim, 4 * dim)
        self.txt_mlp = FeedForward(dim, 4 * dim)

    def forward(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        rows: BlockRows,
        rotations: Rotations,
        target_tokens: int,
        kernels: Kernels = DEFINITIONS,
        emphasis: Emphasis | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block on one branch.

        Args:
            image: [batch, target + reference tokens, dim]; overwritten.
            text: [batch, text tokens, dim]; overwritten.
            rows: modulation rows of this block and timestep.
            rotations: rotary factors of both streams.
            target_tokens: how many image tokens belong to the picture being made.
            kernels: implementations.
            emphasis: how the references weigh; None as trained.

        Returns:
            The new image and text hidden states.
        """
        img, txt = rows.pick(0, target_tokens)
        image_heads, text_heads = self.attn(
            img.modulate(image, kernels), txt.modulate(text, kernels), rotations, kernels, emphasis
        )
        image = img.add(image, self.attn.to_out[0], image_heads, kernels)
        text = txt.add(text, self.attn.to_add_out, text_heads, kernels)
        del image_heads, text_heads
        img, txt = rows.pick(1, target_tokens)
        image = img.add(image, self.img_mlp.net[2], self.img_mlp.hidden(img.modulate(image, kernels)), kernels)
        text = txt.add(text, self.txt_mlp.net[2], self.txt_mlp.hidden(txt.modulate(text, kernels)), kernels)
        return image, text

    def forward_last(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        rows: BlockRows,
        rotations: Rotations,
        target_tokens: int,
        kernels: Kernels = DEFINITIONS,
        emphasis: Emphasis | None = None,
    ) -> torch.Tensor:
        """Run the block for the target tokens only: [batch, target_tokens, dim]."""
        img, txt = rows.pick(0, target_tokens)
        heads = self.attn.forward_target(
            img.modulate(image, kernels), txt.modulate(text, kernels), rotations, target_tokens, kernels, emphasis
        )
        target = img.target.add(image[:, :target_tokens].contiguous(), self.attn.to_out[0], heads, kernels)
        del heads
        img = rows.pick(1, target_tokens)[0].target
        return img.add(target, self.img_mlp.net[2], self.img_mlp.hidden(img.modulate(target, kernels)), kernels)
