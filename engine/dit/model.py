"""The Qwen-Image diffusion transformer on the tape.

One template block runs over the slabs; every branch of a step (prompt, negative prompt) passes through a block while it
is bound, each with its own text length, so no padding and no mask exist.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError
from ...kernels.modulate import modulate
from ...loaders import Component
from ..formats import DEAD_IN_LAST_BLOCK
from ..mover import Tape
from ..stack import NO_KERNELS, BlockStack, Hold, open_tape
from ..stack.pack import Progress
from ..template import Template
from .block import EPS, DoubleStreamBlock, Rotations
from .emphasis import Emphasis
from .kernels import DEFINITIONS, SAFE, Kernels
from .modulation import ModulationRows, ModulationTable
from .rope import Grid, image_rotations, text_rotations


@dataclass(frozen=True)
class DiTConfig:
    """Geometry of a Qwen-Image transformer, with the names of its config.json."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    joint_attention_dim: int
    in_channels: int
    out_channels: int
    patch_size: int
    axes_dims_rope: tuple[int, ...]
    zero_cond_t: bool = False

    @property
    def dim(self) -> int:
        """Width of the hidden states."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DiTConfig:
        """Read the known keys.

        Raises:
            CheckpointError: a key is missing, or the model needs an input that this engine does not give
                (embedded guidance, layered conditioning).
        """
        for key in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"):
            if config.get(key):
                raise CheckpointError(f"transformer config must have {key}=false, got true (a model not supported yet)")
        known = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        missing = [field.name for field in fields(cls) if field.name not in known and field.name != "zero_cond_t"]
        if missing:
            raise CheckpointError(f"transformer config must name {', '.join(missing)}, got none")
        known["axes_dims_rope"] = tuple(known["axes_dims_rope"])
        made = cls(**known)
        if sum(made.axes_dims_rope) != made.attention_head_dim:
            raise CheckpointError(
                f"axes_dims_rope must add up to attention_head_dim {made.attention_head_dim}, got {made.axes_dims_rope}"
            )
        return made


class _Ends(nn.Module):
    """What stands before and after the blocks."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.img_in = nn.Linear(config.in_channels, config.dim)
        self.txt_norm = nn.RMSNorm(config.joint_attention_dim, eps=EPS)
        self.txt_in = nn.Linear(config.joint_attention_dim, config.dim)
        self.proj_out = nn.Linear(config.dim, config.patch_size**2 * config.out_channels)


@dataclass(frozen=True)
class Branch:
    """One prompt as the blocks see it.

    Attributes:
        text: embedded text [1, tokens, dim].
        rotations: rotary factors of both streams.
        emphasis: how the references weigh; None as trained.
        tokens: image tokens that this branch reads in place of the common ones: the target's, [1, target tokens,
            in_channels], where it reads no references.
    """

    text: torch.Tensor
    rotations: Rotations
    emphasis: Emphasis | None = None
    tokens: torch.Tensor | None = None


