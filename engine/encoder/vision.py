"""The vision tower of Qwen2.5-VL: windowed and full attention over patches, four of which become one token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch

from ..mover import Tape
from ..stack import BlockStack, CheckpointSource
from .pictures import Patches

if TYPE_CHECKING:
    from ...loaders.checkpoint import Checkpoint


class VisionTower:
    """Pictures' patches to rows that take the place of image tokens.

    Args:
        config: transformers' ``Qwen2_5_VLVisionConfig`` with the attention implementation set.
        checkpoint: the text encoder's tensors.
        device: where the tower runs.
        dtype: of weights and computation.
    """

    def __init__(self, config: Any, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

        self._config, self._device, self._dtype = config, device, dtype
        with torch.device("meta"):
            block = modeling.Qwen2_5_VLVisionBlock(config)
            merger = modeling.Qwen2_5_VLPatchMerger(
                dim=config.out_hidden_size,
                context_dim=config.hidden_size,
                spatial_merge_size=config.spatial_merge_size,
            )
        self._patch_weight = checkpoint.read("visual.patch_embed.proj.weight", dtype).flatten(1).to(device)
        blocks = BlockStack(checkpoint, "visual.blocks.", config.depth, block, dtype=dtype)
        self._block, self._tape = blocks.template, Tape.resident(blocks.layouts, CheckpointSource(blocks), device)
        merger = merger.to(dtype).to_empty(device="cpu").requires_grad_(False)
        checkpoint.read_into([("visual.merger." + name, p) for name, p in merger.named_parameters()])
        self._merger = merger.to(device)

    def close(self) -> None:
        """Free the weights."""
        self._tape.close()

    def run(self, patches: Patches) -> torch.Tensor:
        """Rows for all image tokens of all pictures, in order.

        The patch embedding is a matrix product here: its convolution has stride equal to its kernel. Attention is
        within windows of whole merge blocks, and within one picture in the blocks that the config lists as full.

        Returns:
            tensor [tokens, out_hidden_size].
        """
        unit = patches.merge_size**2
        order, window_lengths = window_order(patches, self._config.window_size // self._config.patch_size)
        whole_lengths = [rows * columns for rows, columns in patches.grids]
        hidden = patches.values.to(self._device, self._dtype) @ self._patch_weight.T
        cosine, sine = self._rotation(patches)
        place = order.to(self._device)
        hidden, cosine, sine = (_permuted(rows, place, unit) for rows in (hidden, cosine, sine))
        with closing(self._tape.sweep(more=False)) as visits, self._block:
            for index, views in visits:
                lengths = whole_lengths if index in self._config.fullatt_block_indexes else window_lengths
                block = self._block.bind(views)
                hidden = block(hidden, cu_seqlens=_boundaries(lengths), position_embeddings=(cosine, sine))
        merged = self._merger(hidden)
        return merged[torch.argsort(place)]

    def _rotation(self, patches: Patches) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the axial rotary embedding, float32 [patches, head_dim] each."""
        spatial_dim = self._config.hidden_size // self._config.num_heads // 2
        theta = (self._config.rope_parameters or {}).get("rope_theta", 10000.0)
        exponents = torch.arange(0, spatial_dim, 2, dtype=torch.float32) / spatial_dim
        places = torch.cat([patch_places(rows, columns, patches.merge_size) for rows, columns in patches.grids])
        angles = (places[..., None] * (1.0 / theta**exponents)).flatten(1)
        angles = torch.cat([angles, angles], dim=-1).to(self._device)
        return angles.cos(), angles.sin()


def patch_places(rows: int, columns: int, merge_size: int) -> torch.Tensor:
    """Row and column of every patch, int64 [patches, 2], in the order of patches: merge block by merge block."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    blocks = (rows // merge_size, merge_size, columns // merge_size, merge_size)
    return torch.stack([place.reshape(blocks).transpose(1, 2).flatten() for place in (row, column)], dim=1)


def window_order(patches: Patches, window_patches: int) -> tuple[torch.Tensor, list[int]]:
    """The order of merge blocks in which every attention window is contiguous, and the windows' lengths in patches.

    Windows are squares of ``window_patches`` patches a side that start at the picture's upper left corner; at the right
    and lower edges they are smaller. No window holds parts of two pictures.

    Returns:
        int64 [blocks]: which block comes at each place; and one length per window, adding up to all patches.
    """
    side = window_patches // patches.merge_size
    orders: list[torch.Tensor] = []
    lengths: list[int] = []
    first_block = 0
    for rows, columns in patches.merged_grids:
        window_row = (torch.arange(rows) // side).repeat_interleave(columns)
        window_column = (torch.arange(columns) // side).repeat(rows)
        window = window_row * (-(-columns // side)) + window_column
        orders.append(torch.argsort(window, stable=True) + first_block)
        lengths.extend((torch.bincount(window) * patches.merge_size**2).tolist())
        first_block += rows * columns
    return torch.cat(orders), lengths


def _permuted(rows: torch.Tensor, order: torch.Tensor, unit: int) -> torch.Tensor:
    return rows.unflatten(0, (-1, unit))[order].flatten(0, 1)


def _boundaries(lengths: Sequence[int]) -> torch.Tensor:
    """Cumulative lengths from 0, on the CPU, where the attention module reads them without waiting for the device."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
