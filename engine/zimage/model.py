"""The Z-Image transformer on the tape.

The noise refiner's blocks have the shapes of the joint layers, so both stand on one tape: first the refiner's, which
see the image alone, then the layers over [image, caption]. All branches of a step pass through a block while it is
bound, each with its own caption length, so no mask exists.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ...errors import RequestError
from ...loaders import Component
from ..dit.kernels import DEFINITIONS, SAFE, Kernels
from ..mover import Tape
from ..stack import NO_KERNELS, BlockStack, Hold, open_tape
from ..stack.pack import Progress
from ..template import Template
from .block import ZImageBlock
from .captions import CaptionRefiner
from .config import ZImageConfig, padded
from .ends import Ends
from .modulation import AdaptiveRows, BlockRows, RowTable
from .rope import caption_rotations, image_rotations

OUTPUT_EPS = 1e-6


@dataclass(frozen=True)
class Context:
    """One prompt as the blocks see it, for one size of picture.

    Attributes:
        caption: refined caption tokens with their pads [1, L, dim].
        rotations: complex64 [padded image tokens + L, head_dim / 2], image first.
        tokens: image tokens without pads.
    """

    caption: torch.Tensor
    rotations: torch.Tensor
    tokens: int


class _Layers(BlockStack[ZImageBlock]):
    """Both kinds of modulated blocks as one stack; only the names in the checkpoint differ."""

    refiners = 0

    def prefix(self, index: int) -> str:
        if index < self.refiners:
            return f"noise_refiner.{index}."
        return f"{self.root}{index - self.refiners}."


class ZImageTransformer:
    """The transformer with its blocks on a tape.

    Args:
        config: geometry.
        template: the block that runs over the tape.
        blocks: the tape: noise refiner, then layers.
        ends: input and output layers, their channels in the order of ``engine.latents.pack``.
        rows: source of modulation rows.
        captions: the caption branch.
        kernels: implementations of the blocks' ops.
    """

    def __init__(
        self,
        config: ZImageConfig,
        template: Template[ZImageBlock],
        blocks: Tape,
        ends: Ends,
        rows: AdaptiveRows,
        captions: CaptionRefiner,
        kernels: Kernels = DEFINITIONS,
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.captions = captions
        self._template = template
        self._ends = ends
        self._rows = rows
        self._kernels = kernels
        self._parameter = ends.x_pad_token

    @staticmethod
    def stack(
        component: Component, weight_format: str, dtype: torch.dtype, kernels: Mapping[str, str] = NO_KERNELS
    ) -> BlockStack[ZImageBlock]:
        """The modulated blocks of a checkpoint in a weight format, without their modulation."""
        config = ZImageConfig.from_dict(component.config)
        with torch.device("meta"):
            block = ZImageBlock(config)
        stack = _Layers(
            component.checkpoint,
            "layers.",
            config.visits,
            block,
            weight_format=weight_format,
            dtype=dtype,
            kernels=kernels,
        )
        stack.refiners = config.n_refiner_layers
        return stack

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
    ) -> ZImageTransformer:
        """Read the weights that a step needs: blocks without modulation, and the ends.

        Args:
            component: config and checkpoint of the transformer, already checked against each other.
            device: where the slabs and the ends stay.
            dtype: compute dtype.
            cache: folder of packed files, or None.
            hold: format, place and kernels of the blocks; None keeps them as stored on the device.
            progress: called while the blocks are packed.

        Raises:
            CheckpointError: the config describes a model that this engine does not run, or a file is damaged.
            PlanError: the placement is not one for this model.
        """
        config = ZImageConfig.from_dict(component.config)
        checkpoint, hold = component.checkpoint, hold or Hold()
        stack = cls.stack(component, hold.weight_format, dtype, hold.kernels)
        blocks = open_tape(stack, hold, device, cache, progress)
        with torch.device("meta"):
            ends = Ends(config)
        ends = ends.to(dtype).to_empty(device="cpu").requires_grad_(False)
        checkpoint.read_into(list(ends.named_parameters()))
        ends.reorder(config.in_channels)
        rows = AdaptiveRows(checkpoint, config, device)
        kernels = Kernels.of(hold.kernels)
        captions = CaptionRefiner(checkpoint, config, device, dtype, kernels)
        return cls(config, stack.template, blocks, ends.to(device), rows, captions, kernels)

    def with_template(self, template: Template[ZImageBlock]) -> ZImageTransformer:
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

    def table(self, timesteps: Sequence[float]) -> RowTable:
        """Modulation rows for the timesteps of a run."""
        return self._rows.table(timesteps, dtype=self._parameter.dtype)

    def contexts(
        self, prompts: Sequence[torch.Tensor], rows: int, columns: int, *, safe: bool = False
    ) -> tuple[Context, ...]:
        """Prompts as the blocks see them; done once per run, since none of it depends on the timestep.

        Args:
            prompts: prompt embeddings [tokens, cap_feat_dim]; the negative prompt's are the second.
            rows: of image tokens.
            columns: of image tokens.
            safe: every op runs as it is defined.

        Raises:
            RequestError: a caption is too long, empty or of another width, or the picture is too large.
        """
        most = self.config.most_rows, self.config.most_columns
        if not (1 <= rows <= most[0] and 1 <= columns <= most[1]):
            raise RequestError(
                f"picture must be at most {most[1]}x{most[0]} image tokens, got {columns}x{rows}",
                hint="ask for a smaller picture",
            )
        made = []
        for prompt, caption in zip(prompts, self.captions.run(prompts, safe=safe), strict=True):
            tokens = len(prompt)
            rotations = torch.cat(
                [image_rotations(rows, columns, tokens, self.config), caption_rotations(tokens, self.config)]
            )
            made.append(Context(caption, rotations.to(self._parameter.device), rows * columns))
        return tuple(made)

    def velocity(
        self,
        latent_tokens: torch.Tensor,
        contexts: Sequence[Context],
        table: RowTable,
        timestep: float,
        *,
        more: bool = False,
        safe: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> list[torch.Tensor]:
        """One network evaluation per prompt, all of them inside each block's visit.

        The network's output is negated, so that it is the velocity ``noise - picture`` that an Euler step from a
        higher to a lower sigma takes.

        Args:
            latent_tokens: packed noisy latents [1, tokens, 4 * in_channels], as ``engine.latents.pack`` orders them.
            contexts: one per prompt, all for this size of picture.
            table: modulation rows that hold ``timestep``.
            timestep: model time 1 - sigma.
            more: another evaluation follows, so its first weights may be copied ahead.
            safe: every op but the linear layers runs as it is defined, attention in float32; for a step that came out
                not finite.
            check: called before each block; raises to stop the run.

        Returns:
            Velocity per prompt, [1, tokens, 4 * in_channels].
        """
        tokens, last = latent_tokens.shape[1], len(self.blocks) - 1
        run = _Run(self.config, contexts, self._padded(latent_tokens), SAFE if safe else self._kernels)
        with closing(self.blocks.sweep(more)) as visits, self._template:
            for index, views in visits:
                check()
                block = self._template.bind(views)
                run.visit(block, table.block(index, timestep), index, tokens if index == last else None)
        return [self._output(state, table.output(timestep)) for state in run.states]

    def _padded(self, latent_tokens: torch.Tensor) -> torch.Tensor:
        """Embedded image tokens with the learned token in the padded places."""
        embedded = self._ends.embed(latent_tokens.to(self._parameter))
        pads = padded(embedded.shape[1]) - embedded.shape[1]
        return torch.cat([embedded, self._parameter.expand(1, pads, -1)], dim=1)

    def _output(self, hidden: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self._ends.project(F.layer_norm(hidden, hidden.shape[-1:], eps=OUTPUT_EPS).mul_(scale)).neg_()


class _Run:
    """Hidden states of one evaluation.

    Prompts of one padded length put the image at the same positions, so the noise refiner runs once for all of them.
    """

    def __init__(
        self, config: ZImageConfig, contexts: Sequence[Context], image: torch.Tensor, kernels: Kernels
    ) -> None:
        self._refiners, self._contexts, self._kernels = config.n_refiner_layers, contexts, kernels
        self._images = {self._key(context): image.clone() for context in contexts}
        self._rotations = {self._key(context): context.rotations[: image.shape[1]] for context in contexts}
        self.states: list[torch.Tensor] = []

    @staticmethod
    def _key(context: Context) -> int:
        return context.caption.shape[1]

    def visit(self, block: ZImageBlock, rows: BlockRows, index: int, keep: int | None) -> None:
        """Run one block over every branch."""
        if index < self._refiners:
            self._images = {
                key: block(image, rows, self._rotations[key], None, self._kernels)
                for key, image in self._images.items()
            }
            return
        if index == self._refiners:
            self.states = [torch.cat([self._images[self._key(c)], c.caption], dim=1) for c in self._contexts]
            self._images = {}
        self.states = [
            block(state, rows, context.rotations, keep, self._kernels)
            for state, context in zip(self.states, self._contexts, strict=True)
        ]