class QwenImageTransformer:
    """The transformer with its blocks on a tape.

    Args:
        config: geometry.
        template: the block that runs over the tape.
        blocks: the tape of blocks.
        ends: input and output layers.
        rows: source of modulation rows.
        kernels: implementations of the blocks' ops.
    """

    def __init__(
        self,
        config: DiTConfig,
        template: Template[DoubleStreamBlock],
        blocks: Tape,
        ends: _Ends,
        rows: ModulationRows,
        kernels: Kernels = DEFINITIONS,
    ) -> None:
        self.config = config
        self.blocks = blocks
        self._template = template
        self._ends = ends
        self._rows = rows
        self._kernels = kernels
        self._parameter = ends.img_in.weight

    @staticmethod
    def stack(
        component: Component, weight_format: str, dtype: torch.dtype, kernels: Mapping[str, str] = NO_KERNELS
    ) -> BlockStack[DoubleStreamBlock]:
        """The blocks of a checkpoint in a weight format, without modulation and what the last block does not need."""
        config = DiTConfig.from_dict(component.config)
        with torch.device("meta"):
            block = DoubleStreamBlock(config.dim, config.num_attention_heads)
        return BlockStack(
            component.checkpoint,
            "transformer_blocks.",
            config.num_layers,
            block,
            weight_format=weight_format,
            dtype=dtype,
            dead=DEAD_IN_LAST_BLOCK,
            kernels=kernels,
        )

    @classmethod
    def load(
        cls,
        component: Component,
        *,
        device: torch.device,
        dtype: torch.dtype,
        cache: Path | None,
        hold: Hold | None = None,
        progress: Progress = lambda done, total: None,
    ) -> QwenImageTransformer:
        """Read the weights that a step needs: blocks without modulation, and the ends.

        Args:
            component: config and checkpoint of the transformer, already checked against each other.
            device: where the slabs and the ends stay.
            dtype: compute dtype.
            cache: folder of cached modulation rows and packed files, or None.
            hold: format, place and kernels of the blocks; None keeps them as stored on the device.
            progress: called while the blocks are packed.

        Raises:
            CheckpointError: the config describes a model that this engine does not run, or a file is damaged.
            PlanError: the placement is not one for this model.
        """
        config = DiTConfig.from_dict(component.config)
        checkpoint, hold = component.checkpoint, hold or Hold()
        stack = cls.stack(component, hold.weight_format, dtype, hold.kernels)
        blocks = open_tape(stack, hold, device, cache, progress)
        with torch.device("meta"):
            ends = _Ends(config)
        ends = ends.to(dtype).to_empty(device="cpu").requires_grad_(False)
        checkpoint.read_into(list(ends.named_parameters()))
        rows = ModulationRows(checkpoint, config.num_layers, checkpoint.identity, device=device, cache=cache)
        return cls(config, stack.template, blocks, ends.to(device), rows, Kernels.of(hold.kernels))

    def with_template(self, template: Template[DoubleStreamBlock]) -> QwenImageTransformer:
        """The same tape run by another block, whose layers take the same weights and multiply them in another way."""
        made = copy.copy(self)
        made._template = template
        return made

    def close(self) -> None:
        """Free the weights."""
        self.blocks.close()

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that a step reads."""
        return self.blocks.nbytes + sum(p.nbytes for p in self._ends.parameters())

    def table(self, timesteps: Sequence[float]) -> ModulationTable:
        """Modulation rows for the timesteps of a run (and for zero, where references are read at time zero)."""
        wanted = [*timesteps, 0.0] if self.config.zero_cond_t else list(timesteps)
        return self._rows.table(wanted, dtype=self._parameter.dtype)

    def branch(
        self,
        prompt_embeds: torch.Tensor,
        grids: Sequence[Grid],
        *,
        frames: Sequence[int] | None = None,
        kept: torch.Tensor | None = None,
    ) -> Branch:
        """Embed one prompt; this does not depend on the timestep, so it is done once per run.

        Args:
            prompt_embeds: [tokens, joint_attention_dim].
            grids: token rows and columns of the target and the references.
            frames: their frame positions; None counts from 0.
            kept: places of the image tokens that are there, of those of all grids; None for all.
        """
        device, axes = self._parameter.device, self.config.axes_dims_rope
        text = self._ends.txt_in(self._ends.txt_norm(prompt_embeds[None].to(self._parameter)))
        length = prompt_embeds.shape[0]
        image = image_rotations(grids, axes, frames)
        image = image if kept is None else image[kept.cpu()]
        return Branch(text, Rotations(text_rotations(length, grids, axes).to(device), image.to(device)))

    def velocity(
        self,
        latent_tokens: torch.Tensor,
        reference_tokens: torch.Tensor | None,
        branches: Sequence[Branch],
        table: ModulationTable,
        timestep: float,
        *,
        more: bool = False,
        safe: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> list[torch.Tensor]:
        """One network evaluation per branch, all branches inside each block's visit.

        Args:
            latent_tokens: packed noisy latents of the target [1, target tokens, in_channels].
            reference_tokens: packed clean latents of all references [1, reference tokens, in_channels], or None.
            branches: one per prompt.
            table: modulation rows that hold ``timestep``.
            timestep: model time in [0, 1].
            more: another evaluation follows, so its first weights may be copied ahead.
            safe: every op but the linear layers runs as it is defined, attention in float32; for a step that came out
                not finite.
            check: called before each block; raises to stop the run.

        Returns:
            Velocity of the target per branch, [1, target tokens, patch_size^2 * out_channels].
        """
        target = latent_tokens.shape[1]
        tokens = latent_tokens if reference_tokens is None else torch.cat([latent_tokens, reference_tokens], dim=1)
        embedded = self._ends.img_in(tokens.to(self._parameter))
        states = [(self._embed(branch, embedded), branch.text.clone()) for branch in branches]
        kernels = SAFE if safe else self._kernels
        last, outputs = len(self.blocks) - 1, []
        with closing(self.blocks.sweep(more)) as visits, self._template:
            for index, views in visits:
                check()
                block = self._template.bind(views)
                given = []
                for (image, text), branch in zip(states, branches, strict=True):
                    zero_cond_t = self.config.zero_cond_t and image.shape[1] > target
                    rows = table.block(index, timestep, zero_cond_t=zero_cond_t)
                    given.append((image, text, rows, branch.rotations, target, kernels, branch.emphasis))
                if index < last:
                    states = [block(*each) for each in given]
                else:
                    outputs = [block.forward_last(*each) for each in given]
        scale, shift = table.output(timestep)
        return [
            self._ends.proj_out(modulate(x, shift, scale, eps=EPS, implementation=kernels.modulate)) for x in outputs
        ]

    def _embed(self, branch: Branch, common: torch.Tensor) -> torch.Tensor:
        """Image states of a branch before the first block, its own to write into: [1, image tokens, dim]."""
        return common.clone() if branch.tokens is None else self._ends.img_in(branch.tokens.to(self._parameter))
