"""The vision tower of Qwen3-VL: full attention over the patches of each picture, and features for early layers."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..encoder.pictures import Patches
from ..encoder.vision import patch_places
from ..mover import Tape
from ..stack import BlockStack, CheckpointSource

if TYPE_CHECKING:
    from ...loaders.checkpoint import Checkpoint


@dataclass(frozen=True)
class Features:
    """What the tower gives for all image tokens of all pictures, in order.

    Attributes:
        tokens: rows that take the place of image tokens [n, D].
        deepstack: rows to add at those tokens after decoder layers 1, 2, ...: one [n, D] per layer.
    """

    tokens: torch.Tensor
    deepstack: tuple[torch.Tensor, ...] = ()


class VisionTower:
    """Pictures' patches to rows of the language model's width.

    Args:
        config: transformers' ``Qwen3VLVisionConfig`` with the attention implementation set.
        checkpoint: the model's tensors.
        device: where the tower runs.
        dtype: of weights and computation.
    """

    def __init__(self, config: Any, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling

        self._config, self._device, self._dtype = config, device, dtype
        self._stacked = tuple(config.deepstack_visual_indexes)
        with torch.device("meta"):
            block = modeling.Qwen3VLVisionBlock(config)
            mergers = [modeling.Qwen3VLVisionPatchMerger(config)]
            mergers += [modeling.Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=True) for _ in self._stacked]

        def read(name: str) -> torch.Tensor:
            return checkpoint.read("visual." + name, dtype).to(device)

        self._patch_weight = read("patch_embed.proj.weight").flatten(1)
        self._patch_bias = read("patch_embed.proj.bias")
        self._places = read("pos_embed.weight").float()
        blocks = BlockStack(checkpoint, "visual.blocks.", config.depth, block, dtype=dtype)
        self._block, self._tape = blocks.template, Tape.resident(blocks.layouts, CheckpointSource(blocks), device)
        roots = ["visual.merger.", *(f"visual.deepstack_merger_list.{k}." for k in range(len(self._stacked)))]
        self._mergers = [
            _loaded(merger, root, checkpoint, device, dtype) for merger, root in zip(mergers, roots, strict=True)
        ]

    def close(self) -> None:
        """Free the weights."""
        self._tape.close()

    def run(self, patches: Patches, hidden_tokens: Collection[int] = ()) -> Features:
        """Rows for all image tokens.

        The patch embedding is a matrix product here: its convolution has stride equal to its kernel. Attention is
        within one picture. Hidden tokens attend to each other only and no other token attends to them, so that their
        pixels are felt nowhere else.

        Args:
            patches: the pictures.
            hidden_tokens: image tokens, counted over all pictures, to hide.
        """
        order, lengths = attention_order(patches, hidden_tokens)
        place = order.to(self._device)
        hidden = patches.values.to(self._device, self._dtype) @ self._patch_weight.T + self._patch_bias
        hidden = (hidden + self._positions(patches).to(self._dtype))[place]
        cosine, sine = (rows[place] for rows in self._rotation(patches))
        boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        back = torch.argsort(place.view(-1, patches.merge_size**2)[:, 0])
        deepstack: dict[int, torch.Tensor] = {}
        with closing(self._tape.sweep(more=False)) as visits, self._block:
            for index, views in visits:
                block = self._block.bind(views)
                hidden = block(hidden, cu_seqlens=boundaries, position_embeddings=(cosine, sine))
                if index in self._stacked:
                    number = self._stacked.index(index)
                    deepstack[number] = self._mergers[1 + number](hidden)[back]
        tokens = self._mergers[0](hidden)[back]
        return Features(tokens, tuple(deepstack[number] for number in sorted(deepstack)))

    def _positions(self, patches: Patches) -> torch.Tensor:
        """The learned square grid of positions, resampled to each picture (corners on corners): [patches, hidden]."""
        side = int(len(self._places) ** 0.5)
        grid = self._places[: side * side].T.reshape(1, -1, side, side)
        rows = []
        for height, width in patches.grids:
            resized = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=True)[0].flatten(1).T
            row, column = patch_places(height, width, patches.merge_size).unbind(1)
            rows.append(resized[(row * width + column).to(resized.device)])
        return torch.cat(rows)

    def _rotation(self, patches: Patches) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the axial rotary embedding, float32 [patches, head_dim] each."""
        spatial_dim = self._config.hidden_size // self._config.num_heads // 2
        theta = (self._config.rope_parameters or {}).get("rope_theta", 10000.0)
        exponents = torch.arange(0, spatial_dim, 2, dtype=torch.float32) / spatial_dim
        places = torch.cat([patch_places(rows, columns, patches.merge_size) for rows, columns in patches.grids])
        angles = (places[..., None] * (1.0 / theta**exponents)).flatten(1)
        angles = torch.cat([angles, angles], dim=-1).to(self._device)
        return angles.cos(), angles.sin()


def attention_order(patches: Patches, hidden_tokens: Collection[int]) -> tuple[torch.Tensor, list[int]]:
    """The order of patches in which every attention segment is contiguous, and the segments' lengths in patches.

    A picture is one segment; with hidden tokens it is two, those seen and those hidden.

    Returns:
        int64 [patches]: which patch comes at each place; and one length per segment, adding up to all patches.
    """
    unit, start = patches.merge_size**2, 0
    order: list[torch.Tensor] = []
    lengths: list[int] = []
    for count in patches.token_counts:
        tokens = torch.arange(start, start + count)
        hidden = torch.tensor([int(token) in hidden_tokens for token in tokens], dtype=torch.bool)
        for group in (tokens[~hidden], tokens[hidden]):
            if len(group):
                order.append((group[:, None] * unit + torch.arange(unit)).flatten())
                lengths.append(len(group) * unit)
        start += count
    return torch.cat(order), lengths


def _loaded(
    module: nn.Module, root: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    module = module.to(dtype).to_empty(device="cpu").requires_grad_(False).eval()
    checkpoint.read_into([(root + name, parameter) for name, parameter in module.named_parameters()])
    return module.to(device)
