"""The decoder layers of Qwen2.5-VL over a tape; several prompts share one computation of their common beginning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..stack import NO_KERNELS, BlockStack, Hold, open_tape
from ..stack.pack import Progress

if TYPE_CHECKING:
    from ...loaders.checkpoint import Checkpoint


@dataclass(frozen=True)
class Segment:
    """A run of tokens: the common beginning, or what one prompt adds to it.

    Attributes:
        hidden: embedded tokens [T, D].
        positions: rotary positions [3, T].
    """

    hidden: torch.Tensor
    positions: torch.Tensor


def decoder_stack(
    config: Any, checkpoint: Checkpoint, weight_format: str, dtype: torch.dtype, kernels: Mapping[str, str] = NO_KERNELS
) -> BlockStack:
    """The decoder layers of a checkpoint in a weight format; ``config`` is transformers' ``Qwen2_5_VLTextConfig``."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

    with torch.device("meta"):
        layer = modeling.Qwen2_5_VLDecoderLayer(config, layer_idx=0)
    count = config.num_hidden_layers
    return BlockStack(
        checkpoint,
        "language_model.layers.",
        count,
        layer,
        weight_format=weight_format,
        dtype=dtype,
        kernels=kernels,
    )


class LanguageModel:
    """All decoder layers and the final norm; no embedding table and no head.

    Args:
        config: transformers' ``Qwen2_5_VLTextConfig`` with the attention implementation set.
        checkpoint: the text encoder's tensors.
        device: where the layers run.
        dtype: of computation, and of weights in the format ``bf16``.
        hold: format and place of the layers.
        cache: folder of packed files.
        progress: called while the layers are packed.

    Attributes:
        tape: the layers.
    """

    def __init__(
        self,
        config: Any,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        hold: Hold,
        cache: Path | None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

        self._dtype, self._device = dtype, device
        with torch.device("meta"):
            self._norm = modeling.Qwen2_5_VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps).requires_grad_(False)
        self._rotary = modeling.Qwen2_5_VLRotaryEmbedding(config).to(device)
        norm_weight = checkpoint.read("language_model.norm.weight", dtype).to(device)
        self._norm.weight = torch.nn.Parameter(norm_weight, requires_grad=False)
        stack = decoder_stack(config, checkpoint, hold.weight_format, dtype, hold.kernels)
        self._layer = stack.template
        self.tape = open_tape(stack, hold, device, cache, progress)

    def run(
        self, common: Segment, endings: Sequence[Segment], drop: int, on_layer: Callable[[int], None]
    ) -> list[torch.Tensor]:
        """Hidden states after the last layer and the final norm, of every whole prompt without its first `drop` tokens.

        The model is causal, so the common beginning does not depend on what follows: it is computed once, and each
        ending attends to its keys and values. Every layer is visited once, for all segments.

        Args:
            common: the tokens that all prompts begin with.
            endings: what each prompt adds; empty when there is one prompt, which is then `common` as a whole.
            drop: leading tokens to leave out of the result.
            on_layer: called with the index before each layer; may raise to stop.

        Returns:
            one tensor [T - drop, D] per prompt.
        """
        segments = [common, *endings]
        states = [segment.hidden[None] for segment in segments]
        rotations = [self._rotary(states[0], segment.positions[:, None].to(self._device)) for segment in segments]
        masks = [self._mask(len(common.hidden), len(segment.hidden)) for segment in endings]
        with closing(self.tape.sweep(more=False)) as visits, self._layer:
            for index, views in visits:
                on_layer(index)
                states = _visit(self._layer.bind(views), states, rotations, masks)
        rows = [self._norm(state[0]) for state in (states[0][:, drop:], *states[1:])]
        rest = max(0, drop - len(common.hidden))
        return [torch.cat([rows[0], ending[rest:]]) for ending in rows[1:]] if endings else [rows[0]]

    def _mask(self, common: int, ending: int) -> torch.Tensor:
        """Which keys each row of an ending may see: bool [1, 1, ending, common + ending]."""
        own = torch.ones(ending, ending, dtype=torch.bool, device=self._device).tril()
        before = torch.ones(ending, common, dtype=torch.bool, device=self._device)
        return torch.cat([before, own], dim=1)[None, None]


class _CommonKeys:
    """Keys and values of the common beginning, in the shape of the cache that the attention module asks.

    The first update stores; every later one puts what is stored in front and keeps nothing.
    """

    def __init__(self) -> None:
        self._stored: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self._stored is None:
            self._stored = keys, values
            return keys, values
        return torch.cat([self._stored[0], keys], dim=2), torch.cat([self._stored[1], values], dim=2)


def _visit(
    layer: torch.nn.Module,
    states: Sequence[torch.Tensor],
    rotations: Sequence[tuple[torch.Tensor, torch.Tensor]],
    masks: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """One layer over the common beginning and then over each ending."""
    cache = _CommonKeys()
    return [
        layer(state, attention_mask=mask, position_embeddings=rotation, past_key_values=cache)
        for state, rotation, mask in zip(states, rotations, [None, *masks], strict=True)
    ]
