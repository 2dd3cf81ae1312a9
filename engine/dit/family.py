"""Qwen-Image and its edit models, as the engine runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.guidance import combine
from ..encoder import PromptEncoder
from ..family import Shape
from ..reference.apply import Cast, References
from ..schedule import Schedule, make_schedule
from ..stack import BlockStack, Hold
from ..stack.pack import Progress
from ..vae import ImageVAE
from .model import Branch, DiTConfig, QwenImageTransformer
from .modulation import ModulationTable

if TYPE_CHECKING:
    from ...loaders import Component, ModelSource
    from ..conditioning import Conditioning
    from ..job import Job
    from ..seen import Seen


@dataclass(frozen=True)
class QwenImageNetwork:
    """One run's fixed parts.

    Attributes:
        job: the resolved request.
        schedule: noise levels.
        references: what the pictures do in each step.
        branches: by the pictures that are there: prompt, and negative prompt where guidance is on.
        table: modulation rows of every step.
        dtype: compute dtype.
    """

    job: Job
    schedule: Schedule
    references: References
    branches: Mapping[Cast, tuple[Branch, ...]]
    table: ModulationTable
    dtype: torch.dtype

    def velocity(
        self,
        index: int,
        latents: torch.Tensor,
        transformer: QwenImageTransformer,
        kernels: Mapping[str, str],
        *,
        safe: bool,
        check: Callable[[], None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`engine.family.Network`."""
        sigma = float(self.schedule.sigmas[index])
        given = self.references.at(index, latents, sigma)
        velocities = transformer.velocity(
            given.latents.to(self.dtype),
            given.tokens,
            given.dress(self.branches[self.job.cast(index)], self.job.reference, self.dtype),
            self.table,
            self.schedule.timestep(index, self.dtype),
            more=index + 1 < len(self.schedule),
            safe=safe,
            check=check,
        )
        return given.state, _guide([v.float() for v in velocities], self.job.true_cfg_scale, kernels)


class QwenImageFamily:
    """Qwen-Image, Qwen-Image-Edit, -2509 and -2511; see :class:`engine.family.Family`."""

    def shape(self, source: ModelSource) -> Shape:
        """Its widths, from the configs."""
        config = DiTConfig.from_dict(source.transformer.config)
        vae = source.vae.config
        return Shape(2 * 2 ** len(vae["temperal_downsample"]), vae["z_dim"], config.joint_attention_dim)

    def open_encoder(
        self,
        source: ModelSource,
        device: torch.device,
        dtype: torch.dtype,
        hold: Hold,
        cache: Path,
        *,
        alone: bool,
        progress: Progress,
    ) -> PromptEncoder:
        """The prompt encoder; no weight is read."""
        return PromptEncoder(source, device, dtype, hold=hold, cache=cache, alone=alone, progress=progress)

    def stack(
        self, component: Component, weight_format: str, dtype: torch.dtype, kernels: Mapping[str, str]
    ) -> BlockStack[Any]:
        """The transformer's blocks in a weight format; no weight is read."""
        return QwenImageTransformer.stack(component, weight_format, dtype, kernels)

    def load_transformer(
        self,
        component: Component,
        device: torch.device,
        dtype: torch.dtype,
        cache: Path,
        hold: Hold,
        progress: Progress,
    ) -> QwenImageTransformer:
        """Read the transformer."""
        return QwenImageTransformer.load(
            component, device=device, dtype=dtype, cache=cache, hold=hold, progress=progress
        )

    def load_vae(
        self,
        component: Component,
        device: torch.device,
        dtype: torch.dtype,
        tile_pixels: int | None,
        weight_format: str,
    ) -> ImageVAE:
        """Read the VAE."""
        return ImageVAE.load(component, device=device, dtype=dtype, vae_tile=tile_pixels, weight_format=weight_format)

    def schedule(self, job: Job, config: Mapping[str, Any]) -> Schedule:
        """The resolution-dependent schedule."""
        rows, columns = job.target.grid
        return make_schedule(job.evaluations, rows * columns, config, flow_shift=job.flow_shift)

    def network(
        self,
        job: Job,
        schedule: Schedule,
        conditionings: Mapping[Cast, Conditioning],
        seen: Seen,
        transformer: QwenImageTransformer,
        dtype: torch.dtype,
    ) -> QwenImageNetwork:
        """Embed the prompts beside the references and compute the modulation rows."""
        references = References.of(job, seen.references)
        return QwenImageNetwork(
            job=job,
            schedule=schedule,
            references=references,
            branches={
                cast: _branches(transformer, references, cast, conditionings[job.shown(cast)]) for cast in job.casts
            },
            table=transformer.table([schedule.timestep(i, dtype) for i in range(len(schedule))]),
            dtype=dtype,
        )


def _branches(
    transformer: QwenImageTransformer, references: References, cast: Cast, conditioning: Conditioning
) -> tuple[Branch, ...]:
    """Both prompts beside the pictures of a cast."""
    grids, frames, kept = references.layout(cast)
    made = [transformer.branch(conditioning.prompt_embeds, grids, frames=frames, kept=kept)]
    if conditioning.negative_embeds is not None:
        alone = not references.options.negative
        grids, frames, kept = references.layout(()) if alone else (grids, frames, kept)
        made.append(transformer.branch(conditioning.negative_embeds, grids, frames=frames, kept=kept))
    return tuple(made)


def _guide(velocities: Sequence[torch.Tensor], scale: float, kernels: Mapping[str, str]) -> torch.Tensor:
    if len(velocities) == 1:
        return velocities[0]
    return combine(velocities[0], velocities[1], scale, implementation=kernels["guidance"])
