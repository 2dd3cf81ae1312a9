"""The decoder layers of Qwen3-VL over a tape, run as far as the deepest layer that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import PlanError
from ..mover import Placement, Tape
from ..stack import NO_KERNELS, BlockStack, CheckpointSource, Hold, PackedSource, pack, packed_path
from ..stack.pack import Progress

if TYPE_CHECKING:
    from ...loaders.checkpoint import Checkpoint

ROOT = "language_model.layers."


@dataclass(frozen=True)
class Sequenced:
    """One embedded sequence.

    Attributes:
        hidden: embedded tokens, image features in their places [T, D].
        positions: rotary positions [3, T].
        image_rows: where DeepStack adds, int64 [n].
        deepstack: what it adds after layers 1, 2, ...: one [n, D] per layer.
        visible: which keys each row may see, bool [1, 1, T, T]; None is plain causal.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    image_rows: torch.Tensor
    deepstack: Sequence[torch.Tensor] = ()
    visible: torch.Tensor | None = None


def layer_stack(
    config: Any,
    checkpoint: Checkpoint,
    weight_format: str,
    dtype: torch.dtype,
    kernels: Mapping[str, str] = NO_KERNELS,
    count: int | None = None,
) -> BlockStack:
    """The first decoder layers of a checkpoint, or all; ``config`` is transformers' ``Qwen3VLTextConfig``."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling

    with torch.device("meta"):
        layer = modeling.Qwen3VLTextDecoderLayer(config, layer_idx=0)
    blocks: int = config.num_hidden_layers if count is None else count
    return BlockStack(checkpoint, ROOT, blocks, layer, weight_format=weight_format, dtype=dtype, kernels=kernels)


class LanguageModel:
    """The first decoder layers, and the final norm; no embedding table and no head.

    Args:
        config: transformers' ``Qwen3VLTextConfig`` with the attention implementation set.
        checkpoint: the model's tensors.
        device: where the layers run.
        dtype: of computation, and of weights in the format ``bf16``.
        hold: format and place of the layers; its placement is for all layers of the model, or for ``depth``.
        depth: layers to hold.
        cache: folder of packed files.
        progress: called while the layers are packed.

    Attributes:
        tape: the layers.
    """

    def __init__(  # noqa: PLR0913 (as LanguageModel of the prompt encoder, and the depth)
        self,
        config: Any,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        hold: Hold,
        depth: int,
        cache: Path | None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling

        self._device, self._count = device, config.num_hidden_layers
        with torch.device("meta"):
            self._norm = modeling.Qwen3VLTextRMSNorm(config.hidden_size, eps=config.rms_norm_eps).requires_grad_(False)
        self._rotary = modeling.Qwen3VLTextRotaryEmbedding(config).to(device)
        norm_weight = checkpoint.read("language_model.norm.weight", dtype).to(device)
        self._norm.weight = torch.nn.Parameter(norm_weight, requires_grad=False)
        first = layer_stack(config, checkpoint, hold.weight_format, dtype, hold.kernels, depth)
        whole = layer_stack(config, checkpoint, hold.weight_format, dtype, hold.kernels)
        placement = placed(hold.placement, depth, self._count)
        self._layer = first.template
        self.tape = Tape(first.layouts, _source(first, whole, hold, cache, progress), placement, device)

    def run(
        self, sequence: Sequenced, entries: Collection[int], on_layer: Callable[[int], None]
    ) -> dict[int, torch.Tensor]:
        """Hidden states by entry: 0 the embeddings, k the output of layer k before DeepStack, the last one normed.

        Layers above the largest entry do not run.

        Args:
            sequence: what to run.
            entries: from 0 to the number of layers of the model; at most the depth that is held.
            on_layer: called with the index before each layer; may raise to stop.

        Returns:
            entry to tensor [T, D].
        """
        found = {0: sequence.hidden} if 0 in entries else {}
        deepest = max(entries, default=0)
        state = sequence.hidden[None]
        rotation = self._rotary(state, sequence.positions[:, None].to(self._device))
        with closing(self.tape.sweep(more=False)) as visits, self._layer:
            for index, views in visits:
                if index >= deepest:
                    break
                on_layer(index)
                layer = self._layer.bind(views)
                state = layer(state, attention_mask=sequence.visible, position_embeddings=rotation)
                if index + 1 in entries:
                    found[index + 1] = state[0]
                state = _stacked(state, sequence, index)
        if self._count in found:
            found[self._count] = self._norm(state[0])
        return found


def visible_keys(count: int, hidden_rows: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """Causal attention in which hidden rows are seen by themselves only: bool [1, 1, T, T]; None without any."""
    if not hidden_rows:
        return None
    seen = torch.ones(count, count, dtype=torch.bool, device=device).tril()
    seen[:, list(hidden_rows)] = False
    seen.fill_diagonal_(True)
    return seen[None, None]


def placed(placement: Placement | None, depth: int, count: int) -> Placement:
    """A placement for the first `depth` of `count` layers: as given, or cut from one for all.

    Raises:
        PlanError: it is for another number of layers.
    """
    if placement is None:
        return Placement(depth)
    if placement.blocks == depth:
        return placement
    if placement.blocks != count:
        raise PlanError(f"placement must be for {count} layers, got one for {placement.blocks}")
    streamed = tuple(block for block in placement.streamed if block < depth)
    return Placement(depth, streamed, placement.slots, placement.host)


def _source(
    first: BlockStack, whole: BlockStack, hold: Hold, cache: Path | None, progress: Progress
) -> CheckpointSource | PackedSource:
    """Where slabs are read from; a packed file always holds the whole stack, so that one serves every depth."""
    path = hold.packed
    needs_packing = whole.quantised or (hold.placement is not None and hold.placement.host == "mapped")
    if path is None and cache is not None and needs_packing:
        path = packed_path(whole, cache)
        if not path.exists():
            pack(whole, path, progress)
    return CheckpointSource(first) if path is None else PackedSource(path, whole)


def _stacked(state: torch.Tensor, sequence: Sequenced, index: int) -> torch.Tensor:
    """Add the visual features of layer `index` at the image tokens."""
    if index >= len(sequence.deepstack):
        return state
    state = state.clone()
    state[0, sequence.image_rows] += sequence.deepstack[index].to(state.dtype)
    return state


def entry_of(layer: int, layers: int) -> int:
    """The entry of ``hidden_states`` that a negative layer names: -1 is the last, normed one."""
    return layers + 1 + layer
